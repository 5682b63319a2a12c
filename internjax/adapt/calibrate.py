"""What the projections of a model are multiplied with, measured on text, layer after layer.

A layer sees what the layers before it give after they were changed, so their errors are known to
it. Of the inputs only sums are kept: their products with each other, which say the error of any
change of the weights exactly, and the mean and the largest size of every channel.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from internjax.adapt.lora import NUM_IN
from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import embed, run_layers
from internjax.tree import Leaf, Params, stack_layers, unstack_layers
from internjax.weights import WatchedWeight

# Projections that read the same inputs are known by the first of them.
READS = {"wq": "wq", "wk": "wq", "wv": "wq", "wo": "wo", "w_gate": "w_gate", "w_up": "w_gate"}
READS |= {"w_down": "w_down"}
BATCH_TOKENS = 2048


@struct.dataclass
class Inputs:
    """Statistics of the rows x `[M, I]` that one projection is multiplied with, float32.

    Fields:
      gram: x^T x / M `[I, I]`; mean: of |x| `[I]`; largest: of |x| `[I]`.
    """

    gram: Leaf
    mean: Leaf
    largest: Leaf


type Treat = Callable[[Params, dict[str, Inputs]], Params]
"""One layer's parameters and the inputs of its projections, by name -> what it becomes."""


def by_layers(params: Params, cfg: ModelConfig, rows: Int[Array, "S T"], treat: Treat) -> Params:
    """Changes one layer after the other; each sees its inputs in the model changed so far.

    Raises: UserError: the model is a mixture of experts, whose experts see few tokens each.
    """
    if cfg.num_experts:
        raise UserError(f"{cfg.name} has experts: calibration is for dense models; use rtn or fp8.")
    size = max(1, BATCH_TOKENS // rows.shape[1])
    states = [embed(params, rows[i : i + size], cfg) for i in range(0, len(rows), size)]
    done = []
    for layer in unstack_layers(params)["layers"]:
        changed = treat(layer, inputs_of(layer, states, cfg))
        states = [_run(changed, x, cfg) for x in states]
        done.append(changed)
    return stack_layers({**params, "layers": tuple(done)})


def inputs_of(layer: Params, states: list[Float[Array, "B T D"]], cfg: ModelConfig) -> dict:
    """Returns the `Inputs` of every projection of one layer, over all batches."""
    seen = [_watch(layer, x, cfg) for x in states]
    weight = jnp.asarray([x.shape[0] * x.shape[1] for x in states], jnp.float32)
    weight = weight / weight.sum()

    def joined(*parts: Inputs) -> Inputs:
        mean = lambda xs: sum(x * w for x, w in zip(xs, weight, strict=True))  # noqa: E731
        largest = jnp.stack([p.largest for p in parts]).max(axis=0)
        return Inputs(mean([p.gram for p in parts]), mean([p.mean for p in parts]), largest)

    first = {name: joined(*(s[name] for s in seen)) for name in seen[0]}
    return {name: first[READS[name]] for name in NUM_IN}


@partial(jax.jit, static_argnames="cfg")
def _watch(layer: Params, x: Array, cfg: ModelConfig) -> dict[str, Inputs]:
    seen: dict[str, Array] = {}
    watched = {
        n: WatchedWeight(layer[n], partial(seen.__setitem__, n)) for n in set(READS.values())
    }
    run_layers((layer | watched,), x, cfg)
    return {name: _statistics(y, NUM_IN[name]) for name, y in sorted(seen.items())}


def _statistics(x: Array, num_in: int) -> Inputs:
    """Sums up x `[B, T, *in]`."""
    rows = x.reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
    size = jnp.abs(rows)
    return Inputs(rows.T @ rows / len(rows), size.mean(axis=0), size.max(axis=0))


@partial(jax.jit, static_argnames="cfg")
def _run(layer: Params, x: Array, cfg: ModelConfig) -> Array:
    return run_layers((layer,), x, cfg)[0]
