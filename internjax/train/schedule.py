"""What changes with the number of updates done: the learning rate and Adam's beta2."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from internjax.errors import UserError

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def check_shares(cfg: Any) -> None:
    """Refuses shares of the run that are none, with their names."""
    for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction"):
        if not 0 <= (share := getattr(cfg, name)) <= 1:
            raise UserError(f"{name}={share}: a share lies between 0 and 1.")
    if cfg.schedule == "wsd" and cfg.warmup_fraction + cfg.decay_fraction > 1:
        raise UserError(
            f"warmup_fraction={cfg.warmup_fraction} and decay_fraction={cfg.decay_fraction} are"
            " more than the whole run: with schedule=wsd they must add up to 1 at most."
        )


def rate_at(cfg: Any, total_steps: int) -> optax.Schedule:
    """Makes the learning rate of an `OptimConfig` as a function of the updates done.

    The rise takes at least one update and never gives 0; the last fall ends at the last update.
    "wsd" is warm-up, stable, decay (arXiv:2404.06395), falling linearly.
    """
    if total_steps < 1:
        raise UserError(f"steps={total_steps}: training takes at least one step.")
    warmup = min(max(1, round(cfg.warmup_fraction * total_steps)), total_steps)
    rest, final = max(total_steps - warmup, 1), cfg.lr * cfg.final_lr_fraction
    rise = optax.linear_schedule(cfg.lr / warmup, cfg.lr, max(warmup - 1, 1))
    if cfg.schedule == "wsd":
        fall = min(max(1, round(cfg.decay_fraction * total_steps)), rest)
        stable = optax.constant_schedule(cfg.lr)
        decay = optax.linear_schedule(cfg.lr, final, fall)
        return optax.join_schedules([rise, stable, decay], [warmup, warmup + rest - fall])
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, cfg.final_lr_fraction),
        "linear": lambda: optax.linear_schedule(cfg.lr, final, rest),
        "constant": lambda: optax.constant_schedule(cfg.lr),
    }[cfg.schedule]()
    return optax.join_schedules([rise, after], [warmup])


def beta2_at(init: float, power: float, done: Any) -> Array:
    """Returns Adam's beta2 of the next update: max(init, 1 - 1 / k^power) at update k = done + 1.

    InternEvo's Beta2Scheduler (k from 1); power 0 keeps `init`.
    """
    if not power:
        return jnp.float32(init)
    count = jnp.asarray(done, jnp.float32) + 1
    return jnp.maximum(jnp.float32(init), 1 - count ** -jnp.float32(power))
