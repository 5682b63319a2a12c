"""Shuffling without memory: row `i` of a shuffled order, computed from the key alone.

A keyed permutation of 0..count-1 that holds no table, so that any place of any epoch of any number
of rows is known at once, in every process, with every version of NumPy (whose own generators may
change their streams).
"""

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8


def permute(
    index: Int64[np.ndarray, "n"], count: int, key: UInt64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Returns where each index goes in the permutation of 0..count-1 that its key names.

    An unbalanced Feistel network over the next power of two; what falls beyond `count` is sent
    through again until it falls inside (cycle walking: Black and Rogaway 2002), which keeps it a
    permutation. Fewer than two passes are expected, as the power of two is below twice `count`.
    """
    assert count > 0, "a permutation of nothing has no index"
    bits = max((count - 1).bit_length(), 2)
    turns = _scramble(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    out = _feistel(index.astype(np.uint64), bits, turns)
    while (outside := np.flatnonzero(out >= count)).size:
        out[outside] = _feistel(out[outside], bits, turns[:, outside])
    return out.astype(np.int64)


def key_of(*parts: int | str) -> int:
    """Returns a 64-bit key from numbers and names; the same everywhere and for ever."""
    text = "\n".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def keys_of(base: int, numbers: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Returns one key a number (an epoch, say), all derived from `base`."""
    return _scramble(np.uint64(base) ^ _scramble(numbers.astype(np.uint64) + np.uint64(1)))


def _feistel(
    value: UInt64[np.ndarray, "n"], bits: int, turns: UInt64[np.ndarray, "R n"]
) -> UInt64[np.ndarray, "n"]:
    """Changes each half in turn by a function of the other: reversible whatever the function."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64(2**low_bits - 1), np.uint64(2 ** (bits - low_bits) - 1)
    high, low = value >> np.uint64(low_bits), value & low_mask
    for number, turn in enumerate(turns):
        if number % 2:
            low = low ^ (_scramble(high ^ turn) & low_mask)
        else:
            high = high ^ (_scramble(low ^ turn) & high_mask)
    return high << np.uint64(low_bits) | low


def _scramble(x: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
