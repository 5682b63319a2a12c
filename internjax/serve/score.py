"""Teacher-forced scores in a few fixed shapes: log-probabilities of given texts and prompts."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from internjax.models.config import ModelConfig
from internjax.models.decoder import hidden, unembed
from internjax.models.lm import Progress
from internjax.models.score import token_logprobs
from internjax.serve.sampling import TOP_LOGPROBS
from internjax.serve.scheduler import IdLogprob
from internjax.serve.tensor import mesh_of, on
from internjax.tree import Params

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCH_TOKENS = 2048
"""Tokens of one batch: enough for full matrix speed, little enough for memory."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context (at least one) and of its continuation."""


@partial(jax.jit, static_argnames="cfg")
def _score_batch(params: Params, tokens: Int[Array, "B T"], cfg: ModelConfig):
    return token_logprobs(params, tokens, cfg)


def score_pairs(
    params: Params,
    cfg: ModelConfig,
    pairs: Sequence[Pair],
    progress: Progress | None = None,
) -> list[tuple[np.ndarray, bool]]:
    """Returns, for each continuation, its tokens' log-probabilities and whether all were likeliest.

    Texts are sorted by length and batched into few shapes; the results come in the given order.
    """
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    results: list = [None] * len(pairs)
    done = 0
    while done < len(order):
        length = bucket(sum(map(len, pairs[order[done]])))
        batch = order[done : done + max(1, BATCH_TOKENS // length)]
        rows = np.zeros((max(1, BATCH_TOKENS // length), length), np.int32)
        for row, index in enumerate(batch):
            ids = [*pairs[index][0], *pairs[index][1]]
            rows[row, : len(ids)] = ids
        logprobs, greedy = map(np.asarray, _score_batch(params, rows, cfg))
        for row, index in enumerate(batch):
            context, continuation = pairs[index]
            span = slice(len(context) - 1, len(context) - 1 + len(continuation))
            results[index] = (logprobs[row, span], bool(greedy[row, span].all()))
        done += len(batch)
        if progress:
            progress(done, len(pairs))
    return results


def bucket(length: int) -> int:
    """Returns the compiled length for `length` tokens; beyond the list, multiples of 2048."""
    top = LENGTHS[-1]
    return next((n for n in LENGTHS if n >= length), -(-length // top) * top)


@partial(jax.jit, static_argnames="cfg")
def _rivals(params: Params, tokens: Int[Array, "1 T"], cfg: ModelConfig):
    """Returns log-probabilities `[T-1]` of the next tokens, and the likeliest ids and values."""
    states = hidden(params, tokens, cfg)[0, :-1]
    targets = tokens[0, 1:]
    chunk = min(128, tokens.shape[1])
    pad = -states.shape[0] % chunk
    states = jnp.pad(states, ((0, pad), (0, 0))).reshape(-1, chunk, states.shape[-1])
    targets = jnp.pad(targets, (0, pad)).reshape(-1, chunk)

    def score(piece: tuple[Array, Array]):
        state, target = piece
        logits = unembed(params, state, cfg)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        values, ids = lax.top_k(logits, min(TOP_LOGPROBS, logits.shape[-1]))
        at_target = jnp.take_along_axis(logits, target[:, None], axis=-1) - total
        return at_target[:, 0], ids, values - total

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(score, (states, targets)))


def prompt_logprobs(
    params: Params, cfg: ModelConfig, ids: Sequence[int], top: int
) -> list[IdLogprob | None]:
    """Returns an entry for each token of a prompt; the first has None before it, hence None."""
    tokens = np.zeros((1, bucket(len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    with on(mesh_of(params)):
        logprobs, rivals, values = jax.device_get(_rivals(params, tokens, cfg))
    entries: list[IdLogprob | None] = [None]
    for at, token in enumerate(ids[1:]):
        pairs = zip(rivals[at, :top].tolist(), values[at, :top].tolist(), strict=True)
        entries.append(IdLogprob(token, float(logprobs[at]), tuple(pairs)))
    return entries
