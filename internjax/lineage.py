"""Artefacts: folders that carry a `card.json` telling what made them, from what, with what result.

An artefact lives in `store/<key>`, where the key is a hash of its kind, code version, resolved
config and inputs; so the same work is never done twice, and what is there is whole (it was renamed
into place at the end). Imports no JAX and knows no stage.
"""

import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from internjax.errors import Corrupt, Missing, UserError
from internjax.version import __version__

log = logging.getLogger(__name__)

CARD = "card.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


@dataclass(frozen=True)
class Artefact:
    """A whole folder of the store."""

    path: Path
    key: str  # sha256, in hexadecimal: the folder's name
    card: dict[str, Any]
    reused: bool = False  # it was there already: nothing was made

    @property
    def sha256(self) -> str:
        """Hash of the content, equal to `hash_path(self.path)` but read from the card."""
        return _hash_json(self.card["outputs"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What its maker measured."""
        return self.card["metrics"]


def produce(
    store: Path,
    kind: str,
    *,
    config: Any,
    inputs: Mapping[str, Artefact | Path],
    make: Callable[[Path], Mapping[str, Any] | None],
    code_version: str = "1",
    reuse: bool = True,
    verify: bool = False,
    out: Path | None = None,
) -> Artefact:
    """Makes an artefact, or finds the one made before from the same things.

    `make` fills the empty folder it is given and returns its metrics. A crash at any moment leaves
    no folder that could be taken for a whole one; `sweep` removes the remains.

    Args:
        config: mapping or dataclass of JSON values; all of it is part of the key.
        inputs: artefacts (or paths inside one) and, as paths, files and folders from outside the
            store: these are the declared sources.
        code_version: raise it when the code makes something else from the same config.
        reuse: False makes it again even if it is there.
        verify: also reads all files of an artefact found, and makes it again if one has changed.
        out: the folder to make instead of `store/<key>`; one that holds anything else is refused.
    """
    store = Path(store)
    config = canonical(config, "config")
    sources = {name: _describe(store, value) for name, value in sorted(inputs.items())}
    key = _key(kind, code_version, config, sources)
    final = store / key if out is None else Path(out)
    if out is not None:
        _check_free(final, key)
    if reuse and (found := _find(final, verify=verify)):
        log.info("skipped %s %s: made before from the same config and inputs", kind, key[:12])
        return dataclasses.replace(found, reused=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final.parent)
    temporary.mkdir()
    try:
        started = time.perf_counter()
        metrics = make(temporary)
        assert not (temporary / CARD).exists(), f"make of {kind} wrote {CARD}: that name is ours"
        card = {
            "kind": kind,
            "key": key,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code_version": code_version,
            "inputs": sources,
            "outputs": _hash_files(temporary),
            "config": config,
            "versions": versions(),
            "metrics": canonical(metrics or {}, "metrics", finite=False),
            "seconds": round(time.perf_counter() - started, 3),
        }
        (temporary / CARD).write_text(_pretty(card), encoding="utf-8")
        _sync_tree(temporary)
        return _publish(temporary, final, card, reuse=reuse)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left in {final.parent}: the unfinished {kind} was removed"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a rename there is nothing to remove


def artefact_key(
    store: Path,
    kind: str,
    *,
    config: Any,
    inputs: Mapping[str, Artefact | Path],
    code_version: str = "1",
) -> str:
    """The key that `produce` would use, to name scratch space that outlives a crash."""
    sources = {name: _describe(Path(store), value) for name, value in sorted(inputs.items())}
    return _key(kind, code_version, canonical(config, "config"), sources)


def load_artefact(path: Path, *, verify: bool = False) -> Artefact:
    """Reads an artefact's card; `verify` reads all its files too.

    Raises:
        Missing: no card, or a file named in it is gone.
        Corrupt: the card cannot be read, or (`verify`) a file has changed.
    """
    path = Path(path)
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
        artefact = Artefact(path, card["key"], card)
        outputs = card["outputs"].items()
    except FileNotFoundError:
        raise Missing(f"{path} has no {CARD}: it is no artefact, or not a whole one") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{path / CARD} cannot be read ({error}): remove {path}") from None
    for name, sha256 in outputs:
        if not (path / name).is_file():
            raise Missing(f"{path / name} is gone, though the card names it: remove {path}")
        if verify and _sha256(path / name) != sha256:
            raise Corrupt(f"{path / name} was changed after it was made: remove {path}")
    return artefact


def is_whole(path: Path) -> bool:
    """Tells whether `produce` would find a whole artefact in this folder."""
    return _find(Path(path), verify=False) is not None


def verify_chain(cards: Iterable[Mapping[str, Any]]) -> None:
    """Checks that every card's inputs are outputs of earlier cards or declared sources.

    Raises:
        Corrupt: names the card, the input and what is wrong with it.
    """
    earlier: dict[str, Mapping[str, str]] = {}  # key -> outputs
    for card in cards:
        for name, used in card["inputs"].items():
            if used["key"] is None:
                continue  # a declared source, bound by its hash
            where = f"input {name!r} of {card['kind']} {card['key'][:12]}"
            if used["key"] not in earlier:
                raise Corrupt(f"{where} is artefact {used['key'][:12]}, which no earlier card made")
            if _hash_member(earlier[used["key"]], used["member"]) != used["sha256"]:
                raise Corrupt(f"{where} is not what {used['key'][:12]} put out: hashes differ")
        if _key_of(card) != card["key"]:
            raise Corrupt(f"card {card['key'][:12]} was edited: its key does not fit its content")
        earlier[card["key"]] = card["outputs"]


def sweep(store: Path) -> list[Path]:
    """Removes the remains of processes of this machine that ended without cleaning up."""
    removed = []
    for path in Path(store).glob(f".tmp-[0-9]*-*@{socket.gethostname()}"):
        pid = int(path.name.split("-")[1])
        if not _alive(pid):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def hash_path(path: Path) -> str:
    """sha256 of a file's bytes, or of a folder's file names and bytes; the card apart.

    Independent of order, dates and permissions. A file's hash is what `sha256sum` prints.
    """
    path = Path(path)
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        raise Missing(f"{path} does not exist, so it cannot be an input")
    return _hash_json(_hash_files(path))


def canonical(value: Any, where: str = "value", *, finite: bool = True) -> Any:
    """`value` as plain JSON: dataclasses become dicts, tuples lists, paths and numbers plain.

    Args:
        finite: refuse NaN and infinity (config); otherwise they become null (metrics).

    Raises:
        ValueError: names the path of what JSON cannot say.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where} has the key {wrong[0]!r}: keys must be strings")
        return {k: canonical(v, f"{where}/{k}", finite=finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v, f"{where}/{i}", finite=finite) for i, v in enumerate(value)]
    if isinstance(value, PurePath):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of NumPy or JAX
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        if finite:
            raise ValueError(f"{where} is {value}: it must be finite")
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}: JSON has no such value")


