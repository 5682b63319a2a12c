"""Runs the whole chain on a real model: documents, training, scores, int4, server, agent.

Every stage writes an artefact with its lineage below runs/store; what was made before from the same
inputs is not made again. A failed gate stops the chain and the exit code says so. The report is
runs/STAMP/report.html.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from internjax.chain.present import terminal_rows, write_report
from internjax.chain.run import BUDGET_SECONDS, ChainConfig, Stage, run_chain
from internjax.errors import GateFailed
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build
from internjax.report import summary_table


@dataclass(frozen=True)
class ChainRoot:
    """The keys of the verb: all below `chain`."""

    chain: ChainConfig = field(default_factory=ChainConfig)


@hydra.main(config_path="../configs", config_name="chain", version_base=None)
def main(raw: DictConfig) -> None:
    """Runs, shows each stage as it ends, writes the report; raises when a gate failed."""
    cfg = build(ChainRoot, raw).chain
    enable_compilation_cache()
    console = Console()

    def tell(name: str, stage: Stage | None) -> None:
        if stage is None:
            budget = BUDGET_SECONDS.get(name)
            guide = f" [dim](about {budget} s on two quiet cores)[/]" if budget else ""
            console.print(f"[bold]{name}[/]{guide} …")
        elif stage.seconds or not stage.ok:
            sign = "[green]✓[/]" if stage.ok else "[red]✗[/]"
            made = " made before, reused" if stage.reused else f" {stage.seconds:.1f} s"
            console.print(f"  {sign}{made}")

    record = run_chain(cfg, tell=tell)
    folder = Path(cfg.runs) / record.started.strftime("%Y%m%d-%H%M%S")
    page = write_report(record, folder)
    console.print(summary_table(terminal_rows(record), title="InternJAX chain"))
    total = sum(stage.seconds for stage in record.stages)
    console.print(f"{total:.0f} s in all · report: {page}")
    if not record.ok:
        raise GateFailed(record.error)


if __name__ == "__main__":
    from internjax.cli import run

    sys.exit(run(["chain", *sys.argv[1:]]))
