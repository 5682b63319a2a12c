"""Compiles the golden plans and compares them: `make plan-check`, or `--write` to set them anew.

A plan fails when its peak memory or the bytes of a collective moved by more than 2%, or when a
collective above 1 MiB appears that the golden does not name. Plain script: needs `.venv-plan`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from internjax import configs
from internjax.experiments.config import build
from internjax.experiments.plan import PlanConfig, answers, plan_of, request
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.plan.memory import Work
from internjax.plan.present import mesh_words
from internjax.plan.record import Plan

GOLDENS = Path(__file__).parent / "goldens" / "plans.json"
TOLERANCE, SMALL_BYTES = 0.02, 2**20
CACHE = ".cache/plans"
M = MeshConfig

SMALL, LARGE, EXPERTS = "internlm2-1_8b", "internlm2-7b", "internlm2-moe-8x7b"
HYBRID = {"zero_group": 8}

# name -> (arch, gpu, mesh, work): every parallel mode alone, then together, then the large.
CASES: dict[str, tuple[str, str, MeshConfig, Work]] = {
    "data": (SMALL, "h100", M(data=8, zero=0), Work(16, 2048, 2)),
    "zero 1": (SMALL, "h100", M(data=8, zero=1), Work(16, 2048, 2)),
    "zero 2": (SMALL, "h100", M(data=8, zero=2), Work(16, 2048, 2)),
    "zero 3": (SMALL, "h100", M(data=8, zero=3), Work(16, 2048, 2)),
    "hybrid zero 1": (SMALL, "a100-80", M(data=32, zero=1, **HYBRID), Work(64, 2048, 2)),
    "hybrid zero 3": (SMALL, "h200", M(data=32, zero=3, **HYBRID), Work(64, 2048, 2)),
    "tensor": (SMALL, "h100", M(tensor=8), Work(2, 2048, 2)),
    "pipe": (SMALL, "h100", M(pipe=4), Work(8, 2048, 8)),
    "context": (SMALL, "h100", M(context=8), Work(2, 8192, 2)),
    "expert": (EXPERTS, "b200", M(data=2, expert=8, zero=1), Work(16, 2048)),
    "nothing recomputed": (LARGE, "a100-80", M(data=8, zero=1), Work(8, 2048, remat=0)),
    "data, tensor, pipe": (SMALL, "a100-40", M(data=2, tensor=2, pipe=2), Work(16, 2048, 8)),
    "zero 3, tensor": (SMALL, "h100", M(data=4, tensor=2, zero=3), Work(8, 2048, 2)),
    "1,024 GPUs": (LARGE, "b200", M(data=1024, zero=1, **HYBRID), Work(1024, 4096)),
}


def arch_of(name: str) -> ModelConfig:
    """An option of the group arch."""
    return build(
        ModelConfig, OmegaConf.load(Path(configs.__file__).parent / "arch" / f"{name}.yaml")
    )


def record(plan: Plan) -> dict:
    """What a golden holds of a plan."""
    rows = {
        f"{row['kind']} {row['axes']}": round(row["payload_bytes"])
        for row in plan.collectives
        if row["payload_bytes"] > SMALL_BYTES
    }
    return {"peak_bytes": plan.memory["peak"], "collective_bytes": rows}


def complaints(now: dict, golden: dict | None) -> list[str]:
    """What moved between a golden and now."""
    if golden is None:
        return ["no golden: set it with --write"]
    found = [*_moved("peak memory", now["peak_bytes"], golden["peak_bytes"])]
    was, there = golden["collective_bytes"], now["collective_bytes"]
    for name in sorted({*was, *there}):
        if name not in was:
            found.append(f"new collective: {name}, {there[name] / 2**20:.1f} MiB")
        else:
            found += _moved(name, there.get(name, 0), was[name])
    return found


def _moved(name: str, now: float, was: float) -> list[str]:
    change = now / was - 1
    return [f"{name}: {was / 2**20:,.1f} -> {now / 2**20:,.1f} MiB ({change:+.1%})"] * (
        abs(change) > TOLERANCE
    )


def compiled() -> Iterator[Plan | str]:
    """The plans of all cases, or why there is none, as they come from one compiling process."""
    requests, configs = [], []
    for arch, gpu, mesh, work in CASES.values():
        cfg = PlanConfig(arch=arch_of(arch), gpu=gpu, gpus=mesh.num_devices, cache=CACHE)
        configs.append(cfg)
        requests.append(request(cfg, mesh, work))
    for cfg, (_, _, mesh, work), answer in zip(
        configs, CASES.values(), answers(configs[0], requests)
    ):
        yield plan_of(cfg, mesh, work, answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="set the goldens anew")
    write = parser.parse_args().write
    goldens = json.loads(GOLDENS.read_text(encoding="utf-8")) if GOLDENS.is_file() else {}
    failed, new, start = 0, {}, time.perf_counter()
    for (name, (arch, gpu, mesh, _)), plan in zip(CASES.items(), compiled(), strict=True):
        found = [plan] if isinstance(plan, str) else []
        if not found:
            new[name] = record(plan)
            found = [] if write else complaints(new[name], goldens.get(name))
        words = f"{name}: {arch} on {gpu}, {mesh_words(vars(mesh))}"
        seconds = 0.0 if isinstance(plan, str) else plan.compile_seconds
        print(f"{'FAILED' if found else 'ok':<7}{seconds:6.1f} s  {words}", flush=True)
        for line in found:
            print(f"        {line}")
        failed += bool(found)
    print(f"{len(CASES) - failed} of {len(CASES)} plans ok in {time.perf_counter() - start:.0f} s")
    if write and not failed:
        GOLDENS.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