def versions() -> dict[str, str]:
    """Versions of what the result may depend on; packages that are not installed are left out."""
    found = {"internjax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform()}


def _describe(store: Path, value: Artefact | Path) -> dict[str, Any]:
    """An input as its card entry: hash, key and member of the artefact it is (part of), path."""
    if isinstance(value, Artefact):
        return {"sha256": value.sha256, "key": value.key, "member": "", "path": value.key}
    path = Path(value)
    sha256 = hash_path(path)
    owner = _owner(path)
    if owner is None:
        relative = Path(os.path.relpath(path, store)).as_posix()
        return {"sha256": sha256, "key": None, "member": "", "path": relative}
    member = path.resolve().relative_to(owner.path.resolve()).as_posix()
    member = "" if member == "." else member
    inside = f"{owner.key}/{member}".rstrip("/")
    return {"sha256": sha256, "key": owner.key, "member": member, "path": inside}


def _check_free(out: Path, key: str) -> None:
    """Refuses a folder with anything in it but the artefact of `key`: nothing is overwritten."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if (out / CARD).is_file() and load_artefact(out).key == key:
            return
        raise UserError(f"{out}: is there already and not empty; remove it or name another out=.")


def _temporary(store: Path) -> Path:
    """A name that says who is at work, for `sweep`; "@" is in no host's name."""
    return store / f".tmp-{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}"


def _owner(path: Path) -> Artefact | None:
    """The artefact that `path` is or lies in: nobody may smuggle one in as a source."""
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if len(folder.name) == 64 and (folder / CARD).is_file():
            return load_artefact(folder)
    return None


def _find(path: Path, *, verify: bool) -> Artefact | None:
    """The whole artefact at `path`; None if there is none or (said in the log) it is damaged."""
    if not path.exists():
        return None
    try:
        return load_artefact(path, verify=verify)
    except (Missing, Corrupt) as error:
        log.warning("making %s again: %s", path.name[:12], error)
        return None


def _publish(temporary: Path, final: Path, card: dict, *, reuse: bool) -> Artefact:
    """Renames a finished folder into place, whatever lies there already."""
    for _ in range(3):
        try:
            os.rename(temporary, final)  # atomic; refuses a folder that is not empty
        except OSError:
            if not final.exists():
                raise
            # Another process was faster, or we are here to replace it.
            if reuse and (found := _find(final, verify=True)):
                return dataclasses.replace(found, reused=True)
            aside = _temporary(final.parent)
            os.rename(final, aside)
            shutil.rmtree(aside)
            continue
        _sync(final.parent)
        return Artefact(final, card["key"], card)
    raise RuntimeError(f"{final} keeps coming back: other processes are making it again too")


def _key(kind: str, code_version: str, config: Any, sources: Mapping[str, Mapping]) -> str:
    """Where an input lies is no part of the key, only what it holds."""
    hashes = {name: source["sha256"] for name, source in sources.items()}
    return _hash_json(
        {"kind": kind, "code_version": code_version, "config": config, "inputs": hashes}
    )


def _key_of(card: Mapping[str, Any]) -> str:
    return _key(card["kind"], card["code_version"], card["config"], card["inputs"])


def _hash_member(outputs: Mapping[str, str], member: str) -> str:
    """`hash_path` of a file or folder inside an artefact, from its card's outputs alone."""
    if not member:
        return _hash_json(outputs)
    if member in outputs:
        return outputs[member]
    below = f"{member}/"
    return _hash_json({n.removeprefix(below): s for n, s in outputs.items() if n.startswith(below)})


def _hash_files(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below `folder`, the card at its top apart."""
    hashes = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() and (path.is_dir() or not path.exists()):
                raise ValueError(f"{path} is a link to a folder or to nothing: use the real files")
            if name in names and relative != CARD:
                hashes[relative] = _sha256(path)
    return dict(sorted(hashes.items()))


def _sha256(path: Path) -> str:
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _pretty(card: Mapping[str, Any]) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _sync_tree(folder: Path) -> None:
    """Flushes every file and folder to the disk, the folder itself last."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives and belongs to somebody else
        return True
    return True
