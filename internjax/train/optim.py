"""Optimizers from optax: schedule, clipping and decay chosen by a frozen config."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax

from internjax.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a decay (arXiv:1711.05101).

    Fields:
      lr: peak learning rate; final_lr_fraction: of the peak, at the last step.
      warmup_fraction: of all steps, rising linearly from 0.
      schedule: "cosine", "linear" or "constant" after the warm-up.
      b1, b2, eps, weight_decay: AdamW's; decay falls on matrices only, not on norms and biases.
      clip_norm: bound on the global gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.03
    final_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def make_schedule(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the step."""
    if total_steps < 1:
        raise UserError(f"steps={total_steps}: training takes at least one step.")
    warmup = min(max(1, round(cfg.warmup_fraction * total_steps)), total_steps)
    rest, final = max(total_steps - warmup, 1), cfg.lr * cfg.final_lr_fraction
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, cfg.final_lr_fraction),
        "linear": lambda: optax.linear_schedule(cfg.lr, final, rest),
        "constant": lambda: optax.constant_schedule(cfg.lr),
    }[cfg.schedule]()
    rise = optax.linear_schedule(cfg.lr / warmup, cfg.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(cfg: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Makes clip -> AdamW with the schedule and the decay mask of `cfg`."""

    def decays(params):
        # Stacked norms are [L, D] and biases [L, N, H]: told by name, not by rank.
        def is_matrix(path, leaf) -> bool:
            name = jax.tree_util.keystr(path)
            return "norm" not in name and not any(
                f"'{b}'" in name for b in ("bq", "bk", "bv", "bo")
            )

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    adam = optax.adamw(
        make_schedule(cfg, total_steps),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decays,
        mu_dtype=None,
    )
    if not cfg.clip_norm:
        return adam
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adam)
