"""The compiling process of `make kernel-check`: a JSON request a line in, an answer a line out.

Runs in the environment that has jax's CUDA plugin. A request names a row of `kernels/cases.py` and
a GPU of `plan/topology.py`.
"""

import time
from dataclasses import asdict
from typing import Any

from internjax.errors import UserError
from internjax.kernels.cases import CASES
from internjax.plan.compile import answer_lines
from internjax.plan.kernels import compile_kernels
from internjax.plan.topology import gpu_named


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles one row."""
    if request["case"] not in CASES:
        raise UserError(f"case={request['case']}: legal are {', '.join(CASES)}.")
    case, start = CASES[request["case"]], time.perf_counter()
    done = compile_kernels(case.run, case.shapes(), gpu_named(request["gpu"]))
    kernels = [asdict(kernel) for kernel in done.kernels]
    seconds = time.perf_counter() - start
    return {"kernels": kernels, "temp_bytes": done.temp_bytes, "seconds": seconds}


if __name__ == "__main__":
    answer_lines(answer)
