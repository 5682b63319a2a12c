"""Guesses of the next tokens, to be checked by one step of the model (speculative decoding).

A step runs a request's last token and its guesses side by side and chooses what follows each. What
a row chooses depends on the tokens before it, the request's seed and its place alone, so guesses
are right or wrong, and the answer is the one that would have come without them, token for token,
sampled ones too. (arXiv:2211.17192 accepts more sampled guesses by drawing anew; then only the
distribution stays.)
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from internjax.errors import UserError
from internjax.models import rope
from internjax.models.load import Model
from internjax.serve.config import EngineConfig, EngineStats
from internjax.serve.prepare import prepare_params
from internjax.serve.programs import Piece, Programs
from internjax.serve.sampling import adjusts
from internjax.serve.scheduler import Request

LONGEST, SHORTEST = 4, 2
"""Tokens that must stand the same before a guess."""


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before.

    As prompt lookup decoding in transformers and vLLM: good for answers that quote their prompt.
    """

    def __init__(self):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns up to `count` guesses of what follows; `tokens` only ever grows between calls."""
        for token in tokens[len(self._tokens) :]:
            here = len(self._tokens)
            for size in range(SHORTEST, min(LONGEST, here) + 1):
                self._after[tuple(self._tokens[-size:])] = here
            self._tokens.append(token)
        for size in range(LONGEST, SHORTEST - 1, -1):
            if (at := self._after.get(tuple(self._tokens[-size:]))) is not None:
                return self._tokens[at : at + count]
        return []


class DraftModel:
    """A smaller model that guesses greedily, over a cache of its own in the same blocks.

    Where it did not see a token (steps without guesses), it guesses worse, and nothing else. It is
    small: one device has it whole, over however many the model is cut.
    """

    def __init__(
        self, model: Model, config: EngineConfig, context: int, blocks: int, stats: EngineStats
    ):
        config = replace(config, speculate=0, invariant=False, tensor=1)
        self.params = prepare_params(model.params, config, model.cfg.dtype)
        self.programs = Programs(model.cfg, config, self.params, context, blocks, stats)
        self._freq = rope.inv_freq(model.cfg, context).astype(np.float32)

    def prefill(self, request: Request) -> None:
        """Reads what the model has read of a request and did not find in the cache."""
        mine = replace(request, freq=self._freq, prefilled=request.reused)
        while mine.to_prefill:
            mine.prefilled += self.programs.prefill(self.params, mine)[0]

    def guess(self, wanted: Sequence[tuple[Request, int]]) -> dict[int, Sequence[int]]:
        """Returns so many guesses for each request, by its id."""
        if not wanted:
            return {}
        rows, chosen = [replace(r, freq=self._freq) for r, _ in wanted], []
        # The last guess is fed, too: if it is right, its keys and values are there.
        for ahead in range(max(n for _, n in wanted) + 1):
            token = lambda r, ahead=ahead: -1 if ahead else r.tokens[-1]  # noqa: E731
            pieces = [
                Piece(r, (token(r),), r.length + ahead)
                for r, (_, n) in zip(rows, wanted, strict=True)
                if ahead <= n
            ]
            chosen.append(self.programs.step(self.params, pieces))
            places = {p.request.id: p.row for p in pieces}
            chosen[-1] = (chosen[-1].token, places)
        read = [(np.asarray(tokens), places) for tokens, places in chosen]
        return {r.id: [int(tokens[places[r.id]]) for tokens, places in read[:n]] for r, n in wanted}

    def warm_up(self, rows: Sequence[dict], *, least: bool) -> list[str]:
        """Compiles its programs."""
        return self.programs.warm_up(self.params, rows, least=least)


def may_guess(request: Request) -> bool:
    """Whether what a row may choose is known without reading the row before it.

    It is not where penalties, bans or a grammar look at the tokens generated last.
    """
    params = request.params
    looks_back = adjusts(params) or params.bad_words or params.min_tokens
    return request.matcher is None and not looks_back


def check_draft(model: Model, draft: Model) -> None:
    """Raises UserError for a draft model of another vocabulary."""
    ours, theirs = (m.tokenizer for m in (model, draft))
    probe = range(0, ours.vocab_size, max(1, ours.vocab_size // 997))
    same = ours.vocab_size == theirs.vocab_size and model.cfg.vocab_size == draft.cfg.vocab_size
    if not same or any(ours.token_bytes(i) != theirs.token_bytes(i) for i in probe):
        raise UserError(
            f"draft={draft.cfg.name}: its vocabulary of {theirs.vocab_size} tokens is not that of"
            f" {model.cfg.name} ({ours.vocab_size}): guesses must be ids of the same tokens."
        )
