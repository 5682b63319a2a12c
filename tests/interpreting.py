"""Runs Mosaic GPU kernels on this CPU: shared memory, barriers and TMA copies, with races found.

Plain `interpret=True` does not run these kernels. The interpreter keeps state in the process, and
an exception inside a kernel leaves it broken for the next one: it is made new around each use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


class Race(AssertionError):
    """Two accesses to memory that nothing orders."""


@contextmanager
def interpreter(*, races: bool = True) -> Iterator[Any]:
    """Gives the value of a kernel's `interpret`; a race in the block raises Race.

    Memory that nobody wrote reads as NaN, and a read out of bounds raises.
    """
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        yield plgpu.InterpretGPUParams(detect_races=races, on_race="raise")
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError as error:
        if "RACE DETECTED" in str(error):
            raise Race(str(error)) from None
        raise
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
