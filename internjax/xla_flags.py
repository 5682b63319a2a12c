"""Flags of XLA that this package wants on the CPU: put into XLA_FLAGS when it is imported.

XLA reads the variable once, when the first backend starts. A flag that the user names is left as it
is. JAX is not imported here.

`xla_cpu_experimental_ynn_fusion_type` lets YNNPACK take what stands around a product, such as the
widening of int8 weights. Where the CPU has AMX, `x @ int8.astype(bfloat16)` of 576 x 1536 took 2.0
to 2.3 ms without it and 0.7 ms with it (2 to 512 rows, one core). Where it has AVX-512 only it does
no good, so it is not set: such a product was 1.3 times as fast at 16 rows and 1.03 times at 512,
but prefilling 512 tokens with SmolLM2-135M took 618 -> 679 ms (packed 4-bit weights), 835 -> 892
ms (float32), 935 -> 973 ms (bfloat16), medians of 7 in turn.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

AMX_FLAGS = {"xla_cpu_experimental_ynn_fusion_type": "dot,individual_dot,eltwise,reduce"}
KNOWN_IN = ("0.12.",)  # of jaxlib: XLA ends the process at a flag that it does not know


def recommend(
    flags: Mapping[str, str] | None = None, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Appends each flag that XLA_FLAGS does not name; warns if it is too late for that.

    Args:
      flags: values by name; None takes what fits this machine.
    """
    given = environ.get("XLA_FLAGS", "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in given}
    wanted = fitting() if flags is None else flags
    missing = [f"--{name}={value}" for name, value in wanted.items() if name not in named]
    if not missing:
        return
    if backend_is_up(sys.modules):
        warnings.warn(
            f"JAX was used before internjax was imported, too late for {' '.join(missing)}. Import"
            " internjax first, or put it into XLA_FLAGS.",
            stacklevel=3,
        )
        return
    environ["XLA_FLAGS"] = " ".join([*given, *missing])


def fitting(cpuinfo: Path = Path("/proc/cpuinfo")) -> Mapping[str, str]:
    """Returns the flags that help on this CPU and that the installed XLA knows."""
    return AMX_FLAGS if has_amx(cpuinfo) and _jaxlib_version().startswith(KNOWN_IN) else {}


def has_amx(cpuinfo: Path) -> bool:
    """Whether Linux names AMX's int8 products among the features of the first CPU."""
    if not cpuinfo.is_file():
        return False
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        features = next((line for line in lines if line.startswith("flags")), "")
    return "amx_int8" in features.split()


def backend_is_up(modules: Mapping[str, Any]) -> bool:
    """Whether a backend of JAX has been started, given the modules that are imported."""
    bridge = modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _jaxlib_version() -> str:
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return ""
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    line = next((line for line in text.splitlines() if line.startswith("_version = ")), "")
    return line.partition("=")[2].strip(" \"'")
