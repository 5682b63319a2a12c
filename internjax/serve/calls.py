"""Reads tool calls out of an answer while it grows."""

import json
import re
import uuid
from dataclasses import dataclass, field

from internjax.serve.text import overlap
from internjax.serve.tools import STYLES, Style

_HEADS = {
    style: re.compile(r'\s*\{"name": "([A-Za-z0-9_.-]+)", ' + json.dumps(style.key) + ": ")
    for style in STYLES.values()
}


@dataclass
class ToolCall:
    """A call as far as it is written; `arguments` is JSON once it is `complete`."""

    name: str
    arguments: str = ""
    complete: bool = False
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def message(self) -> dict:
        """The call in OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Splits a text that follows the grammar of `tools.plan_tools` into words and calls.

    Fields:
      words: all that is certain to be no part of a call; calls: in the order of the text.
    """

    def __init__(self, style: Style, *, anywhere: bool):
        """Begins an answer; with `anywhere` words may stand before the first call."""
        self.words, self.calls = "", []
        self._style = style
        self._opener = "".join(style.opener)
        self._text, self._at, self._begun = "", 0, 0
        self._read = self._words if anywhere else self._first
        self._depth, self._inside, self._escaped = 0, False, False

    def push(self, text: str) -> None:
        """Takes more text."""
        self._text += text
        while self._read():
            pass

    def finish(self) -> str:
        """Ends the text; returns what of it belongs to a call that was cut off."""
        rest = self._text[self._at :]
        if self._read in (self._arguments, self._tail):
            return self._text[self._begun :]
        if self._read == self._head:
            rest = self._text[self._begun :]
        # White space after a call is no text of the answer.
        self.words += rest if rest.strip() or not self.calls else ""
        return ""

    # Each state reads on from `_at`; it returns whether it came to an end and another goes on.

    def _first(self) -> bool:
        if self._text.startswith(self._opener):
            self._read = self._words
        elif not self._opener.startswith(self._text):
            self._read = self._only_words
        return self._read != self._first

    def _words(self) -> bool:
        at = self._text.find(self._opener, self._at)
        if at < 0:
            # A beginning of the opener, and white space that may stand before it, is held back.
            end = len(self._text) - overlap(self._text[self._at :], self._opener)
            end = self._at + len(self._text[self._at : end].rstrip())
            self.words += self._text[self._at : end]
            self._at = end
            return False
        said = self._text[self._at : at].rstrip()
        self.words += said
        self._begun = self._at + len(said)
        self._at, self._read = at + len(self._opener), self._head
        return True

    def _only_words(self) -> bool:
        self.words += self._text[self._at :]
        self._at = len(self._text)
        return False

    def _head(self) -> bool:
        found = _HEADS[self._style].match(self._text, self._at)
        if found is None:
            return False
        self.calls.append(ToolCall(found[1]))
        self._at, self._read = found.end(), self._arguments
        return True

    def _arguments(self) -> bool:
        """Follows strings and brackets of one JSON object to its end."""
        start = self._at
        while self._at < len(self._text):
            letter = self._text[self._at]
            self._at += 1
            if self._inside:
                self._inside = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._inside = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    break
        self.calls[-1].arguments += self._text[start : self._at]
        ended = not self._depth and self._at > start
        if ended:
            self._read = self._tail
        return ended

    def _tail(self) -> bool:
        at = self._text.find(self._style.closer, self._at)
        if at < 0:
            return False
        self.calls[-1].complete = True
        self._at, self._read = at + len(self._style.closer), self._words
        return True
