"""Extraction in processes of its own, where a poisonous document can do no harm.

One child serves many documents; when one takes too long, too much memory or crashes the child, the
child dies, the document gets a reason, and the next document gets a new child. The child is started
as a program (not forked: the parent may hold JAX's threads) and talks in lines of JSON.
"""

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from internjax.data.extract import Extracted, ExtractError, Limits, extract_file

GRACE_SECONDS = 5  # the child's own alarm, should the parent be gone
START_SECONDS = 60  # importing the libraries on a busy machine does not count against a document


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `extracted`, or `reason` and `detail` for the quarantine."""

    path: Path
    extracted: Extracted | None = None
    mime: str = ""
    sha256: str = ""
    reason: str = ""
    detail: str = ""


def extract_all(
    paths: Sequence[Path], *, limits: Limits | None = None, workers: int = 2
) -> Iterator[Outcome]:
    """Extracts files in `workers` children; outcomes come in the order of `paths`."""
    limits = limits or Limits()
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    count = max(1, min(workers, len(paths)))
    all_children = [Child(limits) for _ in range(count)]
    for child in all_children:
        children.put(child)

    def one(path: Path) -> Outcome:
        child = children.get()
        try:
            return child.extract(path)
        finally:
            children.put(child)

    pool = ThreadPoolExecutor(count)
    try:
        yield from pool.map(one, paths)
    finally:
        pool.shutdown(cancel_futures=True)
        for child in all_children:
            child.stop()


class Child:
    """One extracting process, started when first needed and again after it has died."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.process: subprocess.Popen | None = None

    def extract(self, path: Path) -> Outcome:
        """Extracts one file; every way to fail is an outcome with a reason."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            self.process.stdin.flush()
            line = self._read(self.limits.seconds)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.stop()
            return Outcome(path, reason="timeout", detail=f"more than {self.limits.seconds:g} s")
        if not line:
            code = self.process.wait()
            self.stop()
            return Outcome(path, reason="crash", detail=f"the extractor ended with {_name(code)}")
        answer = json.loads(line)
        if answer.pop("last", False):
            self.stop()
        extracted = answer.pop("extracted", None)
        return Outcome(path, extracted and Extracted(**extracted), **answer)

    def stop(self) -> None:
        """Ends the child, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):  # a path that the dead child never read
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "internjax.data.extract.child", json.dumps(asdict(self.limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries complain about documents; we give the reasons
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        try:
            ready = self._read(START_SECONDS)
        except TimeoutError:
            ready = b""
        if not ready:
            self.stop()
            raise RuntimeError(
                "the extracting process did not start: try it by hand with "
                "`python -m internjax.data.extract.child '{}'`"
            )

    def _read(self, seconds: float) -> bytes:
        """Reads one line of the child's answer, b"" when it is dead, TimeoutError when late."""

        deadline, parts = time.monotonic() + seconds, []
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(self.process.stdout.fileno(), 2**16)
                if not part:
                    return b""
                parts.append(part)
        return b"".join(parts)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(limits: Limits, requests: IO[bytes], answers: IO[bytes]) -> None:
    """The child's whole life: paths in, outcomes out."""
    _confine(limits)
    answers.write(b'"ready"\n')
    answers.flush()
    for line in requests:
        # Should the parent die while we hang, nobody else would end us.
        signal.alarm(int(limits.seconds) + GRACE_SECONDS)
        answer = _answer(Path(json.loads(line)), limits)
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer.get("last"):
            return


def _answer(path: Path, limits: Limits) -> dict:
    """Extracts one file; this is the border where every error of a library becomes a reason."""
    try:
        extracted, mime, sha256 = extract_file(path, limits)
        return {"extracted": asdict(extracted), "mime": mime, "sha256": sha256}
    except ExtractError as error:
        return {"reason": error.reason, "detail": error.detail}
    except (MemoryError, RecursionError):
        # After this the heap is in an unknown state: answer once and make room for a fresh child.
        return {"reason": "memory", "detail": f"over {limits.memory_bytes:,} bytes", "last": True}
    except OSError as error:
        return {"reason": "unreadable", "detail": error.strerror or str(error)}
    except Exception as error:
        return {"reason": "corrupt", "detail": f"{type(error).__name__}: {error}"[:500]}


def _confine(limits: Limits) -> None:
    """Loads the libraries, then limits memory; core files and new files are never wanted."""
    import resource

    import pypdfium2  # noqa: F401
    import trafilatura  # noqa: F401

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # macOS accepts the call and ignores it
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))


if __name__ == "__main__":
    # Answers go to a private copy of standard output: a library that prints cannot garble them.
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(Limits(**json.loads(sys.argv[1])), sys.stdin.buffer, private)
