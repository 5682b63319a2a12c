"""Optimizers from optax, chosen by a frozen config: clip -> scale -> decay -> rate.

One chain serves all of them; only the middle part differs. Leaves are told apart by their path
("layers/w_up"), because stacked layers hide the rank: a stacked norm is [L, D].
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from internjax.errors import UserError
from internjax.train.adam8 import scale_by_adam8
from internjax.train.mup import lr_multiplier
from internjax.train.schedule import SCHEDULES, beta2_at, check_shares, rate_at
from internjax.tree import Params


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with a warm-up and a decay; the defaults are AdamW (arXiv:1711.05101).

    Fields:
      name: "adamw", "adam8bit" (its moments in 8 bits), "lion" (arXiv:2302.06675; b2 about 0.99,
        a third of AdamW's rate), "muon" (arXiv:2502.16982: matrices of the layers orthogonalised,
        the rest by Adam, one rate for both) or "adafactor" (arXiv:1804.04235, without momentum).
      lr: peak learning rate; final_lr_fraction: of the peak, at the last step.
      warmup_fraction: of all steps, rising linearly from 0.
      schedule: "cosine", "linear" or "constant" after the warm-up; "wsd" stays at the peak and
        falls linearly over the last decay_fraction of all steps.
      b1, b2, eps: Adam's and Lion's; Muon's momentum is 0.95, for its Adam they count.
      b2_power: c > 0 raises Adam's b2 at update k to max(b2, 1 - 1 / k^c); 0 keeps it.
      weight_decay: pull to zero, a unit of learning rate; no_decay: regular expressions of whole
        paths that it spares.
      clip_norm: bound on the global gradient norm; 0 switches clipping off.
      lr_multipliers: regular expression of whole paths -> factor on the rate; all matches count.
      base_width: d_model at which lr was chosen; the rates of other widths follow from it (muP,
        arXiv:2203.03466); 0: one rate for all widths.
    """

    name: Literal["adamw", "adam8bit", "lion", "muon", "adafactor"] = "adamw"
    lr: float = 1e-4
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.03
    decay_fraction: float = 0.1
    final_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    b2_power: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (r".*norm.*", r"(.*/)?b[qkvo]")
    clip_norm: float = 1.0
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    base_width: int = 0

    def __post_init__(self):
        for pattern in (*self.no_decay, *self.lr_multipliers):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{pattern!r} is no regular expression of parameter paths: {error}."
                ) from error
        if self.b2_power and self.name not in ("adamw", "adam8bit"):
            raise UserError(f"b2_power={self.b2_power} is Adam's: {self.name} keeps its b2 fixed.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule={self.schedule!r}: legal are {', '.join(SCHEDULES)}.")
        check_shares(self)


