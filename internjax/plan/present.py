"""Shows plans: tables for the terminal, one html page, one JSON file. All times are estimates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable

from internjax.plan.estimate import Constants, run_cost
from internjax.plan.record import Plan
from internjax.report import Bars, KeyValues, Lines, Section, Table, Text, render, write_json

GIB = 2**30


def mesh_words(mesh: Mapping[str, int]) -> str:
    """A mesh in the words of the command line, axes of one device left out."""
    kept = {name for name, size in mesh.items() if size not in (0, 1)}
    kept -= set() if mesh["pipe"] > 1 else {"schedule"}
    kept -= set() if mesh["context"] > 1 else {"context_mode"}
    kept |= {"zero"} if mesh["data"] > 1 else set()
    return " ".join(f"{name}={mesh[name]}" for name in mesh if name in kept) or "one device"


def facts(plan: Plan, tokens: float, dollars: float) -> dict[str, Any]:
    """The headline figures of a plan, in reading order."""
    best, fitted = plan.estimates[2], plan.fitted
    worst = plan.estimates[0]
    cost = run_cost(tokens, fitted.tokens_per_second_gpu, plan.gpus, dollars)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    work = plan.work
    return {
        "model": f"{plan.arch}, {plan.parameters / 1e9:.2f} B parameters",
        "on": f"{plan.gpus:,} {plan.gpu}: {mesh_words(plan.mesh)}",
        "batch": f"{work['batch_size']:,} rows x {work['length']:,} tokens in"
        f" {work['micro_batches']} micro-batches, remat {work['remat']:g},"
        f" {work['optimizer']}",
        "peak memory a GPU": f"{plan.memory['peak'] / GIB:.1f} of {plan.hbm_bytes / GIB:.1f} GiB:"
        f" {verdict} ({plan.spare_bytes / GIB:+.1f} GiB with 8% kept free)",
        "matmul FLOPs a GPU and step": f"{plan.flops / 1e12:.1f} T",
        "sent a GPU and step": f"NVLink {plan.link_bytes['nvlink'] / GIB:.2f} GiB, network"
        f" {plan.link_bytes['network'] / GIB:.2f} GiB; {plan.async_share:.0%} asynchronous",
        "pipeline bubble": f"{plan.bubble:.1%}",
        "step, estimated": f"{fitted.step_seconds:.3f} s"
        f" ({best.step_seconds:.3f} all windows used, {worst.step_seconds:.3f} nothing hidden)",
        "tokens/s/GPU, estimated": f"{fitted.tokens_per_second_gpu:,.0f}"
        f" ({worst.tokens_per_second_gpu:,.0f} to {best.tokens_per_second_gpu:,.0f})",
        "MFU, estimated": f"{fitted.mfu:.1%} ({fitted.mfu_internevo:.1%} by InternEvo's formula);"
        f" hardware {fitted.hfu:.1%}",
        f"{tokens / 1e12:g} T tokens, estimated": f"{cost['days']:,.1f} days,"
        f" {cost['gpu_hours']:,.0f} GPU hours, {cost['dollars']:,.0f} $ at {dollars:g} $ an hour",
    }


def collective_rows(plan: Plan) -> list[list[Any]]:
    """A row for each kind and mesh axis: count, MiB of values, MiB sent, share asynchronous."""
    return [
        [
            row["kind"],
            row["axes"] or "-",
            int(row["count"]),
            round(row["payload_bytes"] / 2**20, 2),
            round(row["wire_bytes"] / 2**20, 2),
            f"{row['async_bytes'] / row['wire_bytes']:.0%}" if row["wire_bytes"] else "-",
        ]
        for row in sorted(plan.collectives, key=lambda r: -r["wire_bytes"])
    ]


COLLECTIVE_COLUMNS = ("collective", "mesh axes", "count", "MiB of values", "MiB sent", "async")


def memory_rows(plan: Plan) -> list[list[Any]]:
    """GiB by kind: what is held between steps, exactly, and the closed form of all kinds."""
    rows = [[f"held: {name}", round(b / GIB, 3)] for name, b in plan.arguments.items()]
    rows.append(["compiler's temporaries", round(plan.memory["temp"] / GIB, 3)])
    rows.append(["peak, compiled", round(plan.memory["peak"] / GIB, 3)])
    rows += [[f"closed form: {name}", round(b / GIB, 3)] for name, b in plan.closed_form.items()]
    return [*rows, ["closed form, sum", round(sum(plan.closed_form.values()) / GIB, 3)]]


def curve_rows(curve: Sequence[tuple[str, Sequence[Plan]]]) -> list[list[Any]]:
    """A row for each number of GPUs: tokens/s/GPU and efficiency against the first."""
    rows = []
    for name, plans in curve:
        first = plans[0]
        for plan in plans:
            rates = [e.tokens_per_second_gpu for e in plan.estimates]
            bases = [e.tokens_per_second_gpu for e in first.estimates]
            shares = [f"{rate / base:.1%}" for rate, base in zip(rates, bases, strict=True)]
            peak = round(plan.memory["peak"] / GIB, 1)
            rows.append([name, plan.gpus, mesh_words(plan.mesh), peak, round(rates[1]), *shares])
    return rows


CURVE_COLUMNS = ("scaling", "GPUs", "mesh", "peak GiB", "tokens/s/GPU")
CURVE_COLUMNS += ("overlap 0", "fitted", "overlap 1")


def terminal(
    plan: Plan, constants: Constants, curve: Sequence, *, tokens: float, dollars: float
) -> Group:
    """The plan for a terminal."""
    top = RichTable(box=None, show_header=False, pad_edge=False)
    for name, value in facts(plan, tokens, dollars).items():
        top.add_row(f"[dim]{name}[/]", value)
    parts = [top, "", _rich(("GiB a GPU", ""), memory_rows(plan)), ""]
    parts.append(_rich(COLLECTIVE_COLUMNS, collective_rows(plan)))
    if plan.remedies:
        parts += ["", "What would make it fit: " + ", ".join(words for words, _ in plan.remedies)]
    elif not plan.fits:
        parts += ["", "No single change makes it fit: take more GPUs or `plan search`."]
    if curve:
        parts += ["", _rich(CURVE_COLUMNS, curve_rows(curve))]
    parts += [f"[yellow]note: {warning}[/]" for warning in plan.warnings]
    return Group(*parts, "", f"[dim]{assumptions(constants)}[/]")


def _rich(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> RichTable:
    table = RichTable(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        number = all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int | float) else str(v) for v in row))
    return table


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> RichTable:
    """Rows for a terminal, numbers to the right."""
    return _rich(columns, rows)


def assumptions(c: Constants) -> str:
    """The constants behind every time, in a sentence."""
    return (
        "Estimates from the compiled program, nothing was run: matmuls at"
        f" {c.gemm_rate:.0%} of the peak, memory at {c.hbm_rate:.0%}, NVLink at"
        f" {c.nvlink_rate:.0%} and network at {c.nic_rate:.0%} of the data sheet,"
        f" {c.nvlink_hop_seconds * 1e6:g} and {c.nic_hop_seconds * 1e6:g} us a hop,"
        f" {c.overlap:.0%} of the schedule's windows used."
    )


def write_plan(
    folder: Path,
    plan: Plan,
    constants: Constants,
    curve: Sequence[tuple[str, Sequence[Plan]]],
    *,
    tokens: float,
    dollars: float,
) -> tuple[Path, Path]:
    """Writes plan.json and plan.html into `folder`; returns both paths."""
    record = {
        "plan": asdict(plan),
        "constants": asdict(constants),
        "curves": {name: [asdict(p) for p in plans] for name, plans in curve},
    }
    title = f"Plan: {plan.arch} on {plan.gpus:,} {plan.gpu}"
    sections = [
        Section(
            "Summary",
            [KeyValues(facts(plan, tokens, dollars)), Text(assumptions(constants))],
            ok=plan.fits,
        ),
        Section("Memory", [_memory_bars(plan), Table(("kind", "GiB a GPU"), memory_rows(plan))]),
        Section("Communication", [Table(COLLECTIVE_COLUMNS, collective_rows(plan))]),
        Section("Time of a step, estimated", [_time_bars(plan)]),
    ]
    if curve:
        blocks = [_curve_lines(curve), Table(CURVE_COLUMNS, curve_rows(curve))]
        sections.append(Section("Scaling, estimated", blocks))
    page = render(title, sections, folder / "plan.html", ok=plan.fits)
    return write_json(folder / "plan.json", record), page


def _memory_bars(plan: Plan) -> Bars:
    held = {name: b / GIB for name, b in plan.arguments.items()}
    names = [*held, "temporaries", "peak"]
    values = [*held.values(), plan.memory["temp"] / GIB, plan.memory["peak"] / GIB]
    return Bars(
        "Memory of a GPU",
        names,
        {"compiled": values},
        baseline=[plan.hbm_bytes / GIB] * len(names),
        unit="GiB",
        maximum=max(plan.hbm_bytes, plan.memory["peak"]) / GIB,
        note="The tick is the GPU's memory.",
    )


def _time_bars(plan: Plan) -> Bars:
    times = plan.times
    names = ["kernels", "NVLink", "network", "exposed", "step"]
    seconds = [times.compute, times.nvlink, times.network, times.exposed]
    return Bars(
        "Seconds of a step",
        names,
        {"estimated": [*seconds, plan.fitted.step_seconds]},
        unit="s",
        note="NVLink and network: all collectives, one after the other; exposed: what no window"
        " of the schedule can hide.",
    )


def _curve_lines(curve: Sequence[tuple[str, Sequence[Plan]]]) -> Lines:
    series = {
        f"{name}, overlap {plan_e}": [(p.gpus, p.estimates[i].tokens_per_second_gpu) for p in plans]
        for name, plans in curve
        for i, plan_e in enumerate(("0", "fitted", "1"))
    }
    return Lines("Tokens/s/GPU", series, "GPUs", "tokens/s/GPU, estimated")
