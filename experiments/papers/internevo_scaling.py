"""Predicts InternEvo's published A100 table from compiled programs, and says how far off it is.

`python -m internjax.experiments.papers.internevo_scaling`

The table: 7B, sequence 2048, tokens/s/GPU on 8 to 1,024 A100-SXM4-80GB with 4 x 100 Gb/s RoCE a
node (InternLM/InternEvo, doc/en/train_performance.md). Three constants are fitted on four cells,
the other 28 are predicted.
"""

import itertools
import statistics
import sys
from dataclasses import asdict, dataclass, replace

from internjax.errors import UserError
from internjax.experiments.plan import PlanConfig, answers, compiled_of, plan_of, request
from internjax.mesh import MeshConfig
from internjax.models.internlm import config
from internjax.plan.estimate import Constants, Machine, collective_seconds, timeline
from internjax.plan.hlo import Collective, Program, read
from internjax.plan.memory import Work
from internjax.plan.present import mesh_words
from internjax.plan.record import Plan
from internjax.plan.scaling import at_size, resized, sizes
from internjax.plan.search import candidates
from internjax.plan.topology import gpu_named
from internjax.telemetry import work_of

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Tokens/s/GPU, no recomputation. Source: InternEvo's performance page (see above).
PUBLISHED = {
    "tp1 zero1=8": (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625),
    "tp1 zero1=-1": (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271),
    "tp2 zero1=-1": (3822, 3595, 3475, 3438, 3308, 3094, 2992, 2785),
    "tp2 zero1=4": (3761, 3658, 3655, 3650, 3651, 3653, 3589, 3486),
}
FITTED = [(row, gpus) for row in ("tp1 zero1=8", "tp1 zero1=-1") for gpus in (8, 64)]
LENGTH, TOKENS_PER_GPU = 2048, 16384  # 2 x 4 micro-batches of rows, or 4 x 4 on two GPUs
NIC = 100e9 / 8 * 4 / 8  # bytes/s: four adapters of 100 Gb/s for eight GPUs
MATMULS = (
    TOKENS_PER_GPU
    * work_of(config("internlm-7b"), length=LENGTH, remat=0.0, devices=1, device="").model_flops
)  # FLOPs of a GPU and step
LARGEST = ("tp1 zero1=-1", 1024)
DATA_AXES = {"data", "fsdp"}

type Cell = tuple[str, int]


@dataclass(frozen=True)
class Fit:
    """What is fitted: share of the peak that the matmuls reach, seconds a hop between nodes (of
    the starting of messages, too), share of the data-parallel communication that is hidden."""

    gemm_rate: float
    hop_seconds: float
    overlap: float


def case(row: str, gpus: int) -> tuple[MeshConfig, Work]:
    """The mesh and the batch of a cell."""
    tensor = int(row[2])
    data, group = gpus // tensor, 8 // tensor
    mesh = MeshConfig(data=data, tensor=tensor, zero=1, zero_group=group if "-1" not in row else 0)
    rows = TOKENS_PER_GPU // LENGTH * tensor
    return mesh, Work(rows * data, LENGTH, micro_batches=4, remat=0.0, reduce_dtype="bfloat16")


def machine(hop_seconds: float) -> Machine:
    """InternEvo's cluster."""
    gpu = replace(gpu_named("a100-80"), nic_bandwidth=NIC)
    return Machine(gpu, 8, replace(Constants(), nic_hop_seconds=hop_seconds))


def step_seconds(program: Program, fit: Fit) -> float:
    """Seconds of a step: all matmuls at one rate, tensor collectives in full, the rest in part.

    InternEvo hides data-parallel communication behind its own backward pass, so the windows of
    our schedule are not used here; and it has fused attention, so the matmuls are those of the
    model (as the step log counts them), without what XLA recomputes to make room for scores.
    """
    there = machine(fit.hop_seconds)
    hidden = whole = 0.0
    for times, step in program.walk():
        if isinstance(step, Collective):
            seconds = times * collective_seconds(step, there)
            if set(step.axes.split("+")) & DATA_AXES:
                hidden += seconds
            else:
                whole += seconds
    compute = MATMULS / (there.gpu.peak_bf16_flops * fit.gemm_rate)
    return compute + whole + (1 - fit.overlap) * hidden


