"""Runs code in the real Python inside bubblewrap: own namespaces, filtered calls, hard limits.

The confined process sees a read-only interpreter, its libraries and numpy, a small writable working
directory in memory, and nothing else: no home, no /proc, no network (not even the host's loopback),
no environment variables, no other process. It can make threads but no processes, so the limits
on one process are limits on the run. When its parent dies the kernel kills it.
"""

import functools
import importlib.util
import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from internjax.errors import Missing
from internjax.sandbox import seccomp
from internjax.sandbox.result import Limits, SandboxResult

NAME = "bubblewrap"
WORK_BYTES = 16 << 20
_REPORT_BYTES = 1 << 20


@functools.cache
def why_not() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if shutil.which("bwrap") is None:
        return "not installed (apt install bubblewrap)"
    if not seccomp.supported():
        return "its system call filter is written for x86_64 and aarch64 only"
    try:
        result = run("40 + 2", Limits(30.0, 256 << 20, 1 << 10))
    except Missing as error:
        return str(error)
    return None if result.value == "42" else f"does not work: {result.error or result.value}"


def run(code: str, limits: Limits) -> SandboxResult:
    """Runs code in a fresh sandbox.

    Raises:
        Missing: bubblewrap could not build the confinement; the code has not run.
    """
    request = json.dumps(
        {
            "code": code,
            "limits": _resource_limits(limits),
            "value_chars": limits.output_bytes,
        }
    )
    with tempfile.TemporaryFile() as rules, tempfile.TemporaryFile() as asked:
        rules.write(seccomp.program())
        rules.seek(0)
        asked.write(request.encode("utf-8", "surrogatepass") + b"\n")
        asked.seek(0)
        process = subprocess.Popen(
            _command(rules.fileno()),
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            pass_fds=(rules.fileno(),),
        )
        try:
            stdout, report, stopped = _read(process, limits)
        finally:
            process.kill()  # bubblewrap's death takes the whole process namespace with it
            process.wait()
            process.stdout.close()
            process.stderr.close()
    return _result(stdout, report, stopped, process.returncode, limits)


def _read(process: subprocess.Popen, limits: Limits) -> tuple[bytes, bytes, str | None]:
    """Collects output and report until both end or a limit is passed; never holds more."""
    deadline = time.monotonic() + limits.timeout_seconds
    pieces = {process.stdout: b"", process.stderr: b""}
    room = {process.stdout: limits.output_bytes, process.stderr: _REPORT_BYTES}
    with selectors.DefaultSelector() as selector:
        for stream in pieces:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return *pieces.values(), f"Timeout: stopped after {limits.timeout_seconds:g} s"
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                pieces[key.fileobj] += chunk
                if len(pieces[key.fileobj]) > room[key.fileobj]:
                    said = f"OutputLimit: stopped after {limits.output_bytes} bytes of output"
                    return *pieces.values(), said
    process.wait()
    return *pieces.values(), None


def _result(
    stdout: bytes, report: bytes, stopped: str | None, code: int, limits: Limits
) -> SandboxResult:
    ready, _, said = report.partition(b"ready\n")
    if ready or (not stopped and not report.startswith(b"ready\n")):
        # bubblewrap or the interpreter spoke before the code's turn came.
        lines = report.decode("utf-8", "replace").strip().splitlines()
        raise Missing(f"bwrap failed: {lines[-1] if lines else f'exit code {code}'}")
    limit = limits.output_bytes
    shown = stdout[:limit].decode("utf-8", "replace")
    flooded = len(stdout) > limit
    if stopped:
        return SandboxResult(shown, None, stopped, NAME, truncated=flooded)
    try:
        answer = json.loads(said.splitlines()[0])
        value, error, cut = answer["value"], answer["error"], bool(answer["cut"])
    except (IndexError, KeyError, TypeError, ValueError):
        # The code can write to its own report or die before it: that is its loss only.
        value, error, cut = None, f"Crashed: the process ended with code {code}", False
    value, error = (None if text is None else str(text)[:limit] for text in (value, error))
    return SandboxResult(shown, value, error, NAME, truncated=flooded or cut)


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(limits.timeout_seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": WORK_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }


def _command(rules_fd: int) -> list[str]:
    """The bwrap call: everything is refused first, then what Python needs is bound read-only."""
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    options += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
    options += ["--hostname", "sandbox", "--seccomp", str(rules_fd)]
    for path in _readable():
        if path.is_symlink():  # /lib -> usr/lib on merged systems
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    for package in _numpy_folders():
        options += ["--ro-bind", str(package), f"/packages/{package.name}"]
    options += ["--dev-bind", "/dev/null", "/dev/null"]
    options += ["--size", str(WORK_BYTES), "--perms", "0777", "--tmpfs", "/work"]
    options += ["--remount-ro", "/", "--chdir", "/work"]
    # Each thread of a BLAS pool would reserve address space the code could not use.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        options += ["--setenv", name, "1"]
    options += ["--setenv", "HOME", "/work", "--setenv", "LC_ALL", "C.UTF-8"]
    return ["bwrap", *options, "--", str(_interpreter()), "-I", "-S", "-B", "-c", _child()]


@functools.cache
def _child() -> str:
    return Path(__file__).with_name("child.py").read_text(encoding="utf-8")


def _interpreter() -> Path:
    """The interpreter itself, not the link to it in a virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _readable() -> list[Path]:
    """The interpreter, its standard library and the system's shared libraries."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [Path(p) for p in ("/usr/lib", "/usr/lib64", "/lib", "/lib64") if Path(p).exists()]
    paths.append(_interpreter())
    shared = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    paths += sorted(shared.glob(f"libpython{sys.version_info.major}.*.so*"))
    # Not "platstdlib": in a virtual environment that is its own folder, with all that is installed.
    native = Path(sysconfig.get_config_var("DESTSHARED") or stdlib)
    for folder in (stdlib, native):
        if folder.exists() and not any(folder.is_relative_to(path) for path in paths):
            paths.append(folder)
    return paths


def _numpy_folders() -> list[Path]:
    found = importlib.util.find_spec("numpy")
    if found is None or not found.origin:
        return []
    home = Path(found.origin).parent
    return [path for path in (home, home.parent / "numpy.libs") if path.is_dir()]
