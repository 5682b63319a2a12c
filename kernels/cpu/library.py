"""The compiled kernels: found, loaded and made known to XLA when they are first asked for.

They are built at install where a C++ compiler is (setup.py). Two variables of the environment are
read at the first use: INTERNJAX_CPU_PATH forces a path (`PATHS`), INTERNJAX_CPU_THREADS their
number of threads.
"""

import ctypes
import functools
import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

PATHS = ("avx512", "avx2", "portable")
"""Fastest first; which of them a CPU can run is found out when it runs (cpu.cc)."""

_HANDLERS = {
    "internjax_quant_matmuls": "InternjaxQuantMatmuls",
    "internjax_float_matmuls": "InternjaxFloatMatmuls",
    "internjax_rope_write": "InternjaxRopeWrite",
    "internjax_paged_attention": "InternjaxPagedAttention",
    "internjax_unwritten": "InternjaxUnwritten",
}
_LOST = (
    "the CPU kernels are not there (%s): quantized weights are expanded to floats, which takes more"
    " memory and time. To build them install a C++17 compiler, for example g++, then this package"
    " anew."
)


@functools.cache
def library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | None:
    """Loads the kernels; None, said once, where they were not built or this machine refuses them.

    Raises:
      ValueError: INTERNJAX_CPU_PATH names a path that this CPU does not run.
    """
    found = next(iter(sorted(folder.glob("_native*.so"))), None)
    if found is None:
        log.warning(_LOST, "they were not built")
        return None
    try:
        native = ctypes.CDLL(str(found))
    except OSError as error:  # built for another machine, or against another C++ library
        log.warning(_LOST, error)
        return None
    if not all(hasattr(native, symbol) for symbol in _HANDLERS.values()):
        log.warning(_LOST, "they were built from older code")  # git pull in an editable install
        return None
    native.internjax_cpu_path.restype = ctypes.c_char_p
    if (path := native.internjax_cpu_path(b"")) is None:
        raise ValueError(f"INTERNJAX_CPU_PATH: this CPU runs {', '.join(_runnable(native))}.")
    for target, symbol in _HANDLERS.items():
        capsule = jax.ffi.pycapsule(getattr(native, symbol))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    log.info("CPU kernels: %s", path.decode())
    return native


def available() -> bool:
    """Whether JAX runs on the CPU by default and the kernels are there."""
    return jax.default_backend() == "cpu" and library() is not None


def runnable() -> tuple[str, ...]:
    """The paths that this CPU runs, fastest first; () without the kernels."""
    native = library()
    return () if native is None else _runnable(native)


def threads() -> int:
    """How many threads a product runs on."""
    return _must().internjax_cpu_threads()


def set_threads(number: int) -> None:
    """Sets how many threads products run on; 0 takes as many as the CPUs that may be used.

    Between two products only. No bit of a result depends on it.
    """
    if number < 0:
        raise ValueError(f"set_threads({number}): give a positive number, or 0 for all CPUs.")
    _must().internjax_cpu_set_threads(number)


def check_choice(implementation: str | None, path: str) -> bool:
    """Whether the kernels are to run: chosen, or the choice is free and they can.

    Raises:
      ValueError: the choice is unknown or cannot be met here.
    """
    if implementation not in (None, "cpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; legal are None, 'cpu', 'xla'.")
    if path and (path not in PATHS or path not in runnable()):
        raise ValueError(f"path={path!r}; this CPU runs {', '.join(runnable()) or 'none'}.")
    if implementation == "cpu" and not available():
        raise ValueError(
            f"implementation='cpu' needs the compiled kernels and JAX on the CPU; the backend is"
            f" {jax.default_backend()}, the kernels are {'there' if library() else 'not built'}."
        )
    return implementation == "cpu" or (implementation is None and available())


def _must() -> ctypes.CDLL:
    native = library()
    if native is None:
        raise ValueError("the CPU kernels were not built: there are no threads of theirs.")
    return native


def _runnable(native: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(p for p in PATHS if native.internjax_cpu_path(p.encode()) is not None)
