"""Row-wise pieces between matrix products, on Hopper: RMS norm and SwiGLU, quantized on the way.

A block of 128 threads takes one row, straight from and to device memory: nothing is shared, so many
rows are under way on an SM, which is what hides their latency. With `quantize` the result leaves as
8 bits with one scale a row, as `quant_matmul` rounds its activations: it is read and written once.
Letters beside the usual: M rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from internjax.kernels.gpu.quant_matmul import activation_scales
from internjax.kernels.platform import choose, not_for_hopper

THREADS = 128
MOST_COLUMNS = 14336  # of a row: 112 registers a thread, and none spilled
QUANTIZED = (None, "int8", "float8_e4m3fn")


def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    *,
    eps: float,
    quantize: str | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Array | tuple[Array, Float[Array, "*B"]]:
    """Scales x to unit root mean square over D, times `scale`, in float32 (arXiv:1910.07467).

    Returns the dtype of x or, with `quantize`, 8-bit values and the factor of every row. Without
    it, differentiable.

    Args:
      quantize: None, "int8" or "float8_e4m3fn".
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernel on a CPU.
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: {scale.shape} scales of {x.shape}; legal is {x.shape[-1:]}.")
    how = ("rms_norm", partial(_normed, eps=eps), quantize, implementation, interpret)
    return _choose((x,), (scale,), *how)


def swiglu(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    quantize: str | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Array | tuple[Array, Float[Array, "*B"]]:
    """Returns silu(gate) * up, in float32 (arXiv:2002.05202); `rms_norm` says the rest."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape}, up {up.shape}; legal are equal shapes.")
    return _choose((gate, up), (), "swiglu", _gated, quantize, implementation, interpret)


def _normed(x: Array, scale: Array, *, eps: float) -> Array:
    mean = jnp.sum(x * x, axis=-1, keepdims=x.ndim > 1) / x.shape[-1]
    return x * lax.rsqrt(mean + eps) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def _gated(gate: Array, up: Array) -> Array:
    return gate / (1 + jnp.exp(-gate)) * up


def _choose(
    rows: tuple[Array, ...],
    shared: tuple[Array, ...],
    name: str,
    fn: Callable[..., Array],
    quantize: str | None,
    implementation: str | None,
    interpret: Any,
):
    if quantize not in QUANTIZED:
        raise ValueError(f"{name}: quantize={quantize!r}; legal are {QUANTIZED}.")
    served = {"xla": None, "pallas": _why_not(rows) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose(name, implementation, served, best=best)
    if chosen == "xla" or not math.prod(rows[0].shape):
        return reference(rows, shared, fn, quantize)
    if quantize is not None:
        return _launch(rows, shared, name, fn, quantize, interpret)
    return _differentiable(rows, shared, name, fn, interpret)


def _why_not(rows: tuple[Array, ...]) -> str | None:
    """Says what the Hopper kernel does not serve in these arrays, or None."""
    D = rows[0].shape[-1]
    if any(x.dtype != jnp.bfloat16 for x in rows):
        return f"rows of {', '.join(str(x.dtype) for x in rows)}; legal is bfloat16."
    if D % THREADS or D > MOST_COLUMNS:
        return f"rows of {D}; legal are multiples of {THREADS} up to {MOST_COLUMNS}."
    return None


def reference(
    rows: tuple[Array, ...],
    shared: tuple[Array, ...],
    fn: Callable[..., Array],
    quantize: str | None,
):
    """Says in plain jnp what the kernels compute."""
    wide = jnp.promote_types(rows[0].dtype, jnp.float32)
    y = fn(*(x.astype(wide) for x in (*rows, *shared)))
    if quantize is None:
        return y.astype(rows[0].dtype)
    values, scale = activation_scales(y, 1, jnp.dtype(quantize))
    return values, scale[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _differentiable(rows, shared, name: str, fn: Callable[..., Array], interpret: Any) -> Array:
    return _launch(rows, shared, name, fn, None, interpret)


def _forward(rows, shared, name: str, fn: Callable[..., Array], interpret: Any):
    return _differentiable(rows, shared, name, fn, interpret), (rows, shared)


def _backward(name: str, fn: Callable[..., Array], interpret: Any, kept: tuple, g: Array):
    """XLA's own: it fuses such derivatives into one pass, too."""
    del name, interpret
    return jax.vjp(lambda rows, shared: reference(rows, shared, fn, None), *kept)[1](g)


_differentiable.defvjp(_forward, _backward)


def _launch(
    rows: tuple[Array, ...],
    shared: tuple[Array, ...],
    name: str,
    fn: Callable[..., Array],
    quantize: str | None,
    interpret: Any,
):
    shape, D = rows[0].shape, rows[0].shape[-1]
    M = math.prod(shape[:-1])
    vector = next(n for n in (8, 4, 2, 1) if D % (n * THREADS) == 0)  # 16 bytes a thread at best
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=vector)
    dtype = jnp.dtype(quantize or rows[0].dtype)

    def body(*refs):
        row = lax.axis_index("row")
        read = lambda ref: plgpu.load(ref, layout=layout).astype(jnp.float32)  # noqa: E731
        rows_gm, shared_gm = refs[: len(rows)], refs[len(rows) : len(rows) + len(shared)]
        y = fn(*(read(ref.at[row]) for ref in rows_gm), *(read(ref) for ref in shared_gm))
        out_gm, *scales_gm = refs[len(rows) + len(shared) :]
        if quantize is not None:
            most = 127.0 if quantize == "int8" else float(jnp.finfo(dtype).max)
            scale = jnp.maximum(jnp.max(jnp.abs(y)) / most, 1e-12)
            scales_gm[0][row] = scale
            y = y / scale
            y = jnp.round(y) if quantize == "int8" else y
        out_gm[row] = y.astype(dtype)

    out_type = [jax.ShapeDtypeStruct((M, D), dtype)]
    if quantize is not None:
        out_type.append(jax.ShapeDtypeStruct((M,), jnp.float32))
    run = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(M,),
        grid_names=("row",),
        kernel_name=f"{name}_{quantize}" if quantize else name,
        interpret=interpret,
    )
    y, *scales = run(*(x.reshape(M, D) for x in rows), *shared)
    y = y.reshape(shape)
    return (y, scales[0].reshape(shape[:-1])) if scales else y
