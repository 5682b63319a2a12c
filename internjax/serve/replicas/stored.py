"""Whose is a stored response? The replicas are asked, for only they know, and only its owner's key.

`/v1/responses/ID`, and `previous_response_id` of a new response.
"""

import asyncio
import json
import re
from collections.abc import Sequence

import httpx2

from internjax.serve.replicas.process import Replica
from internjax.serve.replicas.relay import Incoming

_PATH = "/v1/responses"
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SECONDS = 5.0


def response_id(incoming: Incoming) -> str | None:
    """Returns the id of the stored response that a request is about."""
    if not incoming.path.startswith(_PATH):
        return None
    if incoming.path != _PATH:
        id = incoming.path.removeprefix(f"{_PATH}/").partition("/")[0]
    else:
        try:
            asked = json.loads(incoming.body)
        except (ValueError, RecursionError):
            return None
        id = asked.get("previous_response_id") if isinstance(asked, dict) else None
    return id if isinstance(id, str) and _ID.fullmatch(id) else None


async def holder(replicas: Sequence[Replica], incoming: Incoming, id: str) -> Replica | None:
    """Returns the ready replica that holds a response of this client; None when none does."""
    keys = [(k, v) for k, v in incoming.headers if k == b"authorization"]
    keys += [(b"x-forwarded-for", incoming.client.encode())] if incoming.client else []

    async def holds(replica: Replica) -> bool:
        url = f"{replica.url}{_PATH}/{id}"
        try:
            answer = await replica.client.get(url, headers=keys, timeout=_SECONDS)
        except httpx2.TransportError:
            return False
        return answer.status_code == 200

    ready = [r for r in replicas if r.ready]
    found = await asyncio.gather(*map(holds, ready))
    return next((r for r, there in zip(ready, found, strict=True) if there), None)
