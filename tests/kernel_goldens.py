"""Compiles the kernels for sm_90a and compares them with their golden rows: `make kernel-check`.

`--write [ROW ...]` sets goldens anew. A row fails when a kernel spills more than before, loses a
wgmma or TMA instruction that it had or must have, takes a tenth more registers or shared memory,
comes or goes, or when ptxas notes a loss of performance. A decoding step (`kernel_steps.py`) fails
when it calls other kernels than it must, or makes floats of a quantized weight. Plain script: needs
`.venv-plan`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internjax.experiments.kernel_steps import STEPS
from internjax.kernels.cases import CASES
from internjax.plan.compile import ask, plan_python

GOLDENS = Path(__file__).parent / "goldens" / "kernels.json"
GPU = "h100"
MORE = 0.10  # share by which registers, shared memory and XLA's temporary bytes may grow
type Row = dict[str, Any]


def record(answer: Row) -> Row:
    """What a golden holds of a compiled row, or of a step."""
    if "calls" in answer:
        return {"temp_bytes": answer["temp_bytes"], "kernels": {}}
    kernels = {kernel["name"]: _facts(kernel) for kernel in answer["kernels"]}
    return {"temp_bytes": answer["temp_bytes"], "kernels": kernels}


def _facts(kernel: Row) -> Row:
    kept = ("registers", "spill_bytes", "smem_bytes", "threads", "tma_loads", "tma_stores")
    return {name: kernel[name] for name in kept} | {"wgmma": sum(kernel["wgmma"].values())}


def unmet(answer: Row, needs: Sequence[str], why: str) -> list[str]:
    """What a row must have whatever its golden says."""
    total = {
        "wgmma": sum(sum(kernel["wgmma"].values()) for kernel in answer["kernels"]),
        "tma": sum(kernel["tma_loads"] for kernel in answer["kernels"]),
    }
    found = [f"no {need} in the code" for need in needs if not total[need]]
    for kernel in answer["kernels"]:
        if (spilled := kernel["spill_bytes"]) and not why:
            found.append(f"{kernel['name']}: {spilled} bytes spilled: mend it, or say why")
        if waits_for_registers(kernel):
            found.append(f"{kernel['name']}: setmaxnreg {kernel['exchanged']} would wait for ever")
        found += [f"{kernel['name']}: {note}" for note in kernel["notes"]]
    return found


def unmet_by_step(answer: Row, calls: Mapping[str, int]) -> list[str]:
    """What a step must have whatever its golden says."""
    found = [f"floats of a quantized weight: {copy}" for copy in answer["copies"]]
    for name in sorted({*calls, *answer["calls"]}):
        if (now := answer["calls"].get(name, 0)) != (want := calls.get(name, 0)):
            found.append(f"{name}: called {now} times, not {want}")
    return found


def waits_for_registers(kernel: Row) -> bool:
    """Whether warpgroups ask for more registers than there are: one gives, the others take."""
    if not kernel["exchanged"]:
        return False
    less, more = kernel["exchanged"][0], kernel["exchanged"][-1]
    groups = kernel["threads"] // 128
    return less + (groups - 1) * more > groups * kernel["registers"]


def complaints(now: Row, golden: Row | None) -> list[str]:
    """What is worse than in the golden."""
    if golden is None:
        return ["no golden: set it with --write"]
    found = _grown("XLA's temporary bytes", now["temp_bytes"], golden["temp_bytes"], MORE)
    was, there = golden["kernels"], now["kernels"]
    for name in sorted({*was, *there}):
        if name not in there or name not in was:
            found.append(f"{name}: {'gone' if name in was else 'new'}")
            continue
        for fact, share in (("registers", MORE), ("smem_bytes", MORE), ("spill_bytes", 0.0)):
            found += _grown(f"{name}: {fact}", there[name][fact], was[name][fact], share)
        for fact in ("wgmma", "tma_loads", "tma_stores"):
            if there[name][fact] < was[name][fact]:
                found.append(f"{name}: {fact} {was[name][fact]} -> {there[name][fact]}")
    return found


def _grown(what: str, now: int, was: int, share: float) -> list[str]:
    return [f"{what}: {was:,} -> {now:,}"] * (now > was * (1 + share))


def must_have(name: str, answer: Row) -> list[str]:
    """What is unmet of a row or a step."""
    if name in STEPS:
        return unmet_by_step(answer, STEPS[name].calls)
    return unmet(answer, CASES[name].needs, CASES[name].why)


def words(row: Row, answer: Row) -> str:
    """One line of a row's kernels, or of a step's calls."""
    if "calls" in answer:
        calls = ", ".join(f"{times} {name}" for name, times in sorted(answer["calls"].items()))
        return f"{calls}; {row['temp_bytes']:,} temporary bytes"
    return "; ".join(
        f"{name} {k['registers']} registers, {k['spill_bytes']} B spilled,"
        f" {k['smem_bytes'] // 1024} KiB, {k['wgmma']} wgmma,"
        f" {k['tma_loads']}+{k['tma_stores']} TMA"
        for name, k in row["kernels"].items()
    )


def compiled(names: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Name and answer of every row, as they come from one compiling process."""
    requests = [{"case": name, "gpu": GPU} for name in names]
    yield from zip(
        names,
        ask("internjax.experiments.kernel_child", requests, python=plan_python()),
        strict=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="rows to compile (all)")
    parser.add_argument("--write", action="store_true", help="set their goldens anew")
    given = parser.parse_args()
    names = [name for name in [*CASES, *STEPS] if not given.rows or name in given.rows]
    goldens = json.loads(GOLDENS.read_text(encoding="utf-8")) if GOLDENS.is_file() else {}
    failed, start = 0, time.perf_counter()
    for name, answer in compiled(names):
        row = None if "error" in answer else record(answer)
        found = [answer["error"]] if row is None else must_have(name, answer)
        if row is not None and not given.write:
            found += complaints(row, goldens.get(name))
        elif row is not None and not found:
            goldens[name] = row
        seconds = 0.0 if row is None else answer["seconds"]
        verdict = "FAILED" if found else "ok"
        said = "" if row is None else words(row, answer)
        print(f"{verdict:<7}{seconds:5.1f} s  {name}: {said}", flush=True)
        for line in found:
            print(f"        {line}")
        failed += bool(found)
    print(f"{len(names) - failed} of {len(names)} rows ok in {time.perf_counter() - start:.0f} s")
    if given.write:
        rows = {name: goldens[name] for name in sorted(goldens) if name in {*CASES, *STEPS}}
        GOLDENS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
