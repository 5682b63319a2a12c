"""From token ids to text that can be shown: whole letters only, nothing of a stop string."""

from collections.abc import Sequence

from internjax.data.tokenizer import StreamDecoder, Tokenizer
from internjax.models.lm import SamplingParams


class TextStream:
    """Incremental text of one request.

    Text that may be the beginning of a stop string is held back until that is decided, so what was
    handed out never has to be taken back; the stop string itself is never handed out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        after: int | None = None,
        *,
        min_tokens: int = 0,
        skip_specials: bool = True,
    ):
        """Begins a text.

        Args:
          after: last id of a raw prompt that is continued; the first word then keeps its space.
          min_tokens: a stop string that is complete before so many tokens is plain text.
        """
        self._decoder = StreamDecoder(tokenizer, skip_specials=skip_specials)
        if after is not None:
            self._decoder.push(after)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._unarmed = min_tokens
        self.stopped = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, params: SamplingParams, after: int | None) -> "TextStream":
        """Begins the text of a request."""
        return cls(
            tokenizer,
            params.stop,
            after,
            min_tokens=params.min_tokens,
            skip_specials=params.skip_special_tokens,
        )

    def push(self, token: int) -> str:
        """Takes the next id; returns what is now certain and sets `stopped` at a stop string."""
        self._unarmed -= 1
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """Ends the text: what was held back is no stop string after all."""
        if self.stopped:
            return ""
        certain = self._take(self._decoder.flush())
        held, self._held = self._held, ""
        return certain if self.stopped else certain + held

    def _take(self, new: str) -> str:
        text, old = self._held + new, len(self._held)
        # Only what the new letters complete: what was complete before had its chance then.
        found = [text.find(s, max(0, old - len(s) + 1)) for s in self._stop]
        found = [at for at in found if at >= 0]
        if found and self._unarmed <= 0:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
