"""Small decoding steps as a Hopper GPU runs them: which kernels they take, and no float copies.

`make kernel-check` compiles them for sm_90a; the tests trace them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from internjax.adapt.quantize import QuantConfig, quantize, quantize_array
from internjax.models.cache import init_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, init_params
from internjax.plan.kernels import LAUNCH
from internjax.serve.engine import EngineConfig, prepare_params
from internjax.tree import Params, cast, unstack_layers
from internjax.weights import QuantWeight, TurnedWeight, num_weights

SLOTS, CONTEXT, GROUP = 4, 320, 64
# No other array of the step has as many numbers as one of its quantized weights.
DENSE = ModelConfig(
    name="small",
    family="internlm2",
    num_layers=2,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=512,
    vocab_size=384,
    max_context=CONTEXT,
    norm_eps=1e-5,
    dtype="bfloat16",
)
EXPERTS = replace(DENSE, num_experts=4, experts_per_token=2, expert_d_ff=256)
ATTENTION = {"rope_write_16": 2, "decode_attention_16": 2}  # kernel -> calls, of two layers


@dataclass(frozen=True)
class Step:
    """A decoding step.

    Fields:
      cfg: of the model; prepared: its weights are what the engine makes of them, else as stored.
      calls: kernels that it must take -> how often.
    """

    cfg: ModelConfig
    prepared: bool
    calls: Mapping[str, int]

    def build(self) -> tuple[Callable, tuple]:
        """Returns the step, its cache the first argument, and shapes; its target must be set."""
        args = jax.eval_shape(partial(self._start, jax.random.key(0)))
        return partial(run, cfg=self.cfg), args

    def _start(self, key: jax.Array) -> tuple:
        params = quantized(init_params(self.cfg, key), self.cfg)
        engine = EngineConfig(SLOTS, CONTEXT, "bfloat16")
        if self.prepared:
            params = prepare_params(params, engine, "bfloat16")
        columns = CONTEXT // engine.block  # a table, as the engine has them
        cache = init_cache(self.cfg, SLOTS * columns, engine.block, "bfloat16")
        table = jnp.zeros((SLOTS, columns), jnp.int32)
        return cache, unstack_layers(params), *jnp.zeros((2, SLOTS), jnp.int32), table


STEPS = {
    "decoding step, int4": Step(DENSE, True, ATTENTION | {"quant_matmul_int4_bfloat16_few": 14}),
    "decoding step, int4 as stored": Step(
        DENSE, False, ATTENTION | {"quant_matmul_int4_bfloat16_few": 14}
    ),
    "decoding step, int4 experts": Step(
        EXPERTS,
        True,
        ATTENTION | {"quant_matmul_int4_bfloat16_few": 8, "grouped_matmul_int4_few": 6},
    ),
}


def quantized(params: Params, cfg: ModelConfig) -> Params:
    """Rounds all projections to 4 bits, those of experts too; the rest is bfloat16."""
    layers = params["layers"]
    targets = tuple(name for name in QuantConfig().targets if name in layers)
    params = quantize(params, QuantConfig(GROUP, rank=0, targets=targets))
    layers = {
        name: quantize_array(w, 1, GROUP, lead=2) if name.startswith("expert_") else w
        for name, w in params["layers"].items()
    }
    return cast({**params, "layers": layers}, cfg.dtype)


def run(
    cache,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    table: jax.Array,
    *,
    cfg: ModelConfig,
):
    """Decodes one token a slot, but for the head, for which cuBLAS asks 4 MiB at any size."""
    return decode(params, tokens[:, None], cache, start, cfg, table=table)


def weight_sizes(args: tuple) -> set[int]:
    """How many numbers each quantized weight of a layer stands for."""
    known = lambda x: isinstance(x, (QuantWeight, TurnedWeight))  # noqa: E731
    leaves = jax.tree.leaves(args, is_leaf=known)
    return {num_weights(x) for x in leaves if known(x)}


def float_copies(jaxpr: Any, sizes: set[int]) -> Iterator[str]:
    """Yields arrays of floats outside kernels that are as large as a quantized weight."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == LAUNCH:
            continue
        for var in eqn.outvars:
            if jnp.issubdtype(var.aval.dtype, jnp.floating) and math.prod(var.aval.shape) in sizes:
                yield var.aval.str_short()
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from float_copies(sub, sizes)


def float_copies_in(hlo: str, sizes: set[int]) -> Iterator[str]:
    """Yields the same of a compiled program's text."""
    for shape in sorted(set(re.findall(r"\b(?:bf16|f16|f32)\[[\d,]+\]", hlo))):
        dims = shape[shape.index("[") + 1 : -1]
        if math.prod(map(int, dims.split(","))) in sizes:
            yield shape