def make_schedule(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the number of updates done."""
    return rate_at(cfg, total_steps)


def make_optimizer(
    cfg: OptimConfig, total_steps: int, *, width: int | None = None
) -> optax.GradientTransformation:
    """Makes clip -> scale -> decay -> multipliers -> schedule as `cfg` says.

    Args:
      width: d_model of the model that is trained; needed with base_width only.
    """
    if cfg.base_width and width is None:
        raise UserError(f"base_width={cfg.base_width}: the width of the model is not known here.")

    def decays(params: Params) -> Params:
        return map_paths(lambda path, _: not _matches(cfg.no_decay, path), params)

    def multiplier(path: str) -> float:
        factor = lr_multiplier(path, width, cfg.base_width) if cfg.base_width else 1.0
        for pattern, extra in cfg.lr_multipliers.items():
            factor *= extra if re.fullmatch(pattern, path) else 1.0
        return factor

    parts = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    parts.append(_SCALES[cfg.name](cfg))
    parts.append(optax.add_decayed_weights(cfg.weight_decay, decays))
    if cfg.base_width or cfg.lr_multipliers:
        parts.append(_scale_by_path(multiplier))
    parts.append(optax.scale_by_learning_rate(make_schedule(cfg, total_steps)))
    return optax.chain(*parts)


def map_paths(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies `fn(path, leaf)` to every leaf of any tree, its path joined by "/"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _scale_by_path(multiplier: Callable[[str], float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: map_paths(lambda path, update: update * multiplier(path), updates)
    )


def _adamw(cfg: OptimConfig) -> optax.GradientTransformation:
    if not cfg.b2_power:
        return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    # The bias correction 1 - b2^k takes the b2 of update k, as InternEvo's FusedAdam does.
    return optax.inject_hyperparams(optax.scale_by_adam, static_args=("b1", "eps"))(
        b1=cfg.b1, b2=lambda done: beta2_at(cfg.b2, cfg.b2_power, done), eps=cfg.eps
    )


def _adam8bit(cfg: OptimConfig) -> optax.GradientTransformation:
    return scale_by_adam8(cfg.b1, lambda done: beta2_at(cfg.b2, cfg.b2_power, done), cfg.eps)


def _lion(cfg: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(cfg.b1, cfg.b2)


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
    # Of a stacked leaf the two largest dims are factored, so every layer keeps its own statistics
    # as long as there are fewer layers than entries of the other dims.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(cfg: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for embedding, head, norms and biases."""

    def labels(params: Params) -> Params:
        found = map_paths(lambda path, _: "muon" if matrix_dims(path) else "adam", params)
        if "muon" not in jax.tree.leaves(found):
            raise UserError(
                "optim.name=muon: none of the parameters is a matrix of a layer (an adapter's"
                " factors are none); take adamw, adam8bit, lion or adafactor."
            )
        return found

    def dims(params: Params) -> Params:
        return map_paths(lambda path, _: matrix_dims(path), params)

    def as_large_as_adamw(updates: Params, _: Any) -> Params:
        # Root mean square 0.2 an entry, so that both share a rate (arXiv:2502.16982, eq. 4).
        return map_paths(lambda path, u: u * 0.2 * _longer_side(path, u.shape) ** 0.5, updates)

    muon = optax.chain(
        automatic(optax.contrib.scale_by_muon(weight_dimension_numbers=dims)),
        optax.stateless(as_large_as_adamw),
    )
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    return optax.partition({"muon": muon, "adam": adam}, labels)


# Dims of one layer that are the matrix's input and output; all before them are a batch of layers.
_MATRIX_DIMS = {
    **dict.fromkeys(("wq", "wk", "wv"), MuonDimensionNumbers(-3, (-2, -1))),  # [..., D, N, H]
    "wo": MuonDimensionNumbers((-3, -2), -1),  # [..., N, H, D]
    **dict.fromkeys(("w_gate", "w_up", "w_down"), MuonDimensionNumbers(-2, -1)),
}


def matrix_dims(path: str) -> MuonDimensionNumbers | None:
    """Returns which dims of a layer's weight are rows and columns; None for what is no matrix."""
    return _MATRIX_DIMS.get(path.rpartition("/")[2])


def _longer_side(path: str, shape: tuple[int, ...]) -> int:
    dims = matrix_dims(path)
    sides = [(side,) if isinstance(side, int) else side for side in dims]
    return max(math.prod(shape[dim] for dim in side) for side in sides)


def automatic(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets the compiler choose the shardings inside `tx.update` on a mesh of explicit axes.

    Products and reshapes across sharded dims (Muon's X X^T) are ambiguous there; what goes in and
    out keeps its sharding.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return tx.update(grads, state, params)
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        inside = jax.sharding.auto_axes(lambda g, s: tx.update(g, s), out_sharding=out)
        return inside(grads, state)

    return optax.GradientTransformation(tx.init, update)


_SCALES = {
    "adamw": _adamw,
    "adam8bit": _adam8bit,
    "lion": _lion,
    "muon": _muon,
    "adafactor": _adafactor,
}