def rate(program: Program, fit: Fit) -> float:
    """Tokens/s/GPU."""
    return TOKENS_PER_GPU / step_seconds(program, fit)


def fitted(programs: dict[Cell, Program]) -> Fit:
    """Least squares of the relative error over the four cells, on a grid."""
    best, least = None, float("inf")
    for overlap, hop in itertools.product(
        [i / 50 for i in range(51)], [1e-6 * 1.1**i for i in range(100)]
    ):
        # At each point the matmul rate that gives the first cell exactly.
        one = Fit(1.0, hop, overlap)
        first = programs[FITTED[0]]
        seconds = TOKENS_PER_GPU / PUBLISHED["tp1 zero1=8"][0]
        matmuls = MATMULS / machine(hop).gpu.peak_bf16_flops
        left = seconds - (step_seconds(first, one) - matmuls)
        if left <= matmuls:
            continue
        guess = Fit(matmuls / left, hop, overlap)
        error = sum(relative(programs, cell, guess) ** 2 for cell in FITTED)
        if error < least:
            best, least = guess, error
    if best is None:
        raise UserError("no constants explain the four cells: communication alone takes longer.")
    return best


def relative(programs: dict[Cell, Program], cell: Cell, fit: Fit) -> float:
    """Relative error of a cell, signed: positive where too fast is predicted."""
    row, gpus = cell
    return rate(programs[cell], fit) / PUBLISHED[row][GPUS.index(gpus)] - 1


def all_programs() -> dict[Cell, Program]:
    """Compiles InternLM-7B's step on 64 GPUs for every row; the other sizes differ in groups only.

    That they do is checked on the largest cell of a row, which is compiled as well.
    """
    cfg = PlanConfig(arch=config("internlm-7b"), gpu="a100-80")
    cells = [*((row, 64) for row in PUBLISHED), LARGEST]
    made = {}
    requests = [request(cfg, *case(*cell)) for cell in cells]
    for cell, answer in zip(cells, answers(cfg, requests), strict=True):
        if "error" in answer:
            raise UserError(f"{cell}: the compiler failed: {answer['error']}")
        made[cell] = read(compiled_of(cfg, answer).text, answer["axes"])
        print(f"compiled: {cell[0]} on {cell[1]} GPUs", file=sys.stderr)
    every = {
        (row, n): at_size(made[row, 64], case(row, n)[0].sizes, 8)
        for row in PUBLISHED
        for n in GPUS
    }
    check_same(every[LARGEST], made[LARGEST])
    return every


def check_same(moved: Program, compiled: Program) -> None:
    """Refuses to go on if a program at another size is not what the compiler makes of it."""
    ours, theirs = moved.collectives(), compiled.collectives()
    for key in {*ours, *theirs}:
        a, b = (table.get(key, {"wire_bytes": 0.0})["wire_bytes"] for table in (ours, theirs))
        if abs(a - b) > 0.02 * max(a, b) + 2**20:
            raise UserError(f"{key}: {a:.4g} bytes moved from 64 GPUs, {b:.4g} compiled.")


