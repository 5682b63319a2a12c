"""The servers that `serve_peers.py` and `outside_clients.py` start: how each is run and held still.

Every server gets both of the same things: all processors, and room for 16 requests of 1,024 tokens.
One that is not being measured is stopped by a signal (SIGSTOP), so that it cannot take processor
time from the one that is.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-serve-peers" / "bin"
SLOTS, CONTEXT = 16, 1024
MODEL = "model"  # the name by which every server knows it
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
VLLM = OFFLINE | {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 16 x 1,024 tokens of SmolLM2 take 0.4 in bfloat16
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else it computes with all processors but one
}


@dataclass(frozen=True)
class Server:
    """How a server is started; `{port}` in its words becomes the port."""

    name: str
    words: tuple[str | Path, ...]
    env: dict[str, str] = field(default_factory=dict)

    def missing(self) -> bool:
        """Whether its program is not installed."""
        return not Path(self.words[0]).is_file()


def ours(
    name: str, model: str | Path, dtype: str = "float32", kv: str = "float32", *more: str
) -> Server:
    """`internjax serve` with everything compiled before the first request; `more` are settings."""
    words = [sys.executable, "-m", "internjax.cli", "serve", str(model), "serve.port={port}"]
    words += [f"serve.name={MODEL}", f"dtype={dtype}", "serve.warmup=true"]
    words += [f"serve.engine.slots={SLOTS}", f"serve.engine.context={CONTEXT}"]
    return Server(name, (*words, f"serve.engine.kv_dtype={kv}", *more))


def vllm(dtype: str, folder: Path) -> Server:
    """vLLM on CPU as it comes: compiled, prefix cache and chunked prefill on."""
    words = ["serve", folder, "--served-model-name", MODEL, "--host", "127.0.0.1"]
    words += ["--port", "{port}", "--dtype", dtype, "--max-model-len", str(CONTEXT)]
    words += ["--max-num-seqs", str(SLOTS)]
    return Server(f"vllm-{dtype}", (PEERS / "vllm", *words), VLLM)


def llama(gguf: Path) -> Server:
    """llama.cpp's own server on the GGUF file, continuous batching on."""
    words = ["-m", gguf, "--alias", MODEL, "--host", "127.0.0.1", "--port", "{port}"]
    words += ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", str(os.cpu_count())]
    return Server("llama.cpp", (PEERS / "llama-server", *words))


class Running:
    """A started server: a process group of its own that can be held still and ended."""

    def __init__(self, server: Server, log: Path):
        self.server, self.log = server, log
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        words = [str(word).replace("{port}", str(self.port)) for word in server.words]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | server.env
        if server.env:  # a peer's Python must not see ours
            env.pop("PYTHONPATH")
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=out, env=env, start_new_session=True
            )

    def wait_ready(self, seconds: float = 600) -> bool:
        """Waits until /health says 200; False where the server has died or the time is up."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if self._healthy():
                return True
            time.sleep(0.2)
        return False

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def pause(self) -> None:
        """Holds it still."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ends it and what it has started."""
        for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                self.resume()
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


@contextlib.contextmanager
def running(servers: list[Server], folder: Path) -> Iterator[dict[str, Running]]:
    """Starts servers one after the other, each held still when ready; skips what does not run."""
    started: dict[str, Running] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no server outlives this process
    try:
        for server in servers:
            if server.missing():
                print(
                    f"MISSING {server.name}: no {server.words[0]}; `make serve-peers`", flush=True
                )
                continue
            begin = time.monotonic()
            one = started[server.name] = Running(server, folder / f"{server.name}.log")
            if one.wait_ready():
                print(f"READY {server.name} after {time.monotonic() - begin:.1f} s", flush=True)
                one.pause()
            else:
                print(f"MISSING {server.name}: {one.last_words()}", flush=True)
                started.pop(server.name).stop()
        yield started
    finally:
        for one in started.values():
            one.stop()
