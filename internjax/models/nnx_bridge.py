"""The same weights as a `flax.nnx` module, for people and tools that work with modules.

A thin view: the module holds our tree, its call is `decoder.forward`, and nothing of the program
needs it. Layers stay stacked, as they are scanned.
"""

from flax import nnx
from jaxtyping import Array, Float, Int

from internjax.models.config import ModelConfig
from internjax.models.decoder import forward
from internjax.tree import Params


class Decoder(nnx.Module):
    """A decoder whose `weights` are our parameter tree, every leaf an `nnx.Param`."""

    def __init__(self, cfg: ModelConfig, params: Params):
        self.cfg = cfg
        self.weights = _wrapped(params)

    def __call__(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T V"]:
        """Returns the logits; `options` are those of `decoder.forward`."""
        return forward(from_nnx(self), tokens, self.cfg, **options)


def to_nnx(cfg: ModelConfig, params: Params) -> Decoder:
    """Wraps a parameter tree; the arrays are shared, not copied."""
    return Decoder(cfg, params)


def from_nnx(module: Decoder) -> Params:
    """Returns the parameter tree of a module, with the values that its Params hold now."""
    return _plain(module.weights)


def _wrapped(tree: Params) -> nnx.Dict:
    return nnx.Dict(
        {k: _wrapped(v) if isinstance(v, dict) else nnx.Param(v) for k, v in tree.items()}
    )


def _plain(tree: nnx.Dict) -> Params:
    return {k: _plain(v) if isinstance(v, nnx.Dict) else v[...] for k, v in tree.items()}
