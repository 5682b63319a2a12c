"""Which documents train and which are held out: a stable draw over groups that share text."""

import hashlib
from collections.abc import Sequence

from internjax.errors import UserError


def split_heldout(
    names: Sequence[str], groups: Sequence[int], fraction: float, seed: int
) -> set[str]:
    """Returns the names of the held-out documents: whole groups, drawn by the hash of the group.

    A group is named by the least name in it, so new documents elsewhere do not move it. At least
    one group is held out and at least one trains, whatever the draw says.

    Args:
      names: document ids; groups: for each, a label shared by documents that must stay together.
      fraction: expected share of the groups, 0 (nothing is held out) <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction {fraction} must lie in 0 <= x < 1.")
    members: dict[int, list[str]] = {}
    for name, group in zip(names, groups, strict=True):
        members.setdefault(group, []).append(name)
    if not fraction:
        return set()
    if len(members) < 2:
        raise UserError(
            f"{len(names)} documents in {len(members)} group of related texts cannot be divided "
            "into training and held-out text: add documents, or set heldout=0."
        )
    draws = sorted((draw(min(group), seed), group) for group in members.values())
    count = sum(value < fraction for value, _ in draws)
    count = min(max(count, 1), len(draws) - 1)
    return {name for _, group in draws[:count] for name in group}


def draw(name: str, seed: int) -> float:
    """Returns a number in [0, 1) that depends on name and seed only."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
