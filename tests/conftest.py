"""How every test runs: eight CPU devices, strict shapes, checked annotations, only loopback."""

import os

# Before jax is imported by anything: these are read once, when its backend starts. Compiling is
# most of what tests do, and a third shorter without LLVM's optimizations (`make test-deep` has
# them, as users have).
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),  # what is named twice counts as it is named last
    ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent

# Annotations are checked here, and cost nothing in production; an int may stand for a float.
install_import_hook(
    "internjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder of real files that INTERNJAX_MIRROR names."""
    return Path(os.environ["INTERNJAX_MIRROR"])


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF: INTERNJAX_MODEL_GGUF, or the catalogue's cache."""
    path = _smollm2_gguf()
    assert path is not None, "mark the test needs_model: it is skipped where the weights are not"
    return path


def _smollm2_gguf() -> Path | None:
    given = os.environ.get("INTERNJAX_MODEL_GGUF")
    cache = Path(os.environ.get("INTERNJAX_CACHE") or Path.home() / ".cache" / "internjax")
    fetched = sorted((cache / "smollm2-135m-instruct").glob("*.gguf"))
    paths = [Path(given)] if given else fetched
    return paths[0] if paths and paths[0].is_file() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mirror = os.environ.get("INTERNJAX_MIRROR")
    absent = {}
    if not (mirror and Path(mirror).is_dir()):
        absent["needs_mirror"] = "INTERNJAX_MIRROR names no folder of real files"
    if _smollm2_gguf() is None:
        absent["needs_model"] = "no weights here: internjax catalog get smollm2-135m-instruct"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
