"""Plans a training run before any GPU is rented: memory, traffic, speed and cost.

`run` compiles the real training step for the GPUs that are named, on this CPU and without a
driver, and reads the program; `search` ranks meshes, ZeRO stages, micro-batches and remat; `tune`
shows what QLoRA needs by rank and optimizer. Every time is an estimate. Needs `make plan-env`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console

from internjax.catalog import cache_dir
from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.plan.compile import Compiled, ask, kept, plan_python
from internjax.plan.estimate import Constants, Machine
from internjax.plan.memory import OPTIMIZER_BYTES, Work
from internjax.plan.present import GIB, mesh_words, table, terminal, write_plan
from internjax.plan.record import Plan, make_plan
from internjax.plan.scaling import sizes, strong, weak
from internjax.plan.search import Candidate, candidates
from internjax.plan.topology import gpu_named, num_nodes

CHILD = "internjax.experiments.plan_child"
STEP_TOKENS = 4 * 2**20  # of a global batch, as InternLM trained (arXiv:2403.17297)


@dataclass(frozen=True)
class PlanConfig:
    """What is planned; each key is explained in configs/plan.yaml."""

    action: Literal["run", "search", "tune"] = "run"
    arch: ModelConfig | None = None
    gpu: str = "h100"
    gpus: int = 8
    gpus_per_node: int = 8
    mesh: MeshConfig | None = None
    batch_size: int = 0
    length: int = 4096
    micro_batches: int = 0
    remat: float = 1.0
    optimizer: str = "adamw"
    reduce_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    best: int = 3
    curve: bool = False
    ranks: tuple[int, ...] = (16, 64)
    optimizers: tuple[str, ...] = ("adamw", "adam8bit")
    tokens: float = 2e12
    dollars_per_gpu_hour: float = 2.0
    constants: Constants = field(default_factory=Constants)
    env: str = ".venv-plan"
    cache: str = ""
    out: str = "runs/plan"

    def __post_init__(self):
        if self.arch is None:
            raise UserError("arch is missing: for example arch=internlm2-7b.")
        for name in (self.optimizer, *self.optimizers):
            if name not in OPTIMIZER_BYTES:
                raise UserError(f"optimizer={name}: legal are {', '.join(OPTIMIZER_BYTES)}.")
        num_nodes(self.gpus, self.gpus_per_node)
        gpu_named(self.gpu)

    @property
    def machine(self) -> Machine:
        return Machine(gpu_named(self.gpu), self.gpus_per_node, self.constants)

    @property
    def work(self) -> Work:
        rows = self.batch_size or max(self.gpus, STEP_TOKENS // self.length)
        return Work(
            rows,
            self.length,
            self.micro_batches,
            remat=self.remat,
            optimizer=self.optimizer,
            reduce_dtype=self.reduce_dtype,
        )


@hydra.main(config_path="../configs", config_name="plan", version_base=None)
def main(raw: DictConfig) -> None:
    """Prints the plan and writes it."""
    cfg = build(PlanConfig, raw)
    console = Console()
    plan_python(cfg.env)  # says what is missing before any work is done
    {"run": run_one, "search": run_search, "tune": run_tune}[cfg.action](cfg, console)


def run_one(cfg: PlanConfig, console: Console) -> None:
    """Compiles one plan, or a curve of them, and shows it."""
    mesh, work = case(cfg)
    every = sizes(mesh, cfg.gpus_per_node)
    ways = sorted({every[0], *every[::-3]})  # the ends and each eighth: a compile costs 20 s
    curves = {"weak": weak(mesh, work, ways), "strong": strong(mesh, work, ways)}
    cases = [(mesh, work)]
    cases += [c for some in curves.values() for c in some if cfg.curve and c not in cases]
    with Console(stderr=True).status("compiling") as status:
        done = {}
        for one, plan in zip(cases, plans(cfg, cases), strict=True):
            if isinstance(plan, str):
                raise UserError(f"{mesh_words(asdict(one[0]))}: the compiler failed: {plan}")
            done[one] = plan
            status.update(f"compiling: {len(done)} of {len(cases)} done")
    curve = [(n, [done[c] for c in some]) for n, some in curves.items()] if cfg.curve else []
    show(cfg, console, done[cases[0]], curve)


def run_search(cfg: PlanConfig, console: Console) -> None:
    """Ranks all plans in closed form, compiles the best few and shows the best of those."""
    ranked = candidates(cfg.arch, cfg.gpus, cfg.machine, cfg.work)
    done: list[tuple[Candidate, Plan]] = []
    rows = []
    with Console(stderr=True).status("compiling"):
        cases = [(c.mesh, c.work) for c in ranked[: 2 * cfg.best]]
        for candidate, plan in zip(ranked, plans(cfg, cases), strict=False):
            rows.append(search_row(candidate, plan))
            if not isinstance(plan, str) and plan.fits:
                done.append((candidate, plan))
            if len(done) == cfg.best:
                break
    columns = ("mesh", "micro-batches", "remat", "GiB sketched", "compiled", "s sketched")
    console.print(table((*columns, "estimated", "tokens/s/GPU", "MFU", ""), rows))
    console.print(f"[dim]{len(ranked)} plans fit in closed form, {len(rows)} were compiled[/]\n")
    if not done:
        raise UserError("none of the compiled plans fits: take more GPUs, or best=6.")
    best = max((plan for _, plan in done), key=lambda p: p.fitted.tokens_per_second_gpu)
    show(cfg, console, best, [])


def search_row(candidate: Candidate, plan: Plan | str) -> list[Any]:
    """What closed form and compiler say of one candidate."""
    work = candidate.work
    row = [mesh_words(asdict(candidate.mesh)), work.micro_batches, work.remat]
    row.append(round(candidate.peak_bytes / GIB, 1))
    if isinstance(plan, str):
        return [*row, None, round(candidate.seconds, 3), None, None, None, plan[:60]]
    fitted = plan.fitted
    row += [round(plan.memory["peak"] / GIB, 1), round(candidate.seconds, 3)]
    row += [round(fitted.step_seconds, 3), round(fitted.tokens_per_second_gpu)]
    return [*row, f"{fitted.mfu:.1%}", "" if plan.fits else "does not fit"]


def run_tune(cfg: PlanConfig, console: Console) -> None:
    """Compiles QLoRA for each rank and optimizer on one GPU and shows its memory."""
    pairs = [(rank, name) for rank in cfg.ranks for name in cfg.optimizers]
    rows = []
    for (rank, name), answer in zip(pairs, answers(cfg, tune_requests(cfg, pairs)), strict=True):
        if "error" in answer:
            raise UserError(f"rank={rank} {name}: the compiler failed: {answer['error']}")
        held = {k: round(v / GIB, 2) for k, v in answer["arguments"].items()}
        memory = answer["memory"]
        fits = memory["peak"] <= cfg.machine.gpu.hbm_bytes
        peak = round(memory["peak"] / GIB, 2)
        rows.append([rank, name, *held.values(), round(memory["temp"] / GIB, 2), peak, fits])
    console.print(f"QLoRA on {cfg.arch.name}, a row of {cfg.length:,} tokens, {cfg.gpu}; GiB:")
    names = (*answer["arguments"], "temporaries", "peak", "fits")
    console.print(table(("rank", "optimizer", *names), rows))


def tune_requests(cfg: PlanConfig, pairs: Sequence[tuple[int, str]]) -> list[dict]:
    """What the compiling process is asked for each (rank, optimizer): one row at a time."""
    rows = cfg.batch_size or 1
    work = replace(cfg.work, batch_size=rows, micro_batches=cfg.micro_batches or rows)
    return [
        request(cfg, MeshConfig(), replace(work, optimizer=name)) | {"rank": rank, "gpus": 1}
        for rank, name in pairs
    ]


def case(cfg: PlanConfig) -> tuple[MeshConfig, Work]:
    """The mesh and work that are meant: as given, or the best in closed form."""
    if cfg.mesh is None:
        ranked = candidates(cfg.arch, cfg.gpus, cfg.machine, cfg.work)
        legal = [c for c in ranked if c.work.remat == cfg.remat] or ranked
        return legal[0].mesh, legal[0].work
    used = cfg.mesh.resolve(cfg.gpus)
    if used.num_devices != cfg.gpus:
        words = mesh_words(asdict(used))
        raise UserError(f"mesh {words} has {used.num_devices} devices, gpus={cfg.gpus}.")
    ways = used.row_ways
    rows, rest = divmod(cfg.work.batch_size, ways)
    if rest:
        raise UserError(
            f"batch_size={cfg.work.batch_size} is no multiple of the {ways} data-parallel devices."
        )
    return used, replace(cfg.work, micro_batches=cfg.micro_batches or rows)


def plans(cfg: PlanConfig, cases: Sequence[tuple[MeshConfig, Work]]) -> Iterator[Plan | str]:
    """Compiles cases one after the other; yields a plan each, or why there is none."""
    requests = [request(cfg, mesh, work) for mesh, work in cases]
    for (mesh, work), answer in zip(cases, answers(cfg, requests), strict=True):
        yield plan_of(cfg, mesh, work, answer)


def plan_of(cfg: PlanConfig, mesh: MeshConfig, work: Work, answer: dict) -> Plan | str:
    """Reads what the compiling process made of a case."""
    if "error" in answer:
        return answer["error"]
    compiled = compiled_of(cfg, answer)
    held, parameters = answer["arguments"], answer["parameters"]
    axes, machine = answer["axes"], cfg.machine
    return make_plan(compiled, held, parameters, cfg.arch, mesh, axes, work, machine)


def compiled_of(cfg: PlanConfig, answer: dict) -> Compiled:
    """Takes a compiled program out of the cache."""
    compiled = kept(cache_folder(cfg), answer["key"])
    return replace(compiled, seconds=answer["seconds"], cached=answer["cached"])


def request(cfg: PlanConfig, mesh: MeshConfig, work: Work) -> dict[str, Any]:
    """What the compiling process is told."""
    return {
        "arch": asdict(cfg.arch),
        "mesh": asdict(mesh),
        "work": asdict(work),
        "gpu": cfg.gpu,
        "gpus": mesh.num_devices,
        "gpus_per_node": cfg.gpus_per_node,
        "cache": str(cache_folder(cfg)),
    }


def answers(cfg: PlanConfig, requests: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """Sends requests to the compiling process."""
    return ask(CHILD, requests, python=plan_python(cfg.env))


def cache_folder(cfg: PlanConfig) -> Path:
    """Where compiled programs are kept."""
    return Path(cfg.cache) if cfg.cache else cache_dir() / "plans"


def show(cfg: PlanConfig, console: Console, plan: Plan, curve: Sequence) -> None:
    """Prints a plan and writes its files."""
    money = {"tokens": cfg.tokens, "dollars": cfg.dollars_per_gpu_hour}
    console.print(terminal(plan, cfg.constants, curve, **money))
    if cfg.out:
        for path in write_plan(Path(cfg.out), plan, cfg.constants, curve, **money):
            console.print(f"[dim]{path}[/]", soft_wrap=True)


if __name__ == "__main__":  # the same program as `internjax plan`
    from internjax.cli import run

    sys.exit(run(["plan", *sys.argv[1:]]))
