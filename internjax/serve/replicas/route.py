"""Which replica answers a request: one that has seen its beginning, unless it is too busy.

Rendezvous hashing (Thaler and Ravishankar 1998): every pair of key and replica has a weight, the
heaviest wins. A replica that fails moves only its own keys, and they come back when it does.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

PREFIX_TEXT, PREFIX_IDS = 1024, 256  # what of a plain prompt counts as its beginning


@runtime_checkable
class Target(Protocol):
    """What routing sees of a replica."""

    index: int
    ready: bool
    in_flight: int
    requests: int


@dataclass(frozen=True)
class Key:
    """What requests that belong together have in common.

    Fields:
      text: equal for them; bound: they must not go elsewhere, for one replica holds their history.
    """

    text: str
    bound: bool = False


def key_of(path: str, body: bytes) -> Key | None:
    """Returns the key of a request; None where any replica will do, also for what is no JSON.

    Conversations: all up to the first message of the user, so that later turns follow the first.
    """
    if not body.startswith((b"{", b" ", b"\n", b"\t", b"\r")):
        return None
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the replica says what is wrong with it
    if not isinstance(asked, dict):
        return None
    if path == "/v1/chat/interactive" and asked.get("session_id", -1) != -1:
        return Key(f"session {asked['session_id']}", bound=True)
    beginning = _beginning(asked)
    if beginning is None:
        return None
    shared = [asked.get("model"), asked.get("tools"), asked.get("instructions"), beginning]
    return Key(json.dumps(shared, sort_keys=True))


def _beginning(asked: dict[str, Any]) -> Any:
    messages = asked.get("messages", asked.get("input"))
    if isinstance(messages, list):
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
        return messages[: roles.index("user") + 1] if "user" in roles else messages
    prompt = asked.get("prompt", messages)
    if isinstance(prompt, list):
        return prompt[:PREFIX_IDS] if prompt and isinstance(prompt[0], int) else prompt[:1]
    return prompt[:PREFIX_TEXT] if isinstance(prompt, str) else None


def choose[T: Target](replicas: Sequence[T], key: Key | None, spread: int) -> T | None:
    """Returns the replica for a request; None when none may take it now.

    Args:
      spread: by how many requests the favourite of a key may be busier than the idlest replica.
    """
    if key is not None and key.bound:
        favourite = max(replicas, key=lambda r: _weight(key, r.index))
        return favourite if favourite.ready else None
    ready = [r for r in replicas if r.ready]
    if not ready:
        return None
    idlest = min(ready, key=lambda r: (r.in_flight, r.requests))
    if key is None:
        return idlest
    favourite = max(ready, key=lambda r: _weight(key, r.index))
    return favourite if favourite.in_flight - idlest.in_flight <= spread else idlest


def _weight(key: Key, index: int) -> bytes:
    salt = index.to_bytes(8, "little")
    return hashlib.blake2b(key.text.encode("utf-8", "surrogatepass"), salt=salt).digest()
