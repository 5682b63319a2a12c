"""Finds and fetches models, tokenizers and datasets by name.

`search` and `ls` list, `info` tells all about one entry, `get` brings it here, checksummed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from internjax import catalog
from internjax.catalog import DIMENSIONS, KINDS, Entry
from internjax.errors import UserError
from internjax.experiments.config import build, nearest


@dataclass(frozen=True)
class CatalogConfig:
    """What to do; each key is explained in configs/catalog.yaml."""

    action: Literal["search", "info", "ls", "get"] = "ls"
    name: str = ""
    prefix: str = ""
    query: str = ""
    kind: str = ""
    dimension: str = ""
    verify: bool = False


@hydra.main(config_path="../configs", config_name="catalog", version_base=None)
def main(raw: DictConfig) -> None:
    """Runs one action of the catalogue."""
    cfg = build(CatalogConfig, raw)
    console = Console()
    if cfg.action == "search" or (cfg.action == "ls" and not cfg.name):
        show_entries(console, cfg)
    elif not cfg.name:
        raise UserError(f"catalog {cfg.action} needs a NAME; `internjax catalog ls` lists them")
    elif cfg.action == "info":
        show_entry(console, catalog.info(cfg.name))
    elif cfg.action == "ls":
        show_files(console, cfg)
    else:
        print(download(cfg))  # the path alone on standard output: `cd $(internjax catalog get …)`


def show_entries(console: Console, cfg: CatalogConfig) -> None:
    """Prints a table of the entries that match."""
    for key, value, legal in (
        ("kind", cfg.kind, KINDS.values()),
        ("dimension", cfg.dimension, DIMENSIONS),
    ):
        if value and value not in legal:
            guess = nearest(value, legal)
            hint = f"did you mean {guess}? " if guess else ""
            raise UserError(f"no {key} {value!r}: {hint}Legal: {', '.join(legal)}")
    found = catalog.search(cfg.query, kind=cfg.kind, dimension=cfg.dimension)
    if not found:
        raise UserError(f"nothing in the catalogue matches {cfg.query!r}; try fewer words")
    for plural, kind in KINDS.items():
        if chosen := [entry for entry in found if entry.kind == kind]:
            console.print(f"[bold]{plural}[/]")
            console.print(entry_table(chosen, console.width))
    console.print(f"[dim]{len(found)} entries; `internjax catalog info NAME` tells more[/]")


def entry_table(entries: list[Entry], width: int) -> Table:
    """One line an entry, cut to the terminal's width; languages where there is room."""
    wide = width >= 100
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    table.add_column(style="cyan", no_wrap=True, min_width=21)
    table.add_column(no_wrap=True, min_width=13)
    if wide:
        table.add_column(no_wrap=True, min_width=9)
    table.add_column(justify="right", no_wrap=True, min_width=7)
    table.add_column(style="dim", no_wrap=True, min_width=14)
    table.add_column(no_wrap=True, ratio=1)
    for entry in entries:
        languages = " ".join(entry.languages[:2]) + (" …" if len(entry.languages) > 2 else "")
        row = [entry.name, entry.dimension, *([languages] if wide else [])]
        table.add_row(*map(escape, [*row, size_of(entry), entry.terms, entry.about]))
    return table


def show_entry(console: Console, entry: Entry) -> None:
    """Prints every field of an entry."""
    here = catalog.cache_dir() / entry.name
    rows = {
        "name": entry.name,
        "kind": entry.kind,
        "dimension": f"{entry.dimension} {DIMENSIONS.get(entry.dimension, '')}".strip(),
        "languages": " ".join(entry.languages),
        "about": entry.about,
        "items": entry.items,
        "licence": entry.licence,
        "terms": entry.terms,
        "size": size_of(entry),
        "files": str(len(entry.files) or "by hand, see upstream"),
        "upstream": "\n".join(entry.upstream),
        "source": "\n".join(sorted({file.source.partition(":")[0] for file in entry.files})),
        "note": entry.note,
        "here": str(here) if here.exists() else "not fetched",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    console.print(table)


def show_files(console: Console, cfg: CatalogConfig) -> None:
    """Prints the files of an entry with size and checksum."""
    entry = catalog.info(cfg.name)
    files = catalog.ls(cfg.name, cfg.prefix)
    if not files:
        console.print(f"{entry.name} is fetched by hand from {entry.by_hand}", markup=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("file", style="cyan", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("sha256", style="dim", no_wrap=True)
    for file in files:
        table.add_row(escape(file.name), f"{file.size_bytes:,}", file.sha256[:16])
    console.print(table)


def download(cfg: CatalogConfig) -> Path:
    """Fetches an entry under a progress bar (on standard error); returns its path."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    title = TextColumn("{task.description}")
    quiet = not console.is_terminal
    with Progress(title, *columns, console=console, transient=True, disable=quiet) as bar:
        tasks = {}

        def progress(name: str, done_bytes: int, total_bytes: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(escape(name), total=total_bytes)
            bar.update(tasks[name], completed=done_bytes, visible=done_bytes < total_bytes)

        return catalog.get(cfg.name, cfg.prefix, verify=cfg.verify, progress=progress)


def size_of(entry: Entry) -> str:
    """An entry's size (kB = 10^3 bytes), or that it is fetched by hand."""
    return decimal(entry.size_bytes) if entry.files else "by hand"


if __name__ == "__main__":  # the same program as `internjax catalog`
    from internjax.cli import run

    sys.exit(run(["catalog", *sys.argv[1:]]))
