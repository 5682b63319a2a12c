"""What the verbs that make an artefact share: where it is written, and the page about a training.

The chain's own stages have a store of their own to write to; here the user may name the folder.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internjax.lineage import Artefact, artefact_key, produce, sweep
from internjax.report import KeyValues, Lines, Section, render

type Make = Callable[[Path, Path], Mapping[str, Any]]
"""Fills the artefact's folder, given scratch space that outlives a crash; returns metrics."""


def produce_at(
    out: str,
    runs: str,
    kind: str,
    *,
    config: Any,
    inputs: Mapping[str, Artefact | Path],
    make: Make,
) -> Artefact:
    """Makes an artefact in the folder `out`, or with "" in the store below `runs`.

    The same command after a crash finds its scratch space again, because the folder is named by
    what goes in; when the artefact is whole the scratch space is removed.
    """
    store = Path(runs).absolute() / "store"
    key, scratch = scratch_of(runs, kind, config=config, inputs=inputs)
    target = Path(out).absolute() if out else None
    for folder in {store, (target or store / key).parent}:
        sweep(folder)
    artefact = produce(
        store,
        kind,
        config=config,
        inputs=inputs,
        make=lambda folder: make(folder, scratch),
        out=target,
    )
    if scratch.is_dir():
        shutil.rmtree(scratch)
    return artefact


def scratch_of(
    runs: str, kind: str, *, config: Any, inputs: Mapping[str, Artefact | Path]
) -> tuple[str, Path]:
    """Returns an artefact's key and the scratch space of the work on it."""
    store = Path(runs).absolute() / "store"
    key = artefact_key(store, kind, config=config, inputs=inputs)
    return key, store.parent / "work" / f"{kind}-{key[:16]}"


def write_training_page(path: Path, title: str, metrics: Mapping[str, Any]) -> None:
    """Writes the loss curve and the figures of a training as one html page."""
    curve = Lines("Loss", {"loss": list(enumerate(metrics["loss"], 1))}, "update", "nats a token")
    figures = KeyValues({k: v for k, v in metrics.items() if not isinstance(v, list)})
    render(title, [Section("Training", [curve, figures])], path)
