"""Smaller weights of a parameter tree, by one of six methods.

Without data: `rtn` rounds to 4 bits, `lqer` keeps beside it what rounding lost at low rank, `fp8`
rounds to 8-bit floats. With activations of a calibration text: `awq` and `gptq` round to 4 bits
with whole zeros, as published checkpoints have them, `w8a8` rounds weights and activations to int8.

Rounding alone forgets small changes: weights that came from a 4-bit file lie on its grid, and an
adapter moves nearly all of them by less than half a step, so a merged model rounds back to it.
The low-rank residual keeps what was learned (LQER, arXiv:2402.02446; LoftQ, arXiv:2310.08659).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from internjax.adapt.awq import AwqConfig, awq_layer
from internjax.adapt.calibrate import by_layers
from internjax.adapt.gptq import GptqConfig, gptq_layer
from internjax.adapt.lora import NUM_IN, check_targets
from internjax.adapt.rounding import quantize_array, round_to_fp8
from internjax.adapt.smooth import SmoothConfig, smooth_layer
from internjax.adapt.texts import CalibrationConfig, calibration_rows
from internjax.errors import UserError
from internjax.models.load import Model
from internjax.tree import Params
from internjax.weights import LoraWeight, QuantWeight, dequantize

__all__ = ["QuantConfig", "compress", "quantize", "quantize_array", "quantize_on"]

GROUPS = (128, 64, 32)  # the first that divides the inputs of every projection is taken
CALIBRATED = ("awq", "gptq", "w8a8")


@dataclass(frozen=True)
class QuantConfig:
    """How weights are rounded.

    Fields:
      group: weights that share a scale, along the contracted dims. None: 32 of lqer; of other 4-bit
        methods the largest of 128, 64 and 32 that divides; of fp8 all inputs of an output.
      rank: of lqer's float16 residual beside the integers; 0 leaves it out.
      targets: projections that are rounded; embedding, head and norms stay.
      method: rtn, lqer, awq, gptq (4 bits), w8a8 (int8 weights and activations) or fp8 (e4m3).
      calibration: the text of awq, gptq and w8a8; awq, gptq, w8a8: what only these methods have.
    """

    group: int | None = None
    rank: int = 64
    targets: tuple[str, ...] = tuple(NUM_IN)
    method: Literal["rtn", "lqer", "awq", "gptq", "w8a8", "fp8"] = "lqer"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    awq: AwqConfig = field(default_factory=AwqConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    w8a8: SmoothConfig = field(default_factory=SmoothConfig)

    def __post_init__(self):
        if self.method == "w8a8" and self.group is not None:
            raise UserError(
                f"group={self.group}: w8a8 has one scale for each output; leave group empty."
            )
        if self.group is not None and self.group < 2:
            raise UserError(f"group={self.group}: legal are even numbers from 2.")


def compress(model: Model, cfg: QuantConfig) -> Params:
    """Returns a model's tree with rounded weights; makes the calibration rows where needed."""
    if cfg.method not in CALIBRATED:
        return quantize(model.params, cfg)
    return quantize_on(model, cfg, calibration_rows(model, cfg.calibration))


def quantize_on(model: Model, cfg: QuantConfig, rows: Int[Array | np.ndarray, "S T"]) -> Params:
    """Rounds by a method that looks at activations, those of `rows` of token ids.

    Raises: UserError: a target is no plain array, the group does not fit, the model has experts.
    """
    layers = model.params["layers"]
    _check_plain(layers, cfg.targets)
    if cfg.method == "w8a8":
        treat = partial(smooth_layer, targets=cfg.targets, cfg=cfg.w8a8)
    else:
        group = _group(layers, cfg)
        layer, own = {"awq": (awq_layer, cfg.awq), "gptq": (gptq_layer, cfg.gptq)}[cfg.method]
        treat = partial(layer, targets=cfg.targets, group=group, cfg=own)
    return by_layers(model.params, model.cfg, jnp.asarray(rows), treat)


def quantize(params: Params, cfg: QuantConfig) -> Params:
    """Rounds by a method that needs no data: rtn, lqer or fp8."""
    if cfg.method in CALIBRATED:
        raise UserError(f"method={cfg.method} needs a model and text, see `compress`.")
    layers = dict(params["layers"])
    _check_plain(layers, cfg.targets)
    group = cfg.group if cfg.method == "fp8" else _group(layers, cfg)
    for name in cfg.targets:
        w = layers[name]
        if cfg.method == "fp8":
            layers[name] = round_to_fp8(w, NUM_IN[name], group, lead=1)
            continue
        rounded = quantize_array(w, NUM_IN[name], group, lead=1)
        residual = cfg.method == "lqer" and cfg.rank
        layers[name] = _with_residual(w, rounded, cfg.rank) if residual else rounded
    return {**params, "layers": layers}


def _check_plain(layers: Params, targets: Sequence[str]) -> None:
    """Refuses projections that the model lacks, and what is no plain array."""
    check_targets(targets, layers, "the model")
    for name in targets:
        if not hasattr(layers[name], "dtype"):
            raise UserError(f"layers/{name} is no plain array: merge adapters before quantizing.")


def _group(layers: Params, cfg: QuantConfig) -> int:
    """The group that was asked for, or the method's own choice."""
    if cfg.group is not None:
        return cfg.group
    if cfg.method == "lqer":
        return 32
    dims = {n: layers[n].shape[1 : 1 + NUM_IN[n]] for n in cfg.targets}
    rows = {n: math.prod(ins) for n, ins in dims.items()}
    fits = [g for g in GROUPS if all(r % g == 0 for r in rows.values())]
    if not fits:
        have = ", ".join(f"{n} {r}" for n, r in rows.items())
        raise UserError(
            f"none of the groups {GROUPS} divides the inputs of every projection ({have}): give"
            " group=."
        )
    return fits[0]


def _with_residual(w: Float[Array, "L *S"], rounded: QuantWeight, rank: int) -> LoraWeight:
    """Returns the rounded weight with the best rank-`rank` part of its error beside it."""
    ins, outs = rounded.in_shape, rounded.out_shape
    error = (w - dequantize(rounded, w.dtype)).reshape(len(w), math.prod(ins), math.prod(outs))
    a, b = jax.jit(_low_rank, static_argnums=1)(error.astype(jnp.float32), rank)
    a, b = a.astype(jnp.float16), b.astype(jnp.float16)
    return LoraWeight(
        rounded, a.reshape(len(w), *ins, -1), b.reshape(len(w), b.shape[1], *outs), scale=1.0
    )


def _low_rank(error: Float[Array, "L I O"], rank: int) -> tuple[Array, Array]:
    """Returns a `[L, I, R]` with orthonormal columns and b `[L, R, O]`, a b close to the error.

    Randomized subspace iteration (arXiv:0909.4061, algorithm 4.4), with a fixed key.
    """
    L, I, O = error.shape
    probe = jax.random.normal(jax.random.key(0), (L, O, min(rank, I, O)), error.dtype)
    a, _ = jnp.linalg.qr(error @ probe)
    for _ in range(1):
        across, _ = jnp.linalg.qr(error.swapaxes(1, 2) @ a)
        a, _ = jnp.linalg.qr(error @ across)
    return a, a.swapaxes(1, 2) @ error
