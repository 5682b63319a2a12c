"""The adapters that an engine holds: each has a place in stacks beside the weights.

The stacks have their full size from the start, so loading and unloading compile nothing. A place is
given anew only when no request in flight computes with it.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.peft import NUM_IN, LoraConfig, check_targets, load_adapter
from internjax.serve.config import EngineConfig
from internjax.tree import Leaf, Params
from internjax.weights import StackedLora

type Stacks = tuple[dict[str, tuple[Leaf, Leaf]], ...]
"""A dict a layer: the factors a `[*in, A, R]` and b `[A, R, *out]` of every projection."""

NONE = -1
"""The place of a request that uses the model as it is."""


@dataclass(frozen=True)
class Place:
    """Where an adapter lies; version: no other adapter of this engine ever had it."""

    index: int
    version: int


class Adapters:
    """The weights of an engine with the adapters beside them. Called from any thread.

    Laws: two names never share a place; `stacks`, `params` and `named` are replaced, never written
    to, so that whoever only looks needs no lock.

    Fields:
      params: what steps compute with, no adapter chosen.
      named: the places of those that are loaded.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        config: EngineConfig,
        base: Params,
        lock: threading.Condition,
        used: Callable[[], Collection[int]],
    ):
        """Makes room for `config.adapters` of them.

        Args:
          base: the weights as `prepare` and `lay_out` leave them.
          lock: the engine's; who puts a request in line holds it from `find` on.
          used: the places that requests in flight compute with.
        """
        self.cfg, self.count, self.rank = cfg, config.adapters, config.adapter_rank
        self.stacks = init_stacks(cfg, self.count, self.rank)
        self.named: dict[str, Place] = {}
        self._versions = 0
        self._lock, self._used = lock, used
        self._loading = threading.Lock()
        self.set_base(base)

    def set_base(self, base: Params) -> None:
        """Takes other weights; the adapters stay."""
        with self._lock:
            self._base, self.params = base, with_stacks(base, self.stacks)

    def load(self, name: str, folder: Path) -> None:
        """Reads a PEFT folder and serves it as `name` from now on; those who run go on meanwhile.

        Raises:
          UserError: it cannot be read or does not fit, the name is taken, no place is free.
        """
        self.add(name, *load_adapter(folder, self.cfg))

    def add(self, name: str, adapter: Params, lora: LoraConfig) -> None:
        """Serves an adapter as `name` from now on; those who run go on meanwhile.

        Args:
          adapter: a tree as `adapt.lora.init_adapter` makes it.

        Raises:
          UserError: it does not fit the model, the name is taken or no place is free.
        """
        with self._loading:
            with self._lock:
                index = self._free(name)
            factors = fill(self.cfg, self.rank, adapter, lora)
            stacks = jax.block_until_ready(put(self.stacks, np.int32(index), factors))
            with self._lock:
                self._versions += 1
                self.named = {**self.named, name: Place(index, self._versions)}
                self.stacks, self.params = stacks, with_stacks(self._base, stacks)

    def unload(self, name: str) -> None:
        """Refuses new requests for an adapter; those in flight go on with it to their end.

        Raises:
          UserError: no such adapter.
        """
        with self._lock:
            self.find(name)
            self.named = {n: place for n, place in self.named.items() if n != name}

    def names(self) -> list[str]:
        """Returns the names of those that are loaded."""
        return list(self.named)

    def find(self, name: str) -> Place:
        """Returns the place of an adapter; "" is the model itself.

        Raises:
          UserError: no such adapter, with the names that are there.
        """
        if not name:
            return Place(NONE, 0)
        if name not in self.named:
            there = ", ".join(self.named) or "none"
            raise UserError(f"adapter {name!r} is not loaded; loaded: {there}.")
        return self.named[name]

    def params_of(self, name: str) -> Params:
        """Returns the weights for computing beside the engine's steps; "" is the model itself.

        Raises:
          UserError: no such adapter.
        """
        with self._lock:
            place = self.find(name)
            return choosing(self.params, jnp.int32(place.index)) if name else self.params

    def warm_up(self) -> None:
        """Compiles what loading runs."""
        if self.count:
            nothing = {"layers": {}}, LoraConfig(rank=1)
            put(self.stacks, np.int32(0), fill(self.cfg, self.rank, *nothing))

    def _free(self, name: str) -> int:
        """Returns a place for a new adapter.

        Raises:
          UserError: the name is taken or no place is free.
        """
        if not self.count:
            raise UserError("no adapter can be loaded: the engine was started with adapters=0.")
        if not name or name in self.named:
            raise UserError(f"adapter {name!r}: the name is empty or taken; unload that one first.")
        taken = {place.index for place in self.named.values()}
        if len(taken) == self.count:
            names = ", ".join(self.named)
            raise UserError(
                f"adapter {name!r}: all {self.count} places are taken ({names}): unload one, or "
                "start the engine with a larger `adapters`."
            )
        used = self._used()
        left = [i for i in range(self.count) if i not in taken and i not in used]
        if not left:
            raise UserError(
                f"adapter {name!r}: requests still use the adapters that were unloaded; try again "
                "when they have ended."
            )
        return left[0]


