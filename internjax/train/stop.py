"""Stopping between two steps: on SIGTERM, or when somebody makes the file STOP in the run folder.

All processes of a run stop after the same step: what one of them was asked is told to all in a
tiny reduction, which is read one step later so that nobody waits for it.
"""

import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from internjax.errors import UserError

STOP_FILE = "STOP"


class Stopped(UserError):
    """A run ended early because it was asked to; its checkpoint is whole and it can go on."""


class StopRequests:
    """Listens while its block runs; `reason()` is asked once a step by every process."""

    def __init__(self, folder: Path):
        self._file = folder / STOP_FILE
        self._signal, self._before = "", None
        self._pending: Any = None
        if jax.process_count() > 1:
            devices = np.array(jax.devices())
            self._mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(AxisType.Explicit,))
            self._any = jax.jit(jnp.max)

    def __enter__(self) -> "StopRequests":
        if jax.process_index() == 0:
            self._file.unlink(missing_ok=True)  # it stopped the run before this one
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reason(self) -> str:
        """Returns why to stop after this step, or "" to go on; the same in every process."""
        own = self._signal or (f"the file {self._file}" if self._file.exists() else "")
        if jax.process_count() == 1:
            return own
        answer, self._pending = self._pending, self._tell(bool(own))
        if answer is None or not int(answer):
            return ""
        return own or "a request to another process"

    def _tell(self, asked: bool) -> jax.Array:
        flags = np.full(jax.local_device_count(), asked, np.int32)
        with jax.set_mesh(self._mesh):
            sharding = NamedSharding(self._mesh, P("all"))
            return self._any(jax.make_array_from_process_local_data(sharding, flags))

    def _note(self, number: int, _: Any) -> None:
        self._signal = signal.Signals(number).name
