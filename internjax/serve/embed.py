"""Texts to vectors: the mean of a text's last hidden states, scaled to length one.

A generator was not trained for this: the vectors order texts roughly, and a model made for it does
so better.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from internjax.models.config import ModelConfig
from internjax.models.decoder import hidden
from internjax.serve.score import BATCH_TOKENS, bucket
from internjax.serve.tensor import mesh_of, on
from internjax.tree import Params

ROWS = (1, 4, 16, 64)
"""Texts of one batch that programs are compiled for."""


def embed(params: Params, cfg: ModelConfig, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns a unit vector `[len(texts), d_model]` (float32) for the ids of each text.

    Texts are sorted by length and batched into few shapes; the results come in the given order.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = np.zeros((len(texts), cfg.d_model), np.float32)
    done = 0
    while done < len(order):
        length = bucket(len(texts[order[done]]))
        most = max(r for r in ROWS if r == 1 or r * length <= BATCH_TOKENS)
        batch = order[done : done + most]
        rows = next(r for r in ROWS if r >= len(batch))
        tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, index in enumerate(batch):
            tokens[row, : len(texts[index])] = texts[index]
            lengths[row] = len(texts[index])
        with on(mesh_of(params)):
            vectors[batch] = np.asarray(_pooled(params, tokens, lengths, cfg))[: len(batch)]
        done += len(batch)
    return vectors


@partial(jax.jit, static_argnames="cfg")
def _pooled(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cfg: ModelConfig
) -> Float[Array, "B D"]:
    """The padding stands behind the text: no state of the text sees it."""
    states = hidden(params, tokens, cfg).astype(jnp.float32)
    inside = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    total = jnp.where(inside[:, :, None], states, 0).sum(1)
    return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
