"""The compiled programs over the device state, and the few shapes that they are compiled for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from internjax.models import rope
from internjax.models.cache import in_place
from internjax.models.config import ModelConfig
from internjax.serve import slots as device
from internjax.serve.adapters import NONE
from internjax.serve.config import EngineConfig, EngineStats
from internjax.serve.prepare import rows_stand_alone
from internjax.serve.sampling import Sampled
from internjax.serve.scheduler import Request, attend_buckets, pick_bucket
from internjax.serve.tensor import mesh_of, on
from internjax.tree import Params

log = logging.getLogger(__name__)

CHUNKS = (32, 64, 128)
"""Lengths of prompt pieces that programs are compiled for."""


@dataclass
class Piece:
    """Consecutive tokens of one request, each a row of a step.

    Fields:
      tokens: ids to feed; -1, first, is the one that the slot chose in the step before.
      position: of the first of them; chooses: whether what follows each is of use.
      row: of the first, set when the step is made up.
    """

    request: Request
    tokens: Sequence[int]
    position: int
    chooses: bool = True
    row: int = -1


class Programs:
    """Runs the device: arguments of fixed shapes in, the state kept here.

    Where no bit of a row depends on how many rows there are (`rows_stand_alone`), steps come in a
    few sizes, so that one request does not pay for all slots; else in one. Then
    `config.invariant` makes prompts go through that one step, too, a token a row (`one_way`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        config: EngineConfig,
        params: Params,
        context: int,
        blocks: int,
        stats: EngineStats,
    ):
        self.cfg, self.config, self.stats = cfg, config, stats
        self.context, self.blocks = context, blocks
        self._mesh = mesh_of(params)
        with on(self._mesh):
            whole = in_place(cfg, config.kv_dtype)
        alone = whole and rows_stand_alone(params)
        self.one_way = config.invariant and not alone
        self.attends = (context,) if whole or self.one_way else attend_buckets(context)
        most = config.slots * (1 + config.speculate)
        smaller = [4**i for i in range(20) if 4**i < most] if alone else []
        self.sizes = (*smaller, most)
        self.warm = False
        self._met: set[tuple] = set()
        self._words = -(-cfg.vocab_size // 32)
        # Room for a padded piece that sticks out of the context: without a block none is written.
        self._width = -(-(context + CHUNKS[-1]) // config.block)
        self.reset()

    def reset(self) -> None:
        """Starts from empty slots and an empty cache."""
        config = self.config
        sizes = config.slots, self.blocks, config.block
        with on(self._mesh):  # compiled there, so that each device makes its own part only
            self._slots = device.init_slots(self.cfg, *sizes, config.kv_dtype)
        zeros = lambda n: (jnp.zeros((n, self._words), jnp.uint32), jnp.zeros(n, bool))  # noqa: E731
        self._no_mask = {size: zeros(size) for size in self.sizes}

    def prefill(self, params: Params, request: Request) -> tuple[int, int]:
        """Prefills the next piece of a request; returns its length without and with padding."""
        size = pick_bucket(request.to_prefill, CHUNKS)
        start, count = request.prefilled, min(size, request.to_prefill)
        tokens = np.zeros(size, np.int32)
        tokens[:count] = request.tokens[start : start + count]
        attend = pick_bucket(start + size, self.attends)
        what = tokens, start, request.freq, request.adapter
        self._prefill(params, self._table([request.blocks]), *what, attend)
        return count, len(tokens)

    def seat(self, slot: int, row: dict) -> None:
        """Gives a slot its request's sampling parameters."""
        self._meet("seat", len(row))
        with on(self._mesh):
            self._slots = device.seat(self._slots, np.int32(slot), row)

    def step(self, params: Params, pieces: Sequence[Piece]) -> Sampled:
        """Runs one step over the rows of all pieces, and tells each piece its first row."""
        count = 0
        for piece in pieces:
            piece.row, count = count, count + len(piece.tokens)
        ends = [p.position + len(p.tokens) for p in pieces]
        return self._step(params, self._rows(pieces, count), self._masks(pieces, count), max(ends))

    def wipe(self, block: int) -> None:
        """Zeroes a block."""
        self._meet("wipe")
        with on(self._mesh):
            cache = device.wipe(self._slots.cache, np.int32(block))
        self._slots = self._slots.replace(cache=cache)

    def warm_up(self, params: Params, rows: Sequence[dict], *, least: bool) -> list[str]:
        """Compiles every program; returns their names.

        Args:
          rows: of sampling parameters, one of each shape.
          least: only the smallest shapes; then later compilations are no surprise.
        """
        freq = rope.inv_freq(self.cfg).astype(np.float32)
        for attend in self.attends[: 1 if least else None]:
            chunks = CHUNKS[: 1 if least else None]
            for size in (c for c in chunks if c <= attend and not self.one_way):
                tokens = np.zeros(size, np.int32)
                self._prefill(params, self._table([[]]), tokens, 0, freq, NONE, attend)
            for size in self.sizes[: 1 if least else None]:
                self._step(params, self._rows((), size), self._no_mask[size], attend)
        for row in rows:
            self.seat(0, row)
        if not least:
            self.wipe(0)
        jax.block_until_ready(self._slots)
        self.warm = not least
        return sorted(" ".join(map(str, p)) for p in self._met)

    def _rows(self, pieces: Sequence[Piece], count: int) -> device.Rows:
        size = pick_bucket(count, self.sizes)
        table = self._table([()] * size)
        rows = device.Rows(
            slot=np.zeros(size, np.int32),
            token=np.zeros(size, np.int32),
            position=np.zeros(size, np.int32),
            table=table,
            inv_freq=np.zeros((size, self.cfg.head_dim // 2), np.float32),
            active=np.zeros(size, bool),
            adapter=np.full(size, NONE, np.int32),
        )
        for piece in pieces:
            here = slice(piece.row, piece.row + len(piece.tokens))
            rows.slot[here], rows.token[here] = piece.request.slot, piece.tokens
            rows.position[here] = piece.position + np.arange(len(piece.tokens))
            rows.adapter[here] = piece.request.adapter
            table[here, : len(piece.request.blocks)] = piece.request.blocks
            rows.inv_freq[here], rows.active[here] = piece.request.freq, piece.chooses
        return rows

    def _masks(self, pieces: Sequence[Piece], count: int) -> tuple:
        """The packed token masks of the rows under a grammar."""
        size = pick_bucket(count, self.sizes)
        constrained = [p for p in pieces if p.chooses and p.request.matcher]
        if not constrained:
            return self._no_mask[size]
        words, masked = np.zeros((size, self._words), np.uint32), np.zeros(size, bool)
        for piece in constrained:
            words[piece.row], masked[piece.row] = piece.request.mask, True
        return words, masked

    def _table(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        table = np.full((len(rows), self._width), -1, np.int32)
        for row, blocks in zip(table, rows, strict=True):
            row[: len(blocks)] = blocks
        return table

    def _prefill(self, params, table, tokens, start, freq, adapter, attend) -> None:
        self._meet("prefill", len(tokens), attend)
        state = params, self._slots.cache, table, tokens, np.int32(start), freq
        with on(self._mesh):
            cache = device.prefill(*state, np.int32(adapter), cfg=self.cfg, attend=attend)
        self._slots = self._slots.replace(cache=cache)

    def _step(self, params, rows: device.Rows, masks, end: int) -> Sampled:
        attend = pick_bucket(end, self.attends)
        self._meet("step", len(rows.slot), attend)
        how = {"cfg": self.cfg, "attend": attend}
        with on(self._mesh):
            self._slots, out = device.step(params, self._slots, rows, *masks, **how)
        return out

    def _meet(self, *program) -> None:
        """Counts the programs in use: a new one after the warm-up is a compilation someone sees."""
        if program in self._met:
            return
        self._met.add(program)
        self.stats.programs = len(self._met)
        self.stats.recompilations += self.warm
        say = log.warning if self.warm else log.info
        say("compiling %s%s", " ".join(map(str, program)), " after the warm-up" * self.warm)
