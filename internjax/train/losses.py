"""What training minimises: the mean negative log-likelihood of the tokens that count."""

import jax.numpy as jnp
from jaxtyping import Array

from internjax.data.batch import Batch
from internjax.kernels.cross_entropy import chunked_cross_entropy
from internjax.mesh import ShardingRules
from internjax.models.config import ModelConfig
from internjax.models.decoder import hidden, unembed
from internjax.tree import Params, wide


def next_token_loss(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    *,
    rules: ShardingRules | None = None,
    remat: bool = False,
    chunk: int = 128,
) -> tuple[Array, dict[str, Array]]:
    """Returns the mean loss a counted token in nats, and its parts.

    Parts: `loss_sum` over counted tokens and `num_tokens`, so that micro-batches and evaluation
    can be averaged over tokens, not over means.
    """
    x = hidden(
        params,
        batch.tokens,
        cfg,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        rules=rules,
        remat=remat,
    )
    losses = chunked_cross_entropy(
        lambda states: unembed(params, states, cfg, rules=rules), x, batch.targets, chunk=chunk
    )
    mask = batch.loss_mask.astype(losses.dtype)
    total = jnp.sum(losses * mask, dtype=wide(losses.dtype))
    count = jnp.sum(mask, dtype=wide(losses.dtype))
    return total / jnp.maximum(count, 1), {"loss_sum": total, "num_tokens": count}
