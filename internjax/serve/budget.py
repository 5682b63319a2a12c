"""How much fits: positions of one request, and blocks of keys and values of all."""

import os

import jax

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.serve.config import EngineConfig
from internjax.serve.programs import CHUNKS


def fit_context(config: EngineConfig, cfg: ModelConfig) -> int:
    """Returns the positions that a slot holds, prompt and answer together.

    Raises:
      UserError: the model cannot look so far.
    """
    limit = cfg.max_context
    context = config.context or min(limit, 2048)
    if context > limit and cfg.rope.kind == "default":
        raise UserError(
            f"context={context} is longer than the model's {limit}: give at most that, or a model "
            "whose rope is stretched."
        )
    # A multiple of the longest piece: a padded piece of a prompt must fit before the end.
    return context if context < CHUNKS[-1] else context // CHUNKS[-1] * CHUNKS[-1]


def block_bytes(cfg: ModelConfig, block: int, kv_dtype: str) -> int:
    """Returns the bytes of one block in all layers; int8 has a float32 scale a token and head.

    int4 has two.
    """
    H = cfg.head_dim
    head = {"float32": 4 * H, "bfloat16": 2 * H, "int8": H + 4, "int4": H // 2 + 8}
    return 2 * block * cfg.num_layers * cfg.num_kv_heads * head[kv_dtype]


def count_blocks(config: EngineConfig, cfg: ModelConfig, context: int) -> int:
    """Returns how many blocks the cache gets; the weights are on the device already.

    A share counts as `cache_max_entry_count` of LMDeploy 0.2.1 and later does: of what is free.

    Raises:
      UserError: not even one request of full length would fit.
    """
    row = -(-context // config.block)
    if not config.blocks:
        return config.slots * row
    count = int(config.blocks)
    if config.blocks < 1:
        size = block_bytes(cfg, config.block, config.kv_dtype)
        free = free_memory(config.tensor)
        count = min(int(config.blocks * free / size), config.slots * row)
    if count < row:
        raise UserError(
            f"blocks={config.blocks:g} come to {count} of {config.block} positions, but one request"
            f" of context={context} needs {row}: give more blocks or a shorter context."
        )
    return count


def free_memory(devices: int = 1) -> int:
    """Returns the bytes that are free: of the devices where they count them, else of the machine.

    Args:
      devices: those that share everything out evenly; the fullest decides.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()[:devices]]
    if all("bytes_limit" in each for each in stats):
        return devices * min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
