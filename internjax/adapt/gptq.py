"""GPTQ: 4-bit integers chosen one input after the other, the rest taking up the error.

After arXiv:2210.17323: rounding input i of a weight leaves an error that the inputs not yet rounded
can make good, by the inverse of the inputs' Gram matrix.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.adapt.calibrate import READS, Inputs
from internjax.adapt.folding import matrix
from internjax.adapt.lora import NUM_IN
from internjax.adapt.rounding import STEPS, grouped, integer_grid, quant_weight
from internjax.errors import UserError
from internjax.tree import Params


@dataclass(frozen=True)
class GptqConfig:
    """How the error is handed on.

    Fields:
      damp: share of the mean of the Gram matrix's diagonal that is added to it.
      act_order: inputs with the largest activations first. The grids are then those of the weights
        as they were ("static groups"), so that groups stay runs of neighbours.
    """

    damp: float = 0.01
    act_order: bool = False

    def __post_init__(self):
        if not 0 < self.damp < 1:
            raise UserError(f"gptq.damp={self.damp}: it must lie between 0 and 1.")


def gptq_layer(
    layer: Params,
    inputs: dict[str, Inputs],
    targets: tuple[str, ...],
    group: int,
    cfg: GptqConfig,
) -> Params:
    """Rounds the target projections of one layer.

    Raises: UserError: the Gram matrix of the inputs has no inverse with this damping.
    """
    rounded, factors = {}, {}
    for name in targets:
        w, read = layer[name], READS[name]
        if read not in factors:
            factors[read] = gptq_factor(inputs[name].gram, cfg)
            if not bool(jnp.isfinite(factors[read][1]).all()):
                raise UserError(
                    f"{name}: the products of its inputs have no inverse; give more calibration"
                    f" text or a larger gptq.damp than {cfg.damp}."
                )
        ins, outs = w.shape[: NUM_IN[name]], w.shape[NUM_IN[name] :]
        grouped(w, NUM_IN[name], group)  # refuses a group that does not fit
        codes, grid = gptq_matrix(matrix(w, name), *factors[read], group, cfg.act_order)
        rounded[name] = quant_weight(codes, *grid, tuple(ins), tuple(outs))
    return {**layer, **rounded}


@partial(jax.jit, static_argnames="cfg")
def gptq_factor(
    gram: Float[Array, "I I"], cfg: GptqConfig
) -> tuple[Int[Array, " I"], Float[Array, "I I"]]:
    """Returns the order of the inputs, and in it the upper Cholesky factor of gram's inverse."""
    diagonal = jnp.diagonal(gram)
    order = jnp.argsort(-diagonal) if cfg.act_order else jnp.arange(len(gram))
    # An input that is always 0 has a row of zeros; 1 there leaves its weights to themselves.
    damped = gram + jnp.diag(jnp.where(diagonal > 0, cfg.damp * diagonal.mean(), 1.0))
    return order, jnp.linalg.cholesky(jnp.linalg.inv(damped[order][:, order])).T


@partial(jax.jit, static_argnames=("group", "act_order"))
def gptq_matrix(
    w: Float[Array, "I O"],
    order: Int[Array, " I"],
    upper: Float[Array, "I I"],
    group: int,
    act_order: bool,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns codes `[G, g, O]` and the (scales, zeros) `[G, O]` of their grids.

    Args:
      order, upper: of the inputs, see `gptq_factor`; act_order: grids are those of `w` as it is.
    """
    rows, columns = w.shape
    static = grouped(w, 1, group)[0]
    static = integer_grid(static.min(axis=1), static.max(axis=1))

    def of_rows(w: Array, start: Array) -> tuple[Array, Array]:
        """Scales and zeros of the rows to be rounded next, `[g, O]`, and of their group."""
        at = lax.dynamic_slice_in_dim(order, start, group) // group
        if act_order:
            return tuple(x[at].astype(jnp.float32) for x in static)
        block = lax.dynamic_slice_in_dim(w, start, group)
        grid = integer_grid(block.min(axis=0), block.max(axis=0))
        return tuple(jnp.broadcast_to(x.astype(jnp.float32), block.shape) for x in grid)

    def group_step(w: Array, start: Array):
        scales, zeros = of_rows(w, start)
        across = lax.dynamic_slice_in_dim(upper, start, group)  # [g, I]
        own = lax.dynamic_slice_in_dim(across, start, group, axis=1)  # [g, g]

        def row_step(i: Array, carry):
            block, codes, errors = carry
            code = jnp.clip(jnp.round(block[i] / scales[i] + zeros[i]), 0, STEPS)
            error = (block[i] - (code - zeros[i]) * scales[i]) / own[i, i]
            later = jnp.where(jnp.arange(group) > i, own[i], 0.0)
            block = block - later[:, None] * error[None]
            return block, codes.at[i].set(code), errors.at[i].set(error)

        block = lax.dynamic_slice_in_dim(w, start, group)
        empty = jnp.zeros_like(block)
        _, codes, errors = lax.fori_loop(0, group, row_step, (block, empty, empty))
        behind = jnp.where(jnp.arange(rows)[None] >= start + group, across, 0.0)
        return w - behind.T @ errors, (codes.astype(jnp.uint8), scales[0], zeros[0])

    ordered = w[order]
    _, (codes, scales, zeros) = lax.scan(group_step, ordered, jnp.arange(0, rows, group))
    codes = jnp.zeros((rows, columns), jnp.uint8).at[order].set(codes.reshape(rows, columns))
    grid = static if act_order else (scales.astype(jnp.float16), zeros.astype(jnp.float16))
    return codes.reshape(-1, group, columns), grid
