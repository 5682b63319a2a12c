"""Conversations that the server keeps: a bounded number, the longest unused forgotten first."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from internjax.serve.thread import Ticket


@dataclass
class Talk:
    """One conversation.

    Fields:
      messages: as the chat template takes them; tokens: of all of them so far.
      record: the last answer as it was given out, for clients that ask for it again.
      ticket: of the answer that is being written, None while there is none.
    """

    messages: list[dict] = field(default_factory=list)
    tokens: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    ticket: Ticket | None = None


class Memory:
    """Conversations by owner and name. Nobody finds those of another owner."""

    def __init__(self, size: int = 1024):
        """Holds up to `size` conversations."""
        self.size = size
        self._talks: OrderedDict[tuple[str, str], Talk] = OrderedDict()

    def find(self, owner: str, name: str) -> Talk | None:
        """Returns a conversation, None when there is none or it has been forgotten."""
        talk = self._talks.get((owner, name))
        if talk is not None:
            self._talks.move_to_end((owner, name))
        return talk

    def keep(self, owner: str, name: str, talk: Talk) -> None:
        """Remembers a conversation; the one unused for longest makes room."""
        self._talks[owner, name] = talk
        self._talks.move_to_end((owner, name))
        while len(self._talks) > self.size:
            self._talks.popitem(last=False)

    def drop(self, owner: str, name: str) -> Talk | None:
        """Forgets a conversation and returns it."""
        return self._talks.pop((owner, name), None)

    def __len__(self) -> int:
        return len(self._talks)