def init_stacks(cfg: ModelConfig, count: int, rank: int) -> Stacks:
    """Returns stacks without corrections; nothing for a count of 0."""
    shapes = {name: s for name, s in _shapes(cfg, rank).items() if count}
    dtype = jnp.dtype(cfg.dtype)

    def zeros(name: str) -> tuple[Array, Array]:
        a, b = shapes[name]
        return jnp.zeros((*a[:-1], count, rank), dtype), jnp.zeros((count, *b), dtype)

    return tuple({name: zeros(name) for name in shapes} for _ in range(cfg.num_layers))


def fill(cfg: ModelConfig, rank: int, adapter: Params, lora: LoraConfig) -> Stacks:
    """Returns one adapter's factors as they go into stacks, without the dim A.

    Smaller ranks and projections without a correction are filled with zeros; the scale goes into b.

    Raises:
      UserError: the adapter does not fit the model or the rank, or is not finite.
    """
    shapes, given = _shapes(cfg, rank), adapter["layers"]
    check_targets(given, shapes, cfg.name)
    if lora.rank > rank:
        raise UserError(
            f"the adapter has rank {lora.rank}, but the engine holds ranks up to {rank}: start it "
            f"with adapter_rank={lora.rank}."
        )
    layers = range(cfg.num_layers)
    whole = {
        name: [np.zeros((cfg.num_layers, *shape), np.float32) for shape in shapes[name]]
        for name in shapes
    }
    for name, factors in given.items():
        a, b = whole[name]
        a[..., : lora.rank] = _factor(name, factors["a"], a[..., : lora.rank].shape)
        scaled = np.float32(lora.alpha / lora.rank) * np.asarray(factors["b"], np.float32)
        b[:, : lora.rank] = _factor(name, scaled, b[:, : lora.rank].shape)
    return tuple({name: (a[i], b[i]) for name, (a, b) in whole.items()} for i in layers)


def _factor(name: str, factor: Leaf, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a factor of a projection, checked: what is infinite would reach others' rows."""
    factor = np.asarray(factor, np.float32)
    if factor.shape != shape:
        raise UserError(
            f"the adapter's factor of {name} is {list(factor.shape)}; the model has {list(shape)}."
        )
    if not np.isfinite(factor).all():
        raise UserError(f"the adapter's factor of {name} holds NaN or infinite numbers.")
    return factor


@jax.jit
def put(stacks: Stacks, index: Int[Array, ""], adapter: Stacks) -> Stacks:
    """Returns stacks with one adapter's factors in place `index`; nothing is donated."""

    def one(stack: tuple[Leaf, Leaf], new: tuple[Leaf, Leaf]) -> tuple[Leaf, Leaf]:
        (a, b), (new_a, new_b) = stack, new
        return (
            a.at[..., index, :].set(new_a.astype(a.dtype)),
            b.at[index].set(new_b.astype(b.dtype)),
        )

    pairs = zip(stacks, adapter, strict=True)
    return tuple({n: one(old[n], new[n]) for n in old} for old, new in pairs)


def with_stacks(params: Params, stacks: Stacks) -> Params:
    """Returns prepared parameters whose projections carry the stacks, none of them chosen."""
    pairs = zip(params["layers"], stacks, strict=True)
    layers = tuple(
        {**layer, **{n: StackedLora(layer[n], a, b) for n, (a, b) in stack.items()}}
        for layer, stack in pairs
    )
    return {**params, "layers": layers}


def choosing(params: Params, chosen: Int[Array, " B"] | Int[Array, ""]) -> Params:
    """Returns parameters that correct B sequences (or all) by the adapters in their places."""
    stacked = lambda x: isinstance(x, StackedLora)  # noqa: E731
    choose = lambda x: x.replace(chosen=chosen) if stacked(x) else x  # noqa: E731
    return jax.tree.map(choose, params, is_leaf=stacked)


def _shapes(cfg: ModelConfig, rank: int) -> dict[str, tuple[tuple, tuple]]:
    """The shapes of a layer's factors, for every projection that the model has."""
    table, shapes = param_table(cfg), {}
    for name, num_in in NUM_IN.items():
        if spec := table.get(f"layers/{name}"):
            dims = spec.shape[1:]
            shapes[name] = (*dims[:num_in], rank), (rank, *dims[num_in:])
    return shapes
