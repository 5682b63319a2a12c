"""What the front asks of its replicas, over real HTTP messages with small servers as replicas."""

import asyncio
import json
from dataclasses import dataclass, field

import httpx2

from internjax.serve.replicas.config import FrontConfig
from internjax.serve.replicas.front import Front
from internjax.serve.replicas.process import DOWN, READY, Replica


@dataclass
class Server:
    """A replica's HTTP side: keeps what it was asked; answers as `answers` say, by path."""

    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict, bytes]] = field(default_factory=list)

    async def __call__(self, scope, receive, send):
        body = (await receive()).get("body", b"")
        self.asked.append((scope["method"], scope["path"], dict(scope["headers"]), body))
        status, answer = self.answers.get(scope["path"], (404, b"{}"))
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def paths(self):
        return [(method, path) for method, path, _, _ in self.asked]


def run(ask, *servers):
    """Runs `ask(client, front)` against a front over these servers."""

    async def main():
        replicas = [Replica(i, state=READY) for i in range(len(servers))]
        for replica, server in zip(replicas, servers, strict=True):
            transport = httpx2.ASGITransport(app=server)
            replica.client = httpx2.AsyncClient(transport=transport)
        front = Front(replicas, FrontConfig("127.0.0.1", 0, len(servers), 1.0, 1000))
        transport = httpx2.ASGITransport(app=front, client=("192.0.2.7", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://front") as client:
            return await ask(client, front)

    return asyncio.run(main())


def test_a_stored_response_is_found_where_it_is():
    servers = [Server({"/v1/responses": (200, b"{}")}) for _ in range(3)]
    servers[1].answers["/v1/responses/resp_1"] = (200, b'{"id": "resp_1"}')

    async def ask(client, front):
        key = {"authorization": "Bearer k"}
        body = {"previous_response_id": "resp_1", "input": "x"}
        went = [await client.post("/v1/responses", json=body, headers=key) for _ in range(3)]
        went += [await client.get("/v1/responses/resp_1", headers=key)]
        went += [await client.delete("/v1/responses/resp_1", headers=key)]
        assert [w.headers["x-replica"] for w in went] == ["1"] * 5
        lost = await client.get("/v1/responses/resp_2", headers=key)
        odd = await client.post("/v1/responses", json={"previous_response_id": "../x"})
        return lost.status_code, odd.status_code

    assert run(ask, *servers) == (404, 200)
    keys = {h.get(b"authorization") for s in servers for _, p, h, _ in s.asked if "resp_1" in p}
    assert keys == {b"Bearer k"}
    assert not any("x" in path.rsplit("/", 1)[1] for s in servers for _, path in s.paths())


def test_adapters_are_loaded_everywhere_and_by_those_who_come_later():
    loaded = {"/v1/load_lora_adapter": (200, b"ok"), "/v1/unload_lora_adapter": (200, b"ok")}
    servers = [Server(dict(loaded)) for _ in range(2)]

    async def ask(client, front):
        first, second = front.replicas
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        for name in "ab":
            assert (await client.post(load, json={"lora_name": name})).status_code == 200
        assert (await client.post(unload, json={"lora_name": "a"})).status_code == 200
        await front.everywhere.catch_up(second)
        servers[1].answers[load] = (400, b"no such file")
        refused = await client.post(load, json={"lora_name": "c"})
        await front.everywhere.catch_up(second)
        first.state = DOWN
        return refused, await client.post(load, json={"lora_name": "d"})

    refused, waiting = run(ask, *servers)
    assert (refused.status_code, refused.text) == (400, "no such file")
    assert waiting.status_code == 503
    names = [[json.loads(body)["lora_name"] for *_, body in s.asked] for s in servers]
    assert names == [["a", "b", "a", "c"], ["a", "b", "a", "b", "c", "b"]]


def test_a_replica_learns_whose_request_it_is_and_no_lies():
    server = Server({"/v1/models": (200, b"{}")})

    async def ask(client, front):
        headers = {"x-forwarded-for": "10.0.0.1", "x-request-id": "mine-1", "connection": "close"}
        answer = await client.get("/v1/models?a=b", headers=headers)
        other = await client.get("/v1/models", headers={"x-request-id": "\t" + "x" * 200})
        return answer.headers["x-request-id"], other.headers["x-request-id"]

    mine, other = run(ask, server)
    assert mine == "mine-1" and other.startswith("req-")
    headers = server.asked[0][2]
    assert headers[b"x-forwarded-for"] == b"192.0.2.7"
    assert headers[b"x-request-id"] == b"mine-1"
    assert headers.get(b"connection") != b"close"


def test_only_reading_health_is_the_fronts_own():
    server = Server({"/health": (200, b"cors")})

    async def ask(client, front):
        own, passed = await client.get("/health"), await client.options("/health")
        front.closing = True
        closing, refused = await client.get("/health"), await client.get("/v1/models")
        return own.json()["status"], passed.text, closing, refused

    own, passed, closing, refused = run(ask, server)
    assert (own, passed) == ("ok", "cors")
    assert closing.status_code == refused.status_code == 503
    assert closing.json()["status"] == refused.json()["error"]["code"] == "closing"
    assert refused.headers["retry-after"] == "1"


class Gone(httpx2.AsyncBaseTransport):
    """Where nobody listens any more."""

    async def handle_async_request(self, request):
        raise httpx2.ConnectError("connection refused")


def test_a_request_without_a_connection_goes_to_another_replica():
    async def ask(client, front):
        front.replicas[0].client = httpx2.AsyncClient(transport=Gone())
        return await client.get("/v1/models"), front.replicas[0].state

    answer, state = run(ask, Server(), Server({"/v1/models": (200, b"{}")}))
    assert (answer.status_code, answer.headers["x-replica"], state) == (200, "1", DOWN)
