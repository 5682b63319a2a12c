"""`profile_steps=10:12`: a trace of these steps, for TensorBoard's profiler, xprof or Perfetto.

A step is one compiled program: how its time divides into forward, backward and optimizer can be
read from such a trace only, so the log does not pretend to know.
"""

import re
from pathlib import Path
from typing import Any

import jax

from internjax.errors import UserError


def parse_steps(text: str) -> range:
    """Reads "10:12" as steps 10, 11 and 12, "10" as one step, "" as none.

    Raises: UserError when it is neither.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text) if text else None
    first = int(match[1]) if match else 1
    last = int(match[2] or first) if match else 0
    if text and (match is None or not 1 <= first <= last):
        raise UserError(f"profile_steps={text!r}: give steps as FIRST:LAST, for example 10:12.")
    return range(first, last + 1)


class Profiler:
    """Traces the steps of `steps` into `folder`. A context manager: an early end is written too."""

    def __init__(self, steps: range, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """Starts the trace when `step` is its first; work dispatched earlier is waited for."""
        if step in self._steps and not self._on:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace when `step` was its last, once its work is done."""
        if self._on and step >= self._steps[-1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
