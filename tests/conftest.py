"""How every test runs: eight CPU devices, strict shapes, checked annotations, only loopback."""

import os

# Before jax is imported by anything: these are read once, when its backend starts.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent

# Shapes in annotations are checked by beartype here, and cost nothing in production.
install_import_hook("internjax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder of real files that INTERNJAX_MIRROR names."""
    return Path(os.environ["INTERNJAX_MIRROR"])


def _smollm2_gguf() -> Path | None:
    given = os.environ.get("INTERNJAX_MODEL_GGUF")
    if given:
        return Path(given)
    return None


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF: INTERNJAX_MODEL_GGUF, or the catalogue's cache."""
    path = _smollm2_gguf()
    if path is None or not path.is_file():
        pytest.skip("SmolLM2 weights are not here: `internjax catalog get smollm2-135m-instruct`")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mirror = os.environ.get("INTERNJAX_MIRROR")
    if not (mirror and Path(mirror).is_dir()):
        skip = pytest.mark.skip(reason="INTERNJAX_MIRROR names no folder of real files")
        for item in items:
            if item.get_closest_marker("needs_mirror"):
                item.add_marker(skip)
