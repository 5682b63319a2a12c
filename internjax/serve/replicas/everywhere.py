"""What concerns all replicas at once: adapters that are loaded and unloaded at run time.

What was loaded is told again to a replica that is started anew, before it gets requests.
"""

import json
import logging

import httpx2

from internjax.serve.replicas.process import Replica
from internjax.serve.replicas.relay import Incoming, Send, respond, send_whole, upstream

log = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Everywhere:
    """Tells all replicas the same, and remembers what a new one must be told."""

    def __init__(self):
        self._loaded: dict[str, Incoming] = {}  # by the adapter's name

    def takes(self, incoming: Incoming) -> bool:
        """Whether a request is for all."""
        return incoming.method == "POST" and incoming.path in (LOAD, UNLOAD)

    async def tell(self, replicas: list[Replica], incoming: Incoming, send: Send) -> None:
        """Asks one after another; gives the client the first refusal, else the last answer."""
        if not all(r.ready for r in replicas):
            message = "not every replica is ready: try again in a moment."
            await respond(send, 503, message, incoming.id, code="not_ready")
            return
        for replica in replicas:
            try:
                answer = await upstream(replica, incoming)
                await answer.aread()
            except httpx2.TransportError:
                message = f"replica {replica.index} has died meanwhile; send the request again."
                await respond(send, 500, message, incoming.id, code="replica_died")
                return
            if not answer.is_success:
                break
        else:
            self._remember(incoming)
        await send_whole(send, answer, answer.content, incoming, replica)

    async def catch_up(self, replica: Replica) -> None:
        """Tells a new replica what the others know."""
        for name, incoming in list(self._loaded.items()):
            try:
                answer = await upstream(replica, incoming)
                await answer.aread()
            except httpx2.TransportError:
                return  # it has died: the next one is told
            if not answer.is_success:
                log.error("replica %d does not load %s: %s", replica.index, name, answer.text)

    def _remember(self, incoming: Incoming) -> None:
        name = json.loads(incoming.body)["lora_name"]  # a replica has read and accepted it
        if incoming.path == LOAD:
            self._loaded[name] = incoming
        else:
            self._loaded.pop(name, None)
