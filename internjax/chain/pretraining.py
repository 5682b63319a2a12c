"""Continual pretraining of a model on token shards: every token of every document counts."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.data.loader import ReadAhead
from internjax.data.mixture import Mixture, MixtureConfig, WeightsFrom
from internjax.data.pack import pack
from internjax.data.schedule import BatchPlan
from internjax.data.shards import TokenShards
from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.load import Model
from internjax.models.remat import Remat
from internjax.telemetry import work_of
from internjax.train.gradients import Gradients
from internjax.train.loop import RunConfig, fit
from internjax.train.losses import LossConfig, Stages
from internjax.train.optim import OptimConfig, make_optimizer, optimizer_facts
from internjax.train.place import ONE_DEVICE, Placement, placement
from internjax.train.scale import ScaleConfig
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import Params


@dataclass(frozen=True)
class PretrainConfig:
    """How a model is trained on plain documents.

    Fields:
      batch_size: rows an update; length: tokens a row; micro_batches: parts of a batch whose
        gradients are added; seed: of the order.
      packing, weights: see `MixtureConfig`; rampup, skip_batches: see `BatchPlan`.
      dtype: of the computation, beside master weights as they are; "" the model's own. float16
        scales its loss by `scaling`. matmul: "fp8" for products of 8 bits.
      reduce_dtype: in which gradients travel between devices; "" as they are accumulated.
      loss, remat, optim, run: see `LossConfig`, `Remat`, `OptimConfig` and `RunConfig`.
    """

    batch_size: int = 4
    length: int = 256
    micro_batches: int = 1
    packing: Literal["first_fit", "apart", "concat"] = "first_fit"
    weights: tuple[WeightsFrom, ...] = ()
    rampup: str = ""
    skip_batches: str = ""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    matmul: Literal["", "fp8"] = ""
    reduce_dtype: Literal["", "float32", "bfloat16"] = ""
    seed: int = 0
    scaling: ScaleConfig = ScaleConfig()
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
    train: TokenShards | Mapping[str, TokenShards],
    heldout: TokenShards | Mapping[str, TokenShards],
    cfg: PretrainConfig,
    folder: Path,
    *,
    mesh: MeshConfig | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains on `train`; returns the trained model and what changed on `heldout`.

    Args:
      train: one source of documents, or several by name.
      folder: of checkpoints and the step log; a run that was stopped goes on there.
      mesh: devices to run on; no setting of the result, which is the same but for rounding, so a
        run may go on on another mesh.

    Metrics: bits per byte of the held-out documents before and after, tokens trained on, and the
      loss of every step.
    """
    check_length(cfg.length, model.cfg)
    mixture = mixture_of(train, cfg, model.cfg)
    tx = make_optimizer(cfg.optim, cfg.run.steps, width=model.cfg.d_model)
    scaling = cfg.scaling if cfg.dtype == "float16" else None
    with placement(mesh or MeshConfig()) as place:
        for size in mixture.plan.sizes:
            place.check(model.cfg, size, cfg.length, cfg.micro_batches)
        # A copy: the loop donates its state, and the caller keeps the model it gave.
        params = place.params(jax.tree.map(jnp.copy, model.params), model.cfg)
        before = bits_per_byte(params, heldout, model.cfg, cfg.length, place)
        with closing(ReadAhead(mixture.batch_at, stop=cfg.run.steps)) as read:
            state, records = fit(
                init_state(params, tx, scaling),
                make_train_step(
                    make_program(model.cfg, cfg, place, len(mixture.names)), tx, scaling=scaling
                ),
                lambda step: place.batch(read(step)),
                cfg.run,
                folder,
                name="pretrain",
                settings=settings_of(cfg)
                | {"mixture": mixture.settings(), "model": dataclasses.asdict(model.cfg)},
                describe=optimizer_facts(cfg.optim, cfg.run.steps),
                work=work_of(
                    model.cfg,
                    length=cfg.length,
                    remat=cfg.remat.fraction if cfg.remat.policy == "full" else 0.0,
                    devices=place.cfg.num_devices,
                    device=jax.devices()[0].device_kind,
                    peak_tflops=cfg.run.peak_tflops,
                ),
                sources=mixture.names,
            )
        after = bits_per_byte(state.params, heldout, model.cfg, cfg.length, place)
        params = place.whole(state.params)
    metrics = {
        "heldout_bits_per_byte_before": before,
        "heldout_bits_per_byte_after": after,
        "train_tokens": sum(int(r["num_tokens"]) for r in records),
        "steps": len(records),
        "loss": [r["loss"] for r in records],
        "tokens_per_second": median_rate(records),
    }
    return dataclasses.replace(model, params=params), metrics


def mixture_of(
    train: TokenShards | Mapping[str, TokenShards], cfg: PretrainConfig, model: ModelConfig
) -> Mixture:
    """Makes the endless stream of rows that a run reads."""
    plan = BatchPlan(cfg.batch_size, rampup=cfg.rampup, skip_batches=cfg.skip_batches)
    rows = MixtureConfig(cfg.length, cfg.packing, cfg.weights, cfg.seed)
    return Mixture(_by_name(train), plan, rows, vocab_size=model.vocab_size)


def _by_name(sources: TokenShards | Mapping[str, TokenShards]) -> dict[str, TokenShards]:
    return {"train": sources} if isinstance(sources, TokenShards) else dict(sources)


def make_program(
    model: ModelConfig, cfg: PretrainConfig, place: Placement, num_sources: int = 0
) -> Gradients:
    """Makes the gradients of a pretraining step; what a plan compiles is the same."""
    if cfg.dtype:
        model = dataclasses.replace(model, dtype=cfg.dtype)
    return place.gradients(
        Stages(model, cfg.loss, cfg.remat, place.par, num_sources, cfg.matmul),
        micro_batches=cfg.micro_batches,
        dtype=cfg.dtype or None,
        reduce_dtype=cfg.reduce_dtype or None,
    )


def rows_of(shards: TokenShards, length: int) -> list[Batch]:
    """Packs documents into rows in which no document sees another."""
    return list(pack(((ids, np.ones(len(ids), np.int8)) for ids in shards), length))


def bits_per_byte(
    params: Params,
    shards: TokenShards | Mapping[str, TokenShards],
    cfg: ModelConfig,
    length: int,
    place: Placement = ONE_DEVICE,
) -> float:
    """Returns -log2 p(documents) / UTF-8 bytes.

    Documents are cut into pieces of `length`; the first token of a piece is not scored, the same
    for every model, so figures compare with each other but not with other tools'.
    """
    sources = _by_name(shards).values()
    rows = [row for source in sources for row in rows_of(source, length)]
    if not rows:
        names = ", ".join(str(source.path) for source in sources)
        raise UserError(f"{names}: holds no document to score.")
    size = 4 * place.cfg.row_ways * place.cfg.pipe
    total = sum(
        float(_nll_sum(params, place.batch(batch), cfg, place)) for batch in _stacked(rows, size)
    )
    return total / math.log(2) / sum(source.num_bytes for source in sources)


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
