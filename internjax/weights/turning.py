"""4-bit weights in the order of Hopper's tensor cores."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from internjax.kernels.platform import choose, not_for_hopper
from internjax.weights.kinds import QuantWeight, TurnedWeight, Weight
from internjax.weights.spec import rows_of


def turned(w: QuantWeight | TurnedWeight) -> TurnedWeight:
    """Orders 4-bit integers for Hopper's tensor cores, once; every number stays as it was."""
    if isinstance(w, TurnedWeight):
        return w
    from internjax.kernels.gpu.quant_matmul import from_int4  # a second that only GPUs pay

    factors = (x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in (w.scales, w.zeros))
    return TurnedWeight(*from_int4(w.values, *factors), w.in_shape, w.out_shape)


def on_tensor_cores(x: Float[Array, "*B"], w: Weight) -> bool:
    """Whether Hopper's kernel multiplies x by 4-bit integers as they are; said in the log once."""
    legal = {"xla": None, "pallas": not_for_hopper() or _not_served(x, w)}
    best = "xla" if legal["pallas"] else "pallas"
    return choose("4-bit weights", None, legal, best=best) == "pallas"


def _not_served(x: Array, w: QuantWeight | TurnedWeight) -> str | None:
    from internjax.kernels.gpu.quant_matmul import why_not

    return why_not(x, as_matrix(jax.eval_shape(turned, w)))


def as_matrix(w: QuantWeight | TurnedWeight):
    """Returns a 4-bit weight as the GPU kernels take it, `quant_matmul.Matrix`."""
    from internjax.kernels.gpu.quant_matmul import Matrix

    w = turned(w)
    return Matrix(w.values, w.scales, w.zeros)


def turned_einsum(spec: str, x: Array, w: QuantWeight | TurnedWeight) -> Array:
    """Contracts activations with a weight by the GPU kernel."""
    from internjax.kernels.gpu.quant_matmul import quant_matmul

    lead, rows = rows_of(spec, x)
    y = quant_matmul(rows, as_matrix(w), implementation="pallas")
    return y.reshape(*lead, *w.out_shape)


def unturned(w: TurnedWeight, dtype) -> Array:
    """Expands `[*lead, *in_shape, *out_shape]`."""
    from internjax.kernels.gpu.quant_matmul import expand

    *lead, _, _ = w.values.shape
    return expand(as_matrix(w), dtype).reshape(*lead, *w.in_shape, *w.out_shape)
