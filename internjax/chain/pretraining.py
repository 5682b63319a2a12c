"""Continual pretraining of a model on token shards: every token of every document counts."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.data.loader import batches
from internjax.data.pack import pack
from internjax.data.shards import TokenShards
from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.load import Model
from internjax.models.remat import Remat
from internjax.train.gradients import Gradients
from internjax.train.loop import RunConfig, fit
from internjax.train.losses import LossConfig, Stages
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.place import ONE_DEVICE, Placement, placement
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import Params


@dataclass(frozen=True)
class PretrainConfig:
    """How a model is trained on plain documents.

    Fields:
      batch_size: rows an update; length: tokens a row; micro_batches: parts of a batch whose
        gradients are added; seed: of the order.
      dtype: of the computation, beside master weights as they are; "" the model's own.
      reduce_dtype: in which gradients travel between devices; "" as they are accumulated.
      loss, remat, optim, run: see `LossConfig`, `Remat`, `OptimConfig` and `RunConfig`.
    """

    batch_size: int = 4
    length: int = 256
    micro_batches: int = 1
    dtype: Literal["", "float32", "bfloat16"] = ""
    reduce_dtype: Literal["", "float32", "bfloat16"] = ""
    seed: int = 0
    loss: LossConfig = LossConfig()
    remat: Remat = Remat("dots")
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    run: RunConfig = field(default_factory=lambda: RunConfig(steps=8, save_every=0))

    def __post_init__(self):
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of micro_batches="
                f"{self.micro_batches}: every part must have as many rows."
            )


def pretrain(
    model: Model,
    train: TokenShards,
    heldout: TokenShards,
    cfg: PretrainConfig,
    folder: Path,
    *,
    mesh: MeshConfig | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains on `train`; returns the trained model and what changed on `heldout`.

    Args:
      folder: of checkpoints and the step log; a run that was stopped goes on there.
      mesh: devices to run on; no setting of the result, which is the same but for rounding, so a
        run may go on on another mesh.

    Metrics: bits per byte of the held-out documents before and after, tokens trained on, and the
      loss of every step.
    """
    check_length(cfg.length, model.cfg)
    rows = rows_of(train, cfg.length)
    tx = make_optimizer(cfg.optim, cfg.run.steps)
    batch_at = batches(rows, cfg.batch_size, seed=cfg.seed)
    with placement(mesh or MeshConfig()) as place:
        place.check(model.cfg, cfg.batch_size, cfg.length, cfg.micro_batches)
        gradients = make_program(model.cfg, cfg, place)
        # A copy: the loop donates its state, and the caller keeps the model it gave.
        params = place.params(jax.tree.map(jnp.copy, model.params), model.cfg)
        before = bits_per_byte(params, heldout, model.cfg, cfg.length, place)
        state, records = fit(
            init_state(params, tx),
            make_train_step(gradients, tx),
            lambda step: place.batch(batch_at(step)),
            cfg.run,
            folder,
            name="pretrain",
            settings=settings_of(cfg),
        )
        after = bits_per_byte(state.params, heldout, model.cfg, cfg.length, place)
        params = place.joined(state.params)
    metrics = {
        "heldout_bits_per_byte_before": before,
        "heldout_bits_per_byte_after": after,
        "train_tokens": sum(int(r["num_tokens"]) for r in records),
        "steps": len(records),
        "loss": [r["loss"] for r in records],
        "tokens_per_second": median_rate(records),
    }
    return dataclasses.replace(model, params=params), metrics


def make_program(model: ModelConfig, cfg: PretrainConfig, place: Placement) -> Gradients:
    """Makes the gradients of a pretraining step; what a plan compiles is the same."""
    if cfg.dtype:
        model = dataclasses.replace(model, dtype=cfg.dtype)
    return place.gradients(
        Stages(model, cfg.loss, cfg.remat, place.par),
        micro_batches=cfg.micro_batches,
        dtype=cfg.dtype or None,
        reduce_dtype=cfg.reduce_dtype or None,
    )


def rows_of(shards: TokenShards, length: int) -> list[Batch]:
    """Packs documents into rows in which no document sees another."""
    return list(pack(((ids, np.ones(len(ids), np.int8)) for ids in shards), length))


def bits_per_byte(
    params: Params,
    shards: TokenShards,
    cfg: ModelConfig,
    length: int,
    place: Placement = ONE_DEVICE,
) -> float:
    """Returns -log2 p(documents) / UTF-8 bytes.

    Documents are cut into pieces of `length`; the first token of a piece is not scored, the same
    for every model, so figures compare with each other but not with other tools'.
    """
    rows = rows_of(shards, length)
    if not rows:
        raise UserError(f"{shards.path}: holds no document to score.")
    size = 4 * place.cfg.row_ways * place.cfg.pipe
    total = sum(
        float(_nll_sum(params, place.batch(batch), cfg, place)) for batch in _stacked(rows, size)
    )
    return total / math.log(2) / shards.num_bytes


def _stacked(rows: list[Batch], size: int) -> Iterable[Batch]:
    """Stacks rows to batches of one size; the last is filled with rows that do not count."""
    blank = jax.tree.map(np.zeros_like, rows[0])
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        part = part + [blank] * (size - len(part))
        yield jax.tree.map(lambda *xs: np.stack(xs), *part)


@partial(jax.jit, static_argnames=("cfg", "place"))
def _nll_sum(params: Params, batch: Batch, cfg: ModelConfig, place: Placement) -> jax.Array:
    stages = Stages(cfg, par=place.par)
    return place.parts(stages)(params, batch, None)["nll_sum"]


def check_length(length: int, cfg: ModelConfig) -> None:
    """Refuses rows longer than the model's context, with both numbers."""
    if length > cfg.max_context:
        raise UserError(
            f"length={length} is longer than the context of {cfg.name}, {cfg.max_context} tokens."
        )


def settings_of(cfg: Any) -> dict[str, Any]:
    """Returns the settings that a resumed run must share; how it shows and saves may change."""
    settings = dataclasses.asdict(cfg)
    settings["run"] = {"steps": cfg.run.steps}
    return settings


def median_rate(records: list[dict[str, Any]]) -> float:
    """Returns the median tokens a second, the first step (compilation) left out."""
    rates = [r["tokens_per_second"] for r in records[1:]] or [0.0]
    return float(np.median(rates))