def table(programs: dict[Cell, Program], fit: Fit) -> str:
    """The published figures, the predicted ones and the error, as Markdown."""
    lines = ["| row | " + " | ".join(f"{n:,}" for n in GPUS) + " |", "|---" * 9 + "|"]
    for row, published in PUBLISHED.items():
        cells = [rate(programs[row, n], fit) for n in GPUS]
        errors = [relative(programs, (row, n), fit) for n in GPUS]
        fitted_here = [(row, n) in FITTED for n in GPUS]
        lines.append(f"| {row}, published | " + " | ".join(str(p) for p in published) + " |")
        lines.append("| predicted | " + " | ".join(f"{c:.0f}" for c in cells) + " |")
        marks = [f"{e:+.1%}{' *' * f}" for e, f in zip(errors, fitted_here, strict=True)]
        lines.append("| error | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def verdict(programs: dict[Cell, Program], fit: Fit) -> str:
    """Median and worst error of the cells that were not fitted, and the order at 1,024."""
    cells = [(row, n) for row in PUBLISHED for n in GPUS if (row, n) not in FITTED]
    errors = {cell: relative(programs, cell, fit) for cell in cells}
    worst = max(cells, key=lambda cell: abs(errors[cell]))
    median = statistics.median(abs(e) for e in errors.values())
    ours = sorted(PUBLISHED, key=lambda row: -rate(programs[row, 1024], fit))
    theirs = sorted(PUBLISHED, key=lambda row: -PUBLISHED[row][-1])
    return (
        f"Fitted on 4 cells (*): matmuls at {fit.gemm_rate:.1%} of the peak,"
        f" {fit.hop_seconds * 1e3:.2f} ms a hop, {fit.overlap:.0%} of the data-parallel"
        f" communication hidden.\n28 other cells: median error {median:.1%}, worst"
        f" {errors[worst]:+.1%} ({worst[0]} on {worst[1]:,}).\nOrder at 1,024 GPUs:"
        f" {' > '.join(ours)}: {'as published' if ours == theirs else 'NOT as published'}."
    )


# arch, GPUs, rows of the global batch (16 M tokens at 1,024 GPUs, as InternEvo's headline has it).
RUNS = (("internlm2-7b", 1024, 4096), ("internlm2-20b", 1024, 4096), ("internlm-104b", 4096, 16384))


def hundreds(overlap: float) -> str:
    """Weak scaling on H100s with the first mesh of `search` that fits when compiled."""
    lines = ["| model | GPUs | mesh | peak GiB | tokens/s/GPU, MFU | efficiency at overlap 0 |"]
    lines[0] += f" {overlap:.2f} | 1 | against |"
    lines.append("|---" * 9 + "|")
    for arch, gpus, rows in RUNS:
        plan, program, cfg = best_that_fits(arch, gpus, rows, overlap)
        mesh = MeshConfig(**plan.mesh)
        small = resized(mesh, sizes(mesh, 8)[0])
        base = timeline(at_size(program, small.sizes, 8), cfg.machine)
        shares = [base.step(e.overlap) / e.step_seconds for e in plan.estimates]
        fitted = plan.fitted
        lines.append(
            f"| {arch} | {gpus:,} | {mesh_words(plan.mesh)}, {plan.work['micro_batches']} micro"
            f" | {plan.memory['peak'] / 2**30:.1f} |"
            f" {fitted.tokens_per_second_gpu:,.0f}, {fitted.mfu:.1%} | "
            + " | ".join(f"{share:.1%}" for share in shares)
            + f" | {small.num_devices} GPUs |"
        )
    return "\n".join(lines)


def best_that_fits(
    arch: str, gpus: int, rows: int, overlap: float
) -> tuple[Plan, Program, PlanConfig]:
    """Compiles the first candidates of `search`; returns the fastest of those that fit."""
    constants = replace(Constants(), overlap=overlap)
    cfg = PlanConfig(
        arch=config(arch), gpu="h100", gpus=gpus, batch_size=rows, constants=constants, best=2
    )
    ranked = candidates(cfg.arch, gpus, cfg.machine, cfg.work)[: cfg.best]
    found = []
    requests = [request(cfg, c.mesh, c.work) for c in ranked]
    for c, answer in zip(ranked, answers(cfg, requests), strict=True):
        plan = plan_of(cfg, c.mesh, c.work, answer)
        words = mesh_words(asdict(c.mesh))
        if isinstance(plan, Plan) and plan.fits:
            found.append((plan, answer))
            rate = plan.fitted.tokens_per_second_gpu
            print(f"{arch}: {words} remat {c.work.remat:g}: {rate:.0f}", file=sys.stderr)
        else:
            print(f"{arch}: {words} remat {c.work.remat:g}: does not fit", file=sys.stderr)
    if not found:
        raise UserError(f"{arch} on {gpus}: none of the first {cfg.best} plans fits.")
    plan, answer = max(found, key=lambda pair: pair[0].fitted.tokens_per_second_gpu)
    return plan, read(compiled_of(cfg, answer).text, answer["axes"]), cfg


def main() -> None:
    """Compiles, fits, predicts and prints."""
    found = all_programs()
    fit = fitted(found)
    print(table(found, fit), "", verdict(found, fit), "", sep="\n", flush=True)
    print(hundreds(fit.overlap))


if __name__ == "__main__":
    main()
