"""The compiling process of `make kernel-check`: a JSON request a line in, an answer a line out.

Runs in the environment that has jax's CUDA plugin. A request names a row of `kernels/cases.py` or a
step of `kernel_steps.py`, and a GPU of `plan/topology.py`.
"""

import time
from dataclasses import asdict
from typing import Any

from internjax.errors import UserError
from internjax.experiments.kernel_steps import STEPS, Step, float_copies_in, weight_sizes
from internjax.kernels.cases import CASES
from internjax.plan.compile import answer_lines
from internjax.plan.kernels import compile_kernels, compile_program
from internjax.plan.topology import Gpu, gpu_named


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles one row or step."""
    name, gpu, start = request["case"], gpu_named(request["gpu"]), time.perf_counter()
    if name in STEPS:
        found = compiled_step(STEPS[name], gpu)
    elif name in CASES:
        done = compile_kernels(CASES[name].run, CASES[name].shapes(), gpu)
        kernels = [asdict(kernel) for kernel in done.kernels]
        found = {"kernels": kernels, "temp_bytes": done.temp_bytes}
    else:
        raise UserError(f"case={name}: legal are {', '.join([*CASES, *STEPS])}.")
    return found | {"seconds": time.perf_counter() - start}


def compiled_step(step: Step, gpu: Gpu) -> dict[str, Any]:
    """Kernels by how often they are called, and floats as large as a quantized weight."""
    sizes: set[int] = set()

    def build() -> tuple:
        fn, args = step.build()
        sizes.update(weight_sizes(args))
        return fn, args

    calls, temp_bytes, text = compile_program(build, gpu)
    copies = list(float_copies_in(text, sizes))
    return {"calls": calls, "temp_bytes": temp_bytes, "copies": copies}


if __name__ == "__main__":
    answer_lines(answer)
