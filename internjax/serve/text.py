"""From token ids to text that can be shown: whole letters only, nothing of a stop string."""

from collections.abc import Sequence

from internjax.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Incremental text of one request.

    Text that may be the beginning of a stop string is held back until that is decided, so what was
    handed out never has to be taken back; the stop string itself is never handed out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: int | None = None):
        """Begins a text.

        Args:
          after: last id of a raw prompt that is continued; the first word then keeps its space.
        """
        self._decoder = StreamDecoder(tokenizer, skip_specials=True)
        if after is not None:
            self._decoder.push(after)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next id; returns what is now certain and sets `stopped` at a stop string."""
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """Ends the text: what was held back is no stop string after all."""
        if self.stopped:
            return ""
        certain = self._take(self._decoder.flush())
        held, self._held = self._held, ""
        return certain if self.stopped else certain + held

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
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
