"""What may not be generated: bad words, and end tokens before their time.

A ban is a sequence of tokens and the position from which it is off. While it holds, the sequence's
last token is excluded wherever its other tokens have just been generated, so a ban of one token
excludes that token anywhere. Bans live on the device (`sampling.forbid`): the host need not have
read the last token before the next step is dispatched.
"""

from collections.abc import Sequence

import numpy as np

from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError
from internjax.models.lm import SamplingParams

MAX_BANS = 64
"""Sequences that one request may forbid; the device keeps a table of this many rows a slot."""
MAX_TOKENS = 8
"""Longest forbidden sequence."""
ALWAYS = 2**31 - 1

Ban = tuple[tuple[int, ...], int]
"""Tokens and the position from which they are allowed."""


def request_bans(params: SamplingParams, tokenizer: Tokenizer, prompt_length: int) -> list[Ban]:
    """Returns what a request forbids.

    Raises:
      UserError: an empty bad word, one of too many tokens, or too many of them.
    """
    bans = [(ids, ALWAYS) for ids in _spellings(params.bad_words, tokenizer)]
    if params.min_tokens:
        ends = set(params.stop_token_ids)
        ends |= set() if params.ignore_eos else set(tokenizer.eos_ids)
        bans += [((end,), prompt_length + params.min_tokens) for end in sorted(ends)]
    if len(bans) > MAX_BANS:
        raise UserError(
            f"bad_words (spelled by {len(bans)} sequences of tokens, with the end tokens that "
            f"min_tokens forbids): at most {MAX_BANS} are served. Give fewer words."
        )
    return bans


def _spellings(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Returns the words' tokens as they stand in a text: at a line's start and after a space."""
    line = tokenizer.encode("\n", specials=False)
    found = set()
    for word in words:
        if not word:
            raise UserError("bad_words: a word is empty.")
        for form in (word, f" {word}"):
            ids = tokenizer.encode(f"\n{form}", specials=False)[len(line) :]
            if len(ids) > MAX_TOKENS:
                raise UserError(
                    f"bad_words: {word!r} is {len(ids)} tokens long; at most {MAX_TOKENS} are "
                    "served. Forbid a shorter part of it."
                )
            found.add(tuple(ids))
    # A sequence that ends with another one is forbidden by that one already.
    inner = {ids for ids in found if any(ids[at:] in found for at in range(1, len(ids)))}
    return sorted(found - inner)


def ban_row(bans: Sequence[Ban], output: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Returns one slot's tables, by field of `sampling.Sampling`.

    Args:
      output: tokens generated so far, for a request that is seated again.
    """
    table = np.full((MAX_BANS, MAX_TOKENS), -1, np.int32)
    until = np.zeros(MAX_BANS, np.int32)
    for row, (ids, position) in enumerate(bans):
        table[row, MAX_TOKENS - len(ids) :] = ids
        until[row] = position
    recent = np.full(MAX_TOKENS - 1, -1, np.int32)
    last = list(output)[-(MAX_TOKENS - 1) :]
    recent[len(recent) - len(last) :] = last
    return {"bans": table, "bans_until": until, "recent": recent}
