"""The loop around the step: batches in, checkpoints and metrics out, resumed where it stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from internjax.checkpoint import Checkpoints
from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.telemetry import StepLog
from internjax.train.state import TrainState
from internjax.train.step import Step


@dataclass(frozen=True)
class RunConfig:
    """How long a run lasts and what it keeps.

    Fields:
      steps: updates in total; save_every: updates between checkpoints, 0 for the last one only.
      keep: checkpoints kept; progress: show the bar.
      max_bad_steps: updates in a row with a NaN or infinite loss or gradient that are skipped
        before the run stops.
    """

    steps: int = 100
    save_every: int = 50
    keep: int = 2
    progress: bool = True
    max_bad_steps: int = 3


def fit(
    state: TrainState,
    step_fn: Step,
    batch_at: Callable[[int], Batch],
    cfg: RunConfig,
    folder: Path,
    *,
    frozen: Any = None,
    name: str = "train",
    settings: Mapping[str, Any] | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to `cfg.steps`, resuming from the newest whole checkpoint in `folder`.

    Resumed equals uninterrupted bit for bit on the same mesh: the batch is a function of the step
    and the state holds everything else.

    Args:
      frozen: arguments of the loss that are not trained (the base model under an adapter).
      settings: JSON values that a resumed run must share with the one that wrote the checkpoint.

    Returns: the final state and the metrics of every step, those before a resume included.
    """
    jitted = jax.jit(step_fn, donate_argnums=0)
    settings = dict(settings or {})
    with Checkpoints(folder / "checkpoints", keep=cfg.keep) as checkpoints:
        start = 0
        if checkpoints.latest() is not None:
            start, state = checkpoints.restore(state, expect=settings)
        with StepLog(
            folder / "steps.jsonl", name=name, start=start, total=cfg.steps, progress=cfg.progress
        ) as log:
            for step in range(start, cfg.steps):
                state, metrics = jitted(state, batch_at(step), frozen)
                log.step(step + 1, metrics)
                due = cfg.save_every and (step + 1) % cfg.save_every == 0
                if due or step + 1 == cfg.steps:
                    log.flush()  # a checkpoint never knows a step that the log does not
                    checkpoints.save(step + 1, state, settings)
                _check_learning(log.records, cfg)
    return state, log.records


def _check_learning(records: Sequence[Mapping[str, Any]], cfg: RunConfig) -> None:
    """Stops a run whose last updates were all skipped."""
    last = records[-cfg.max_bad_steps - 1 :]
    if len(last) <= cfg.max_bad_steps or any(record["finite"] for record in last):
        return
    raise UserError(
        f"loss or gradient is NaN or infinite for {len(last)} updates in a row, steps"
        f" {last[0]['step']} to {last[-1]['step']} (loss {last[-1]['loss']}, gradient norm"
        f" {last[-1]['grad_norm']}): lower optim.lr, or look at the batches of these steps."
    )
