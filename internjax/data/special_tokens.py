"""Which tokens are markup: the names that end a turn, the names InternLM reserves, and how to find
them in text. Knows nothing of engines or files.
"""

import re
from collections.abc import Set

# Ids that InternLM2 and 2.5 keep for chat: the `.model` calls them [UNUSED_TOKEN_n], the released
# `tokenizer_config.json` gives them these names (InternLM2 technical report, arXiv:2403.17297).
INTERNLM2 = {
    "<|plugin|>": "[UNUSED_TOKEN_141]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|im_start|>": "[UNUSED_TOKEN_146]",
}

# A model that emits one of these has finished its turn or its document. `<TOKENS_UNUSED_139>` is
# InternLM v1's id 103166: the InternEvo alpaca recipe ends answers with it, while the released chat
# models end with the vocabulary's own `<eoa>`, 103028.
END_OF_TURN = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<eoa>",
    "<TOKENS_UNUSED_139>",
    "[UNUSED_TOKEN_145]",
)

_MARKUP = re.compile(r"\s*(<.*>|\[.*\])\s*", re.DOTALL)


def is_markup(text: str) -> bool:
    """Whether a token looks like a marker (`<think>`, `[INST]`) and not like words or blanks.

    Text typed by a user never becomes such a token, even where the vocabulary calls it ordinary.
    """
    return _MARKUP.fullmatch(text) is not None


class Splitter:
    """Cuts text at special tokens: the longest of those starting at the leftmost place wins."""

    def __init__(self, ids: dict[str, int], eats_left: Set[str], eats_right: Set[str]):
        """Markers in `eats_left` (`eats_right`) swallow the blanks before (after) them."""
        names = sorted(ids, key=len, reverse=True)
        self._ids = [ids[name] for name in names]
        alternatives = [
            (r"\s*" if name in eats_left else "")
            + re.escape(name)
            + (r"\s*" if name in eats_right else "")
            for name in names
        ]
        self._pattern = re.compile("|".join(f"({each})" for each in alternatives) or "(?!)")

    def __call__(self, text: str) -> list[str | int]:
        """Returns the text as plain strings (none empty) and ids, in order."""
        parts: list[str | int] = []
        at = 0
        for found in self._pattern.finditer(text):
            if found.start() > at:
                parts.append(text[at : found.start()])
            parts.append(self._ids[found.lastindex - 1])
            at = found.end()
        if at < len(text):
            parts.append(text[at:])
        return parts
