"""Files that appear whole or not at all: written beside their place, synced, then renamed.

A process killed at any moment leaves only names that begin with `.partial-`, which no reader takes.
"""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial-"


@contextmanager
def write_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file that takes the name `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"
    try:
        with open(partial, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the name `path`, replacing what was there, at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        _exchange(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line, whole or not at all; returns the number of lines."""
    count = 0
    with write_whole(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, indented, whole or not at all."""
    with write_whole(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    owner = f"{os.getpid()}@{socket.gethostname()}"
    return path.parent / f"{PARTIAL}{path.name}-{secrets.token_hex(4)}-{owner}"


def _sweep(path: Path) -> None:
    """Removes what killed processes of this machine left beside a folder."""
    for left in path.parent.glob(f"{PARTIAL}{path.name}-*@{socket.gethostname()}"):
        pid = int(left.name.rpartition("@")[0].rpartition("-")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(left)
        except PermissionError:  # alive, somebody else's
            continue


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _exchange(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a full folder there steps aside first and is then removed."""
    if path.exists() and any(path.iterdir()):
        aside = _beside(path)
        os.rename(path, aside)
        os.rename(new, path)
        shutil.rmtree(aside)
    else:
        os.rename(new, path)  # onto nothing or onto an empty folder: atomic
