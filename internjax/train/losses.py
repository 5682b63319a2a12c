"""What training minimises: the mean negative log-likelihood of the tokens that count."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from internjax.collectives import ALONE, Parallel, gather_length, own_length
from internjax.data.batch import Batch
from internjax.kernels.cross_entropy import chunked_cross_entropy
from internjax.models.config import ModelConfig
from internjax.models.decoder import embed, run_layers, unembed
from internjax.models.layers import rms_norm
from internjax.models.remat import Remat
from internjax.tree import Params, wide
from internjax.weights import Fp8Weight

type Parts = dict[str, Array]


@dataclass(frozen=True)
class LossConfig:
    """What is added to the negative log-likelihood.

    Fields:
      smoothing: share of the target's probability that is spread evenly over the vocabulary.
      z_loss: weight of the squared logarithm of the softmax's normaliser.
      chunk: positions of a row whose logits exist at one time.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 128


PROJECTIONS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
SOURCE_PARTS = {
    "nll_sum": "source_loss_sum",
    "num_correct": "source_correct",
    "num_tokens": "source_tokens",
}


@dataclass(frozen=True)
class Stages:
    """The three parts of a loss between which a pipeline may cut; each is a method.

    Fields:
      model: the decoder; loss, remat, par: as in `next_token_loss`.
      matmul: "fp8" makes the layers' products of attention and dense blocks in 8 bits; "" in the
        model's dtype.
      num_sources: of a mixture, whose parts are told apart; 0: of no interest.
    """

    model: ModelConfig
    loss: LossConfig = LossConfig()
    remat: Remat = Remat()
    par: Parallel = ALONE
    num_sources: int = 0
    matmul: Literal["", "fp8"] = ""

    def embed(self, params: Params, batch: Batch) -> Array:
        """Tokens to states `[B, S, D]`."""
        return embed(params, batch.tokens, self.model, par=self.par)

    def run(self, layers: Params, x: Array, batch: Batch) -> tuple[Array, Parts]:
        """Some layers; the parts hold what they add to the loss themselves."""
        if self.matmul == "fp8":
            marked = {name: Fp8Weight(layers[name]) for name in PROJECTIONS if name in layers}
            layers = {**layers, **marked}
        x, aux = run_layers(
            layers,
            x,
            self.model,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            remat=self.remat,
            par=self.par,
        )
        # A mean over the whole batch: with this device's tokens, devices add up to all tokens.
        mine = jnp.sum(own_length(batch.loss_mask, self.par), dtype=aux.dtype)
        return x, {"loss_sum": aux * mine, "aux_sum": aux * mine}

    def finish(self, params: Params, x: Array, batch: Batch) -> Parts:
        """States after the last layer to the likelihoods of the targets, summed."""
        x = rms_norm(x, params["final_norm"], self.model.norm_eps)
        found = chunked_cross_entropy(
            lambda states: unembed(params, states, self.model),
            gather_length(x, self.par),
            batch.targets,
            chunk=self.loss.chunk,
            axis=self.par.tensor,
            smoothing=self.loss.smoothing,
            z_loss=self.loss.z_loss,
        )
        # Every device of `tensor` has the loss of all T positions, and counts its own part.
        mask, aims, nlls, right = (own_length(y, self.par) for y in (batch.loss_mask, *found))
        mask = mask.astype(wide(aims.dtype))
        weighted = {"loss_sum": aims, "nll_sum": nlls, "num_correct": right, "num_tokens": 1.0}
        weighted = {name: y * mask for name, y in weighted.items()}
        parts = {name: jnp.sum(y) for name, y in weighted.items()}
        if self.num_sources:
            sources = own_length(batch.sources, self.par)
            one_hot = jax.nn.one_hot(sources, self.num_sources, dtype=mask.dtype)
            for name, told in SOURCE_PARTS.items():
                parts[told] = jnp.einsum("BT,BTS->S", weighted[name], one_hot)
        return parts

    def zero_parts(self) -> Parts:
        """The parts of no batch at all."""
        zeros = lambda *shape: jnp.zeros(shape, wide(self.model.dtype))  # noqa: E731
        names = ("loss_sum", "nll_sum", "aux_sum", "num_correct", "num_tokens")
        parts = {name: zeros() for name in names}
        if self.num_sources:
            parts |= {name: zeros(self.num_sources) for name in SOURCE_PARTS.values()}
        return parts

    def whole(self, params: Params, batch: Batch, frozen: Any = None) -> tuple[Array, Parts]:
        """All three parts: the mean loss and its sums."""
        x, aux = self.run(params["layers"], self.embed(params, batch), batch)
        parts = add_parts(self.finish(params, x, batch), aux)
        return parts["loss_sum"] / jnp.maximum(parts["num_tokens"], 1), parts


def next_token_loss(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    *,
    loss: LossConfig = LossConfig(),
    remat: Remat = Remat(),
    par: Parallel = ALONE,
) -> tuple[Array, Parts]:
    """Returns the mean loss a counted token in nats, and its parts.

    Parts: `loss_sum`, what is minimised, `nll_sum`, the likelihood alone, `aux_sum`, what mixtures
    of experts add, `num_correct`, all over counted tokens, and `num_tokens`, so that micro-batches,
    devices and evaluation can be averaged over tokens, not over means.
    """
    return Stages(cfg, loss, remat, par).whole(params, batch)


def add_parts(a: Parts, b: Parts) -> Parts:
    """Adds up parts of a loss by name; what one lacks counts as 0."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
