"""The loop around the step: batches in, checkpoints and metrics out, resumed where it stopped."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from internjax.checkpoint import Checkpoints, changes
from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.telemetry import Record, StepLog, Work
from internjax.train import sinks
from internjax.train.facts import batch_facts
from internjax.train.profile import Profiler, parse_steps
from internjax.train.state import TrainState
from internjax.train.step import Step
from internjax.train.stop import Stopped, StopRequests
from internjax.train.watch import Watch, WatchConfig


@dataclass(frozen=True)
class RunConfig:
    """How long a run lasts, what it keeps, and what it tells.

    Fields:
      steps: updates in total; save_every: updates between checkpoints, 0 for the last one only.
      keep: newest checkpoints kept; keep_every: steps divisible by it are kept for good, 0: none.
      checkpoints: where they go, a path or an address (gs://, s3://); empty: into the run folder.
      allow_changes: resume although settings have changed; they are listed all the same.
      progress: show the bar; tensorboard: write event files; wandb: project to log to, empty: none.
      profile_steps: steps to trace, FIRST:LAST; peak_tflops: of a device, where it is not known.
      max_bad_steps: updates in a row with a NaN or infinite loss or gradient that are skipped
        before the run stops.
      watch: see `WatchConfig`.
    """

    steps: int = 100
    save_every: int = 50
    keep: int = 2
    keep_every: int = 0
    checkpoints: str = ""
    allow_changes: bool = False
    progress: bool = True
    tensorboard: bool = False
    wandb: str = ""
    profile_steps: str = ""
    peak_tflops: float = 0.0
    max_bad_steps: int = 3
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self):
        parse_steps(self.profile_steps)
        if min(self.save_every, self.keep_every, self.max_bad_steps) < 0 or self.keep < 1:
            raise UserError(
                f"run: keep={self.keep} is at least 1; save_every={self.save_every},"
                f" keep_every={self.keep_every} and max_bad_steps={self.max_bad_steps} at least 0."
            )


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
    describe: Callable[[int], Mapping[str, Any]] = lambda step: {},
    work: Work | None = None,
    sources: Sequence[str] = (),
) -> tuple[TrainState, list[Record]]:
    """Trains to `cfg.steps`, resuming from the newest whole checkpoint.

    Resumed equals uninterrupted bit for bit on the same mesh: the batch is a function of the step
    and the state holds everything else.

    Args:
      folder: of the log, the alerts and (unless `cfg` names another place) the checkpoints; a
        file STOP in it, or SIGTERM, ends the run after the current step.
      frozen: arguments of the loss that are not trained (the base model under an adapter).
      settings: JSON values that a resumed run must share with the one that wrote the checkpoint.
      describe: numbers for the log that are known before step k (0 the first): lr, adam_beta2...
      work: FLOPs of a token, for the utilisation; sources: names of the data sources.

    Returns: the final state and the metrics of every step, those before a resume included.

    Raises:
      Stopped: somebody asked for it; the state is saved and the same call goes on.
      UserError: the watch says stop, or the checkpoint does not fit.
    """
    jitted = jax.jit(step_fn, donate_argnums=0)
    settings = dict(settings or {})
    with ExitStack() as open_until_end:
        enter = open_until_end.enter_context
        stop = enter(StopRequests(folder))
        where = cfg.checkpoints or folder / "checkpoints"
        checkpoints = enter(Checkpoints(where, keep=cfg.keep, keep_every=cfg.keep_every))
        start, state = _resumed(checkpoints, state, settings, cfg)
        on_record = enter(_observers(cfg, folder, name, start))
        log = enter(_step_log(cfg, folder, name, start, work, sources, on_record))
        profiler = enter(Profiler(parse_steps(cfg.profile_steps), folder / "trace"))
        waited = 0.0  # seconds the loop stood still for the checkpoint before this step
        for step in range(start, cfg.steps):
            profiler.before(step + 1, state)
            clock = time.perf_counter()
            batch = batch_at(step)
            told = {"data_seconds": time.perf_counter() - clock, "save_seconds": waited}
            state, metrics = jitted(state, batch, frozen)
            log.step(step + 1, {**metrics, **batch_facts(batch), **told, **describe(step)})
            profiler.after(step + 1, state)
            reason, waited = stop.reason(), 0.0
            if reason or step + 1 == cfg.steps or _due(step + 1, cfg.save_every):
                log.flush()  # a checkpoint never knows a step that the log does not
                clock = time.perf_counter()
                checkpoints.save(step + 1, state, settings)
                waited = time.perf_counter() - clock
            if reason and step + 1 < cfg.steps:
                raise Stopped(
                    f"{name}: stopped by {reason} after step {step + 1} of {cfg.steps}, which is"
                    " saved; the same command goes on."
                )
    return state, log.records


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _resumed(
    checkpoints: Checkpoints, state: TrainState, settings: Mapping[str, Any], cfg: RunConfig
) -> tuple[int, TrainState]:
    """Returns the step to go on from and the state there."""
    newest = checkpoints.latest()
    if newest is None:
        return 0, state
    if cfg.allow_changes and jax.process_index() == 0:
        for line in changes(checkpoints.settings(newest), settings):
            print(f"resumed with a change: {line}", file=sys.stderr, flush=True)
    return checkpoints.restore(state, expect=settings, allow_changes=cfg.allow_changes)


def _step_log(
    cfg: RunConfig,
    folder: Path,
    name: str,
    start: int,
    work: Work | None,
    sources: Sequence[str],
    on_record: Callable[[Record], None],
) -> StepLog:
    """Makes the log; what its utilisation means goes into utilisation.json beside it."""
    primary = jax.process_index() == 0
    if work is not None and primary:
        text = json.dumps(asdict(work), indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "utilisation.json").write_text(text, encoding="utf-8")
    return StepLog(
        folder / "steps.jsonl",
        name=name,
        start=start,
        total=cfg.steps,
        progress=cfg.progress,
        work=work,
        sources=sources,
        on_record=on_record,
        primary=primary,
    )


@contextmanager
def _observers(
    cfg: RunConfig, folder: Path, name: str, start: int
) -> Iterator[Callable[[Record], None]]:
    """Yields what every record is shown to: the sinks first, the watch (which may stop) last."""
    primary = jax.process_index() == 0
    with ExitStack() as open_until_end:
        enter = open_until_end.enter_context
        writes = []
        if cfg.tensorboard and primary:
            writes.append(enter(sinks.tensorboard(folder / "tensorboard", start=start)))
        if cfg.wandb and primary:
            writes.append(enter(sinks.wandb(folder, project=cfg.wandb, name=name)))
        bad = cfg.max_bad_steps
        watch = enter(Watch(cfg.watch, folder, name=name, max_bad_steps=bad, primary=primary))

        def on_record(record: Record) -> None:
            for write in writes:
                write(record)
            watch.check(record)

        yield on_record
