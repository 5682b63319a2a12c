"""Checkpoints of any tree with Orbax: asynchronous, atomic, the newest n kept.

A checkpoint that was being written when the process died is never listed, so never restored.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internjax.errors import UserError
from internjax.lineage import canonical

# Orbax prints the traceback of a failed write before it raises the error, which is told once here.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """A folder of checkpoints of one run. Use as a context manager: leaving it waits for writes."""

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        self.folder = Path(folder).absolute()
        with self._told():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._told():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns a disk that takes no more into one line; the checkpoints before stay as they are.

        Writing goes on in threads of Orbax and TensorStore, whose errors tell the cause in words.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            codes = re.findall(r"os_error_code='(\d+)'", str(error))
            number = int(codes[-1]) if codes else getattr(error, "errno", None)
            if number is None:
                raise
            for half in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)
            kept = ", ".join(str(step) for step in self._steps()) or "none"
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written: {os.strerror(number)};"
                f" whole ones there: {kept}. The same command goes on from the newest."
            ) from error

    def _steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def latest(self) -> int | None:
        """Returns the newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, notes: Mapping[str, Any]) -> None:
        """Starts to write `tree` and small JSON `notes`; returns before they are on disk."""
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave(canonical(notes))
        )
        with self._told():
            self._manager.save(step, args=args)

    def restore(self, like: Any, *, expect: Mapping[str, Any]) -> tuple[int, Any]:
        """Reads the newest checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
          UserError: the run that wrote it had other settings than `expect`; names each of them.
        """
        step = self.latest()
        if step is None:
            raise UserError(f"{self.folder}: no whole checkpoint is there.")
        notes = self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))
        changed = {
            key: (notes["notes"].get(key), value)
            for key, value in canonical(expect).items()  # as JSON brings them back: tuples as lists
            if notes["notes"].get(key) != value
        }
        if changed:
            told = "; ".join(f"{k}: was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise UserError(
                f"{self.folder}: step {step} was trained with other settings ({told});"
                " resume with the old ones or start in a new folder."
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(shapes))
        return step, self._manager.restore(step, args=args)["tree"]
