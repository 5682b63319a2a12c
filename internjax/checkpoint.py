"""Checkpoints of any tree with Orbax: asynchronous, atomic, the newest n (and every m-th) kept.

A checkpoint that was being written when the process died is never listed, so never restored. What
comes back takes the shapes, dtypes and shardings of the tree that is asked for, whatever mesh,
ZeRO stage or number of processes wrote it.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P, Sharding

from internjax.errors import Corrupt, Missing, UserError
from internjax.lineage import canonical

# Orbax prints the traceback of a failed write before it raises the error, which is told once here.
logging.getLogger("absl").setLevel(logging.CRITICAL)

FILES = "files.json"  # sizes of a checkpoint's files, written last before it gets its name
_HALF = ".orbax-checkpoint-tmp"


class Checkpoints:
    """A folder of checkpoints of one run. Use as a context manager: leaving it waits for writes.

    Args:
      folder: a path, or an address that Orbax and TensorStore know (gs://..., s3://...), which
        is handed to them as it is.
      keep: newest ones kept; keep_every: steps divisible by it are kept for good (0: none).
      read_only: touch nothing, so that a run that is still writing is not disturbed.
    """

    def __init__(
        self, folder: Path | str, *, keep: int = 2, keep_every: int = 0, read_only: bool = False
    ):
        self._local = "://" not in str(folder)
        self.folder = Path(folder).absolute() if self._local else str(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=None if read_only else keep_every or None,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._note_sizes),
        )
        with self._told():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # a peer may be gone, and the end of a write waits for all of them
        with self._told():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def latest(self) -> int | None:
        """Returns the newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, settings: Mapping[str, Any]) -> None:
        """Starts to write `tree` and small JSON `settings`; returns before they are on disk.

        Blocks while the tree is copied off the devices, and while the save before is not done.
        """
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave(canonical(settings))
        )
        with self._told():
            self._manager.save(step, args=args)

    def steps(self) -> list[int]:
        """Returns the whole steps there are, the oldest first."""
        return sorted(self._manager.all_steps())

    def writing(self) -> bool:
        """Whether a save goes on in the background."""
        return self._manager.is_saving_in_progress()

    def restore(
        self, like: Any, *, expect: Mapping[str, Any], allow_changes: bool = False
    ) -> tuple[int, Any]:
        """Reads the newest checkpoint into the shapes, dtypes and shardings of `like`.

        Args:
          like: arrays or ShapeDtypeStructs. Leading dims may be grouped otherwise than saved:
            stacked layers `[L, ...]` come back as `[C, L / C, ...]` and the other way round.
          expect: the settings of this run; other ones are refused unless `allow_changes`.

        Raises:
          Missing: there is no whole checkpoint. Corrupt: files of it are missing or damaged.
          UserError: it was written with other settings or holds another tree; names each part.
        """
        step = self.latest()
        if step is None:
            raise Missing(f"{self.folder}: no whole checkpoint is there.")
        self._check_sizes(step)
        changed = changes(self.settings(step), expect)
        if changed and not allow_changes:
            raise UserError(
                f"{self.folder}: step {step} was trained with other settings"
                f" ({'; '.join(changed)}); resume with the old ones, start in a new folder, or say"
                " run.allow_changes=true."
            )
        return step, self._read(step, like)

    def settings(self, step: int) -> dict[str, Any]:
        """Returns what `save` was given beside the tree."""
        with self._damage_told(step):
            args = ocp.args.Composite(notes=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["notes"]

    def restore_part(self, name: str, like: Any, *, step: int) -> Any:
        """Reads one top field of the saved tree (`params`, to export a model) and nothing else."""
        self._check_sizes(step)
        return self._read(step, {name: like}, partial=True)[name]

    def stored(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of every leaf of a saved tree by its path."""
        with self._damage_told(step):
            handler = ocp.StandardCheckpointer()
            tree = handler.metadata(self._manager.directory / str(step) / "tree").item_metadata
            handler.close()
        leaves = _flat(tree)
        return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in leaves}

    def _read(self, step: int, like: Any, *, partial: bool = False) -> Any:
        shapes = {path: leaf.shape for path, leaf in self.stored(step).items()}
        want = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check_tree(step, shapes, want, partial=partial)
        saved = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _as_stored(leaf, shapes[_name(path)]), want
        )
        if partial:
            restore = ocp.checkpoint_utils.construct_restore_args(saved)
            args = ocp.args.PyTreeRestore(saved, restore_args=restore, partial_restore=True)
        else:
            args = ocp.args.StandardRestore(saved)
        with self._damage_told(step):
            got = self._manager.restore(step, args=ocp.args.Composite(tree=args))["tree"]
        return jax.tree.map(_regrouped, got, want)

    def _check_tree(self, step: int, stored: Mapping, want: Any, *, partial: bool) -> None:
        """Refuses a checkpoint of another model or optimizer, naming what does not fit."""
        wanted = {path: tuple(leaf.shape) for path, leaf in _flat(want)}
        wrong = [f"{path} is not in it" for path in wanted.keys() - stored.keys()]
        if not partial:
            wrong += [f"{path} is in it and not here" for path in stored.keys() - wanted.keys()]
        for path in wanted.keys() & stored.keys():
            if not _regroups(stored[path], wanted[path]):
                wrong.append(f"{path} is {list(stored[path])} in it, {list(wanted[path])} here")
        if wrong:
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError(
                f"{self.folder}: step {step} is of another model or optimizer"
                f" ({'; '.join(sorted(wrong)[:4])}{more}): start in a new folder."
            )

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
            if number is None or not self._local:
                raise
            for half in self.folder.glob(f"*{_HALF}"):
                shutil.rmtree(half, ignore_errors=True)
            steps = sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())
            kept = ", ".join(str(step) for step in steps) or "none"
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written: {os.strerror(number)};"
                f" whole ones there: {kept}. The same command goes on from the newest."
            ) from error

    @contextmanager
    def _damage_told(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise self._corrupt(step, _first_line(error)) from error

    def _corrupt(self, step: int, why: str) -> Corrupt:
        return Corrupt(
            f"{self.folder}/{step}: the checkpoint is damaged: {why}. Remove this folder to go on"
            " from the one before."
        )

    def _note_sizes(self) -> None:
        """Writes the sizes of all files into a checkpoint that is whole but has no name yet."""
        if not self._local or jax.process_index():
            return
        for half in self.folder.glob(f"*{_HALF}"):
            files = sorted(path for path in half.glob("*/**/*") if path.is_file())
            sizes = {path.relative_to(half).as_posix(): path.stat().st_size for path in files}
            (half / FILES).write_text(json.dumps(sizes, indent=0), encoding="utf-8")

    def _check_sizes(self, step: int) -> None:
        """Finds files that were lost or cut short, before anything is read."""
        if not self._local or not (self.folder / str(step) / FILES).is_file():
            return
        whole = self.folder / str(step)
        for name, size in json.loads((whole / FILES).read_text(encoding="utf-8")).items():
            path = whole / name
            if not path.is_file():
                raise self._corrupt(step, f"{name} is missing")
            if path.stat().st_size != size:
                raise self._corrupt(step, f"{name} has {path.stat().st_size} bytes of {size}")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists how two groups of settings differ, one dotted key each."""
    was, now = _dotted(canonical(old)), _dotted(canonical(new))
    keys = sorted(was.keys() | now.keys())
    differ = [k for k in keys if (k in was, was.get(k)) != (k in now, now.get(k))]

    def told(side: Mapping[str, Any], key: str) -> str:
        return repr(side[key]) if key in side else "absent"

    return [f"{key}: was {told(was, key)}, is {told(now, key)}" for key in differ]


def _dotted(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Counts the trailing dims that two shapes share."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def _regroups(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes hold the same rows, their leading dims grouped in one way or another."""
    rest = _common(a, b)
    one, other = a[: len(a) - rest], b[: len(b) - rest]
    sizes = [math.prod(dims) for dims in (one, other)]
    return a == b or (bool(one and other) and 1 in (len(one), len(other)) and sizes[0] == sizes[1])


def _as_stored(want: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns how to read a leaf: as it was saved, laid out as nearly as wanted as that allows."""
    sharding: Sharding | None = want.sharding
    if shape != want.shape and isinstance(sharding, NamedSharding):
        rest = _common(shape, want.shape)
        spec = (*sharding.spec, *[None] * (len(want.shape) - len(sharding.spec)))
        lead = [part for part in spec[: len(spec) - rest] if part is not None][:1] or [None]
        ways = sharding.mesh.shape
        names = (lead[0],) if isinstance(lead[0], str) else lead[0] or ()
        if shape[0] % math.prod(ways[name] for name in names):
            lead = [None]
        grouped = [*lead, *[None] * (len(shape) - rest - 1)]
        sharding = NamedSharding(sharding.mesh, P(*grouped, *spec[len(spec) - rest :]))
    return jax.ShapeDtypeStruct(shape, want.dtype, sharding=sharding)


def _regrouped(got: jax.Array, want: jax.ShapeDtypeStruct) -> jax.Array:
    """Groups the leading dims as wanted; the numbers keep their row-major order."""
    if got.shape == want.shape:
        return got
    where = want.sharding if isinstance(want.sharding, NamedSharding) else None
    grouped = jax.jit(lambda x: jnp.reshape(x, want.shape, out_sharding=where))(got)
    return jax.device_put(grouped, want.sharding)  # the very spec asked for, not one like it


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
