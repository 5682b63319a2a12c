"""Scales that wander from the inputs of a projection into what makes these inputs.

x w = (x / s)(s w): the division goes into the norm before, or into the columns of the projection
before, so the model computes the same and the scaled weight rounds better (AWQ, arXiv:2306.00978;
SmoothQuant, arXiv:2211.10438).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from internjax.adapt.lora import NUM_IN
from internjax.tree import Params

# Projections that read the same inputs, and what makes these inputs.
FOLDS = (
    (("wq", "wk", "wv"), "attn_norm"),
    (("wo",), "wv"),
    (("w_gate", "w_up"), "ffn_norm"),
    (("w_down",), "w_up"),
)


def matrix(w: Array, name: str) -> Float[Array, "I O"]:
    """Returns one layer's projection with its dims flattened to inputs and outputs, float32."""
    ins = w.shape[: NUM_IN[name]]
    return w.reshape(math.prod(ins), -1).astype(jnp.float32)


def shared(x: Float[Array, " I"], source: str, layer: Params) -> Float[Array, " C"]:
    """Averages a statistic of the inputs over those that come from one channel of `source`.

    Under grouped queries G = N / K heads of wo read one channel of wv; elsewhere nothing changes.
    AWQ's own program leaves wo out there.
    """
    if source != "wv":
        return x
    _, K, H = layer["wv"].shape
    return x.reshape(K, -1, H).mean(axis=1).reshape(-1)


def spread(s: Float[Array, " C"], source: str, layer: Params) -> Float[Array, " I"]:
    """Inverse of `shared`: every input gets the scale of its channel."""
    if source != "wv":
        return s
    _, K, H = layer["wv"].shape
    G = layer["wo"].shape[0] // K
    return jnp.broadcast_to(s.reshape(K, 1, H), (K, G, H)).reshape(-1)


def fold(layer: Params, names: tuple[str, ...], source: str, s: Float[Array, " C"]) -> Params:
    """Returns the layer with the inputs of `names` multiplied by s and `source` divided by it."""
    every = spread(s, source, layer)
    changed = {}
    for name in names:
        w = layer[name]
        changed[name] = (matrix(w, name) * every[:, None]).reshape(w.shape).astype(w.dtype)
    made = layer[source]
    per_channel = s.reshape(made.shape if source.endswith("norm") else made.shape[1:])
    by = per_channel if source.endswith("norm") else per_channel[None]
    changed[source] = (made.astype(jnp.float32) / by).astype(made.dtype)
    if source == "wv" and "bv" in layer:
        changed["bv"] = (layer["bv"].astype(jnp.float32) / per_channel).astype(layer["bv"].dtype)
    return {**layer, **changed}
