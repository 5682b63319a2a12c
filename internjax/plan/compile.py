"""Compiles a step for GPUs that are not here, in a process of its own, and keeps what came out.

`compile_step` runs where jax's CUDA plugin is; `ask` starts that process and talks to it in lines
of JSON. Knows no training: the step comes in as `build(mesh) -> (fn, args)`.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from internjax.errors import Missing, UserError
from internjax.kernels.platform import readable
from internjax.plan.topology import Gpu, target_config

type Build = Callable[[jax.sharding.Mesh], tuple[Callable, Sequence[Any]]]

OPTIONS: dict[str, Any] = {
    # XLA dies without a device to ask on some meshes ("size mismatch when packing elements").
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
    # Without a device there is no autotuning: cuBLAS calls compile fastest and read plainest.
    "xla_gpu_enable_triton_gemm": False,
}
PLUGIN = "jax_plugins.xla_cuda13"


@dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Fields:
      text: scheduled HLO of one device.
      memory: bytes of a device: argument, output, alias, temp, peak. XLA raises no error when
        the peak is beyond the GPU's memory: compare it.
      seconds: of lowering and compiling, at the time; cached: nothing was compiled now.
      key: hash of the program before XLA, the target and the options.
    """

    text: str
    memory: dict[str, int]
    seconds: float
    key: str
    cached: bool = False


def compile_step(
    build: Build, mesh: jax.sharding.Mesh, gpu: Gpu, *, cache: Path | None = None
) -> Compiled:
    """Lowers and compiles a step for the compile-only devices of `mesh` (see `topology`).

    Args:
      build: gives a function and its arguments as shapes with shardings; a function that is not
        jitted yet is jitted with its first argument donated.
      cache: folder of earlier results, by key.
    """
    start = time.perf_counter()
    fn, args = build(mesh)  # outside the mesh: what it computes would run on devices not here
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn, donate_argnums=0)
    with jax.set_mesh(mesh), readable():
        lowered = jitted.lower(*args)
    key = _key(lowered.as_text(), gpu)
    if cache and _file(cache, key).is_file():
        return replace(kept(cache, key), cached=True)
    done = lowered.compile(compiler_options=OPTIONS)
    stats = done.memory_analysis()
    names = ("argument", "output", "alias", "temp")
    memory = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in names}
    memory["peak"] = int(stats.peak_memory_in_bytes)
    result = Compiled(_bare(done.as_text()), memory, time.perf_counter() - start, key)
    if cache:
        _keep(_file(cache, key), result)
    return result


def kept(cache: Path, key: str) -> Compiled:
    """Returns an earlier result."""
    return Compiled(**json.loads(gzip.decompress(_file(cache, key).read_bytes())))


def _file(cache: Path, key: str) -> Path:
    return cache / f"{key}.json.gz"


def _key(program: str, gpu: Gpu) -> str:
    """Hashes all that decides the result."""
    parts = [jax.__version__, target_config(gpu), json.dumps(OPTIONS, sort_keys=True), program]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _bare(text: str) -> str:
    """Drops source positions: two thirds of the text, and different on each machine."""
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def _keep(path: Path, result: Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {k: v for k, v in asdict(result).items() if k != "cached"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(gzip.compress(json.dumps(record).encode(), 3))
    os.replace(temporary, path)


def plan_python(env: str = ".venv-plan") -> Path:
    """Finds an interpreter that has jax's CUDA plugin: this one, or that of `make plan-env`."""
    if _has_plugin():
        return Path(sys.executable)
    beside = Path(sys.prefix).parent / env
    for folder in (Path(env), beside):
        if (folder / "bin" / "python").is_file():
            return folder.absolute() / "bin" / "python"
    raise Missing(
        f"no environment {env} that compiles for GPUs: make plan-env (about 1.5 GB), or"
        " pip install 'internjax[aot]'."
    )


def _has_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return importlib.util.find_spec(PLUGIN) is not None


def ask(
    module: str, requests: Sequence[Mapping[str, Any]], *, python: Path
) -> Iterator[dict[str, Any]]:
    """Runs `python -m module` and yields one answer a request, in order, as they come.

    A request that kills the process (LLVM has no other way to complain) is answered with
    {"error": last words}, and the rest go to a new process.
    """
    left = list(requests)
    while left:
        answered = 0
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            with _started(module, python, errors) as process:
                try:
                    _send(process, left)
                    for line in process.stdout:
                        answered += 1
                        yield json.loads(line)
                finally:
                    process.kill()  # also when nobody asks for the rest
            if answered < len(left):
                errors.seek(0)
                yield {"error": _last_words(errors.read())}
                answered += 1
        left = left[answered:]


def answer_lines(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `ask`: answers until the input ends.

    What a user can mend is answered as {"error": ...}, the rest is a bug and ends the process.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but answers on stdout, whatever a library prints
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except UserError as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=out, flush=True)


def _started(module: str, python: Path, errors: Any) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command, env = [str(python), "-m", module], _environment()
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=errors, text=True, encoding="utf-8", env=env
    )


def _send(process: subprocess.Popen, requests: Sequence[Mapping[str, Any]]) -> None:
    try:
        process.stdin.write("".join(json.dumps(request) + "\n" for request in requests))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has died: what it wrote to stderr says why


def _environment() -> dict[str, str]:
    """The child's: CPU platform (the CUDA one looks for a driver), no flags of this process."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}


def _last_words(errors: str) -> str:
    """The line that says most about a death: an exception, else the last one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Error|error:|FATAL|fatal|Check failed", line)]
    return (telling or lines or ["the process died without a word"])[-1][:500]
