"""The mixture of sources that a model is trained on; the batch of a step is a pure function.

`Mixture(sources, plan, config).batch_at(step)` depends on (seed, mixture, step) and on nothing
else: not on what was read before, not on the number of processes, not on the mesh. A process reads
only the rows it needs. There is no state to save.

How a row is found: the step says which rows of one endless stream it takes (`BatchPlan`). The
stream is cut into blocks of 65,536 rows in which every source has exactly its share, in a shuffled
order; so the block says which source a row comes from and how many rows the source gave before. The
n-th row of a source lies in epoch n // rows, at a place that a keyed permutation of the epoch names
(`permute`). Weights change at given batches: a new piece of the stream, with blocks of its own.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from internjax.data.batch import Batch
from internjax.data.permute import key_of, keys_of, permute
from internjax.data.rows import Blank, Rows, check_ids
from internjax.data.schedule import BatchPlan
from internjax.data.shards import HEADER, TokenShards
from internjax.data.store import is_address
from internjax.errors import Missing, UserError

BLOCK = 2**16  # rows in which the shares are exact, so also the fineness of weights


@dataclass(frozen=True)
class WeightsFrom:
    """Weights that count from a batch on.

    Fields:
      batch: its number, as `BatchPlan` counts them, the skipped ones too.
      weights: share of the rows by source; any scale. A source that is not named gets none.
    """

    batch: int
    weights: dict[str, float]


@dataclass(frozen=True)
class MixtureConfig:
    """How sources become rows.

    Fields:
      length: tokens a row. packing: see `rows.PACKINGS`.
      weights: pieces of a schedule, the first from batch 0; empty: as many rows as a source has.
      seed: of both orders, of the sources and inside them.
    """

    length: int = 2048
    packing: str = "apart"
    weights: tuple[WeightsFrom, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class _Piece:
    """A stretch of the stream with constant weights.

    Fields:
      first_row: where it begins; quotas: rows of each source in every block.
      before: rows that each source gave earlier.
    """

    first_row: int
    quotas: Int64[np.ndarray, "S"]
    before: Int64[np.ndarray, "S"]


class Mixture:
    """Sources, their weights and the plan of batches.

    Args:
      sources: token shards by name. The name, not the order, decides what a source gives.
      vocab_size: rows of the model's embedding; None leaves them unchecked.

    Raises:
      UserError: sources that do not fit each other or the model, or weights that say nothing.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        plan: BatchPlan,
        config: MixtureConfig,
        *,
        vocab_size: int | None = None,
    ):
        check_sources(sources, vocab_size)
        self.plan, self.config = plan, config
        self.names = sorted(sources)
        self.rows = [Rows(sources[name], config.length, config.packing) for name in self.names]
        self._sizes = np.array([len(rows) for rows in self.rows], np.int64)
        self._keys = [key_of("source", config.seed, name) for name in self.names]
        self._block = functools.lru_cache(maxsize=8)(self._make_block)
        self._pieces: list[_Piece] = []
        for entry in self._schedule():
            self._add_piece(entry)

    def batch_size(self, step: int) -> int:
        """Returns the rows of a step."""
        return self.plan.size(step)

    def batch_at(self, step: int, rows: slice | Sequence[int] | np.ndarray | None = None) -> Batch:
        """Returns the batch of a step, or of it only the rows named, as NumPy arrays `[B, T]`.

        Args:
          rows: which rows of the batch, counted from 0; those of one process, for example.

        Raises:
          Corrupt: the shards hold a token beyond their vocabulary, or end too early.
        """
        source, place = self._locate(self._stream_rows(step, rows))
        blank = Blank(len(source), self.config.length)
        for at, (number, row) in enumerate(zip(source.tolist(), place.tolist())):
            self.rows[number].fill(blank, at, row)
            check_ids(blank.tokens[at], self.rows[number].shards)
        return blank.batch(source.astype(np.int32))

    def trace(self, step: int, row: int) -> tuple[str, list[tuple[int, int, int]]]:
        """Returns where a row came from: source, and (document, first token, tokens) in it."""
        source, place = self._locate(self._stream_rows(step, [row]))
        return self.names[source[0]], self.rows[source[0]].documents(int(place[0]))

    def epochs(self, step: int) -> dict[str, float]:
        """Returns how often each source has been gone through before a step."""
        drawn = self._drawn_before(self.plan.first_row(step))
        return {
            name: float(count / max(size, 1))
            for name, count, size in zip(self.names, drawn, self._sizes)
        }

    def settings(self) -> dict[str, Any]:
        """Returns what decides the batches, as JSON values: a resumed run must have the same."""
        return {
            "seed": self.config.seed,
            "length": self.config.length,
            "packing": self.config.packing,
            "weights": [{"batch": w.batch, **w.weights} for w in self.config.weights],
            "batch_size": self.plan.batch_size,
            "rampup": self.plan.rampup,
            "skip_batches": self.plan.skip_batches,
            "sources": {
                name: key_of(*(shard["sha256"] for shard in rows.shards.header["shards"]))
                for name, rows in zip(self.names, self.rows)
            },
        }

    # --- from a step to rows of sources -----------------------------------------------------------

    def _stream_rows(self, step: int, rows) -> Int64[np.ndarray, "B"]:
        size, first = self.plan.size(step), self.plan.first_row(step)
        if rows is None or isinstance(rows, slice):
            picked = np.arange(size, dtype=np.int64)[rows or slice(None)]
        else:
            picked = np.asarray(rows, np.int64)
            if picked.size and not 0 <= picked.min() <= picked.max() < size:
                raise UserError(f"step {step} has rows 0..{size - 1}; asked for {picked.max()}.")
        return first + picked

    def _locate(self, stream: Int64[np.ndarray, "B"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source `[B]` and the row in it `[B]` of rows of the stream."""
        source, nth = np.empty_like(stream), np.empty_like(stream)
        firsts = [piece.first_row for piece in self._pieces]
        number = np.searchsorted(firsts, stream, side="right") - 1
        block, inside = np.divmod(stream - np.array(firsts)[number], BLOCK)
        for piece, which in {*zip(number.tolist(), block.tolist())}:
            here = (number == piece) & (block == which)
            order, rank = self._block(piece, which)
            source[here] = found = order[inside[here]].astype(np.int64)
            earlier = self._pieces[piece].before + which * self._pieces[piece].quotas
            nth[here] = earlier[found] + rank[inside[here]]
        place = np.empty_like(stream)
        for index in np.unique(source).tolist():
            here = source == index
            epoch, at = np.divmod(nth[here], self._sizes[index])
            keys = keys_of(self._keys[index], epoch)
            place[here] = permute(at, int(self._sizes[index]), keys)
        return source, place

    def _make_block(self, piece: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of every row of a block, and its rank among the rows of its source."""
        quotas = self._pieces[piece].quotas
        key = key_of("mixture", self.config.seed, piece, block)
        shuffled = permute(np.arange(BLOCK), BLOCK, np.full(BLOCK, key, np.uint64))
        order = np.searchsorted(np.cumsum(quotas), shuffled, side="right").astype(np.int32)
        rank = np.empty(BLOCK, np.int32)
        by_source = np.argsort(order, kind="stable")
        rank[by_source] = np.arange(BLOCK) - np.repeat(np.cumsum(quotas) - quotas, quotas)
        return order, rank

    def _drawn_before(self, row: int) -> Int64[np.ndarray, "S"]:
        """Returns how many rows each source gave in rows 0..row-1 of the stream."""
        number = bisect.bisect_right([p.first_row for p in self._pieces], row) - 1
        piece = self._pieces[number]
        blocks, rest = divmod(row - piece.first_row, BLOCK)
        drawn = piece.before + blocks * piece.quotas
        if rest:
            order, _ = self._block(number, blocks)
            drawn = drawn + np.bincount(order[:rest], minlength=len(self.names))
        return drawn

    # --- weights ----------------------------------------------------------------------------------

    def _schedule(self) -> list[WeightsFrom]:
        entries = list(self.config.weights)
        if not entries:
            return [WeightsFrom(0, dict(zip(self.names, map(float, self._sizes))))]
        batches = [entry.batch for entry in entries]
        if batches[0] != 0 or any(a >= b for a, b in itertools.pairwise(batches)):
            raise UserError(
                f"weights change at batches {batches}: the first must be 0 and each later than the "
                "one before."
            )
        return entries

    def _add_piece(self, entry: WeightsFrom) -> None:
        weights = check_weights(entry, self.names, self._sizes)
        first = self.plan.rows_before(entry.batch)
        before = self._drawn_before(first) if self._pieces else np.zeros(len(self.names), np.int64)
        self._pieces.append(_Piece(first, _quotas(weights, self.names), before))


def open_sources(path: Path | str, **options: Any) -> dict[str, TokenShards]:
    """Opens a folder of token shards, or a folder whose sub-folders are sources, by their names.

    An address (s3://...) cannot be listed for sub-folders: name it `ADDRESS/{en,zh}`.

    Args:
      options: go to `TokenShards`.
    """
    text = str(path)
    if text.endswith("}") and "/{" in text:
        base, _, names = text[:-1].rpartition("/{")
        found = {name.strip(): f"{base}/{name.strip()}" for name in names.split(",")}
        return {name: TokenShards(place, **options) for name, place in found.items()}
    if is_address(path) or (Path(path) / HEADER).is_file():
        return {text.rstrip("/").rpartition("/")[2]: TokenShards(path, **options)}
    folders = sorted(file.parent for file in Path(path).glob(f"[!.]*/{HEADER}"))  # none half made
    if not folders:
        raise Missing(
            f"{path} holds no token shards, and neither does a folder in it (no {HEADER}): make "
            "them with `internjax data`."
        )
    return {folder.name: TokenShards(folder, **options) for folder in folders}


def check_sources(sources: Mapping[str, TokenShards], vocab_size: int | None) -> None:
    """Raises `UserError` where sources have other tokenizers, or ids that the model has not."""
    if not sources:
        raise UserError("the mixture names no source of token shards.")
    made_with = {name: shards.header["tokenizer"] for name, shards in sources.items()}
    (first, tokenizer), *others = made_with.items()
    for name, other in others:
        if other != tokenizer:
            raise UserError(
                f"sources {first} and {name} were made with different tokenizers "
                f"({tokenizer[:12]} and {other[:12]}): make one of them again."
            )
    for name, shards in sources.items():
        if vocab_size is not None and shards.vocab_size > vocab_size:
            raise UserError(
                f"source {name} has token ids up to {shards.vocab_size - 1}, the model's "
                f"vocabulary ends at {vocab_size - 1}: they belong to different tokenizers."
            )


def check_weights(
    entry: WeightsFrom, names: Sequence[str], sizes: Int64[np.ndarray, "S"]
) -> Float64[np.ndarray, "S"]:
    """Returns the weights by source `[S]`, of sum 1; refuses those that cannot be meant."""
    where = f"weights from batch {entry.batch}"
    for name, weight in entry.weights.items():
        if name not in names:
            raise UserError(f"{where}: no source {name!r}; there are {', '.join(names)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{where}: {name}={weight} must be a number from 0.")
    weights = np.array([entry.weights.get(name, 0.0) for name in names])
    for name, weight, size in zip(names, weights, sizes):
        if weight and not size:
            raise UserError(f"{where}: source {name} is empty, but has the weight {weight:g}.")
    if not weights.sum():
        raise UserError(f"{where}: all are zero, or every source is empty: no row can be drawn.")
    return weights / weights.sum()


def _quotas(weights: Float64[np.ndarray, "S"], names: Sequence[str]) -> Int64[np.ndarray, "S"]:
    """Shares BLOCK rows out by largest remainder."""
    exact = weights * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    left = BLOCK - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    for name, weight, quota in zip(names, weights, quotas):
        if weight and not quota:
            raise UserError(
                f"weights: {name} has a share of {weight:.1e}, less than the smallest, "
                f"1/{BLOCK}: raise it, or set it to 0."
            )
    return quotas
