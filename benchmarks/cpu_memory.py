"""Resident memory of serving a 4-bit model on the CPU, beyond that of an idle JAX process.

    .venv/bin/python benchmarks/cpu_memory.py [MODEL]

Two processes one after the other: one jits x + 1 and stays; the other loads the model, makes room
for 64 MiB of keys and values, prefills 512 tokens and decodes 8. Like the server it keeps compiled
programs on disk; the first run compiles and takes more. Prints

    MEMORY idle MiB, serving MiB (at most), difference MiB (at most)

where "at most" is the highest the process ever was, loading and compiling included. The goal for
SmolLM2-135M (Q4_1) is a difference below 350 MiB.
"""

import subprocess
import sys
from pathlib import Path

KV_BYTES = 64 * 2**20


def resident() -> tuple[float, float]:
    """Returns this process's resident MiB now and at most (Linux, man proc_pid_status)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def idle(_: str) -> None:
    """What every JAX program takes."""
    import jax

    jax.jit(lambda x: x + 1)(1).block_until_ready()


def serve(name: str) -> None:
    """What a server takes after a long prompt."""
    import numpy as np

    from internjax.experiments.compilation_cache import enable_compilation_cache
    from internjax.models.lm import SamplingParams
    from internjax.models.load import load
    from internjax.serve.engine import Engine, EngineConfig

    enable_compilation_cache()
    model = load(name, packed=True)
    cfg = model.cfg
    per_token = 2 * 4 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    context = min(KV_BYTES // per_token // 128 * 128, 2048)
    engine = Engine(
        model, EngineConfig(slots=max(1, KV_BYTES // per_token // context), context=context)
    )
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, 512).tolist()
    engine.submit(prompt, SamplingParams(max_tokens=8, ignore_eos=True), lambda _: None)
    while engine.step():
        pass


def main(args: list[str]) -> int:
    """Runs one of the two, or both in processes of their own."""
    what = {"idle": idle, "serve": serve}
    name = args[-1] if args else "smollm2-135m-instruct"
    if args and args[0] in what:
        what[args[0]](name)
        print(*resident())
        return 0
    figures = []
    for each in what:
        done = subprocess.run(
            [sys.executable, __file__, each, name], capture_output=True, text=True, check=True
        )
        figures.append([float(x) for x in done.stdout.split()[-2:]])
    (base, _), (now, most) = figures
    print(f"MEMORY idle {base:.0f}, serving {now:.0f} ({most:.0f}), ", end="")
    print(f"difference {now - base:.0f} ({most - base:.0f}) MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
