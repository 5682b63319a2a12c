"""`internjax bench kernels`: predicts the GPU kernels' times, or checks and measures them on a GPU.

Without `selftest` the kernels are compiled for sm_90a, which needs no GPU, and their times are
predicted from the code. With it values are compared with the reference first, then every kernel is
timed beside its peers.
"""

import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from internjax.errors import UserError
from internjax.kernels.case import Case
from internjax.kernels.platform import HOPPER, target
from internjax.plan.compile import ask, plan_python
from internjax.plan.kernel_time import SUSTAINED, predict
from internjax.plan.kernels import KernelReport
from internjax.plan.topology import GPUS, Gpu, gpu_named

log = logging.getLogger(__name__)

type Row = dict[str, Any]

SECONDS, ROUNDS = 0.05, 5  # a round at least; the median of so many rounds counts


def chosen(pattern: str) -> dict[str, Case]:
    """Returns the rows whose name a regular expression is found in."""
    from internjax.kernels.cases import CASES  # some seconds, which no error needs to wait for

    found = {name: case for name, case in CASES.items() if re.search(pattern, name)}
    if not found:
        raise UserError(f"cases={pattern}: no row has that in its name; rows: {', '.join(CASES)}.")
    return found


def predicted_rows(cases: dict[str, Case], gpu_name: str = "h100") -> Iterator[Row]:
    """Yields what the compiled code of each row can do; nothing runs."""
    gpu = gpu_named(gpu_name)
    requests = [{"case": name, "gpu": gpu.name} for name in cases]
    answers = ask("internjax.experiments.kernel_child", requests, python=plan_python())
    for (name, case), answer in zip(cases.items(), answers, strict=True):
        if "error" in answer:
            raise UserError(f"{name}: {answer['error']}")
        yield {"case": name} | predicted(case, [KernelReport(**k) for k in answer["kernels"]], gpu)


def predicted(case: Case, kernels: list[KernelReport], gpu: Gpu) -> Row:
    """Predicts one row: kernels one after the other, each bound by products or by memory."""
    found = {kernel.name: predict(kernel, gpu) for kernel in kernels}
    multiply = [name for name, p in found.items() if p.tensor_share is not None]
    work = case.work() if case.work else dict.fromkeys(multiply[:1], case.flops)
    if multiply:  # what XLA does beside the kernels is neither timed nor counted as done here
        case = replace(case, flops=min(case.flops, sum(work.values())))
    peak = gpu.peak_bf16_flops * case.rate
    tensor = sum(
        work.get(name, 0.0) / (found[name].tensor_share * SUSTAINED * peak) for name in multiply
    )
    memory = case.num_bytes / (min(p.hbm_share for p in found.values()) * gpu.hbm_bandwidth)
    seconds = max(tensor, memory)
    slowest = max(multiply, key=lambda name: work.get(name, 0.0), default=None)
    return {
        "microseconds": seconds * 1e6,
        "percent": 100 * ideal_seconds(case, gpu) / seconds,
        "of": bound(case, gpu),
        "limit": "memory" if memory >= tensor else found[slowest].limit,
        "blocks_per_sm": min(p.blocks_per_sm for p in found.values()),
        "registers": max(kernel.registers for kernel in kernels),
        "smem_kib": max(kernel.smem_bytes for kernel in kernels) / 1024,
        "spill_bytes": sum(kernel.spill_bytes for kernel in kernels),
    }


def ideal_seconds(case: Case, gpu: Gpu) -> float:
    """The data sheet's time: useful FLOPs at the peak or bytes at the bandwidth, the longer one."""
    products = case.flops / (gpu.peak_bf16_flops * case.rate)
    return max(products, case.num_bytes / gpu.hbm_bandwidth)


def bound(case: Case, gpu: Gpu) -> str:
    """What a percentage is of."""
    products = case.flops / (gpu.peak_bf16_flops * case.rate)
    return "peak FLOP/s" if products > case.num_bytes / gpu.hbm_bandwidth else "HBM bandwidth"


def this_gpu() -> Gpu:
    """The GPU of this process, as the data sheets know it."""
    here = target()
    if not here.hopper:
        raise UserError(
            f"selftest=true needs an sm_90 GPU ({', '.join(HOPPER)}), and this is {here.kind!r}."
            " Without selftest, times are predicted from the compiled code."
        )
    for gpu in GPUS.values():
        if gpu.name.upper() in here.kind:
            return gpu
    raise UserError(f"{here.kind!r}: no data sheet in plan/topology.py to take percentages of.")


def measured_rows(cases: dict[str, Case], gpu: Gpu) -> Iterator[Row]:
    """Yields error and times of each row on this process's GPU."""
    for name, case in cases.items():
        args = jax.jit(case.draw)(jax.random.key(0))
        run = jax.jit(case.run)
        worst = error(run(*args), jax.jit(case.reference)(*args))
        row = {"case": name, "error": worst, "ok": worst <= case.tolerance}
        seconds = timed(run, args)
        row |= {"microseconds": seconds * 1e6, "of": bound(case, gpu)}
        row["percent"] = 100 * ideal_seconds(case, gpu) / seconds
        for peer, fn in case.peers.items():
            row[peer] = peer_seconds(f"{peer}, {name}", fn, args)
        yield row


def peer_seconds(name: str, fn: Callable, args: tuple) -> float | None:
    """Times a peer; None where it says that it cannot serve the row, with its reason in the log."""
    try:
        run = jax.jit(fn).lower(*args).compile()
    except (ValueError, NotImplementedError) as reason:
        log.warning("%s is left out: %s", name, reason)
        return None
    return timed(run, args) * 1e6


def error(got: Any, want: Any) -> float:
    """Norm of the error over the norm of the reference, of the worst result."""

    def one(a: Any, b: Any) -> float:
        a, b = (np.asarray(x, np.float32).ravel() for x in (a, b))
        size = float(np.linalg.norm(b)) or 1.0
        apart = float(np.linalg.norm(a - b)) / size
        return apart if math.isfinite(apart) else math.inf

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(one(a, b) for a, b in pairs)


def timed(run: Callable, args: tuple) -> float:
    """Seconds of a call when calls are queued one behind the other; median of the rounds."""
    jax.block_until_ready(run(*args))

    def of_round(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            out = run(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - begin

    times = max(1, math.ceil(SECONDS / of_round(3) * 3))
    return statistics.median(of_round(times) / times for _ in range(ROUNDS))


def lines(rows: list[Row]) -> Iterator[str]:
    """Writes a line for each row below a line of names; what is no text stands to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(rows[0].get(name), str) for name in columns]
    for line in cells:
        parts = zip(line, widths, left, strict=True)
        yield "  ".join(f"{c:{'<' if l else '>'}{w}}" for c, w, l in parts).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.1 else f"{value:,.1f}"
    return str(value)
