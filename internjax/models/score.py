"""Teacher-forced log-probabilities of given tokens: what perplexity and choices are made of."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from internjax.models.config import ModelConfig
from internjax.models.decoder import hidden, unembed
from internjax.tree import Params


def token_logprobs(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int = 256,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Returns log p(token t+1 | tokens <= t), natural, and whether it was the likeliest; S = T - 1.

    The vocabulary is expanded for `chunk` tokens at a time, so `[B, T, V]` is never held.
    """
    x = hidden(params, tokens, cfg, segment_ids=segment_ids)[:, :-1]
    B, S, D = x.shape
    pad = -B * S % chunk
    states = jnp.pad(x.reshape(B * S, D), ((0, pad), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(tokens[:, 1:].reshape(B * S), (0, pad)).reshape(-1, chunk)

    def score(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        states, target = piece
        logits = unembed(params, states, cfg)
        at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        logprob = at_target - jax.nn.logsumexp(logits, axis=-1)
        return logprob, at_target >= logits.max(axis=-1)

    logprobs, greedy = lax.map(score, (states, targets))
    return logprobs.reshape(-1)[: B * S].reshape(B, S), greedy.reshape(-1)[: B * S].reshape(B, S)
