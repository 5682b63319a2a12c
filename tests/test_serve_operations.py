"""What operators need of the HTTP server: keys, limits, logs, series, aborts, a clean end."""

import asyncio
import json
import logging
import os
import random
import re
import resource
import signal
import stat
import threading
import time
import urllib.request

import httpx2 as httpx
import openai
import pytest

from internjax.errors import Corrupt, Missing, UserError
from internjax.experiments.serve_model import ServeRun, serve_model
from internjax.models.lm import SamplingParams
from internjax.serve.engine import Engine
from internjax.serve.http.errors import ApiError
from internjax.serve.http.limits import Limits
from internjax.serve.http.memory import Memory, Talk
from internjax.serve.keys import Keys, new_key, read_keys, remove_key
from internjax.serve.listening import listening
from internjax.serve.server import ServeConfig, run_server, serving
from internjax.serve.thread import EngineThread, Job
from tests.test_serve_engine import make_model
from tests.test_serve_openai import ENGINE

HI = [{"role": "user", "content": "hi"}]
BODY = {"model": "tiny", "messages": HI, "max_tokens": 4}
LONG = {**BODY, "max_tokens": 300, "ignore_eos": True}
CHAT = "/chat/completions"


@pytest.fixture(scope="module")
def model():
    return make_model(context=2048)


@pytest.fixture(scope="module")
def url(model):
    with serving(model, name="tiny", engine=ENGINE, cors_origins=("https://page.example",)) as url:
        yield url


def series(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("internjax_"): float(value) for name, value in pairs}


def until(happens, seconds=20):
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happens()


# Keys ---------------------------------------------------------------------------------------


def test_keys_are_kept_as_salted_hashes(tmp_path):
    file = tmp_path / "deep" / "keys.txt"
    alice, bob = new_key(file, "alice"), new_key(file, "bob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert alice not in text
    assert bob.removeprefix("ij-") not in text
    assert [key.name for key in read_keys(file)] == ["alice", "bob"]
    assert len({key.salt for key in read_keys(file)}) == 2
    keys = Keys(file, "in the open")
    assert keys.owner(alice) == "alice"
    assert keys.owner(bob) == "bob"
    assert keys.owner("in the open") == "default"
    for wrong in ("", alice[:-1], alice + "x", "ij-", alice.upper()):
        assert keys.owner(wrong) is None
    remove_key(file, "alice")
    assert keys.owner(alice) is None, "a removed key is refused at once"
    assert keys.owner(bob) == "bob"
    for name in ("bob", "", "a b", "x" * 65):
        with pytest.raises(UserError):
            new_key(file, name)
    with pytest.raises(UserError, match="bob"):
        remove_key(file, "alice")
    file.write_text("alice 00 11\n")
    with pytest.raises(Corrupt, match=":1:"):
        Keys(file)
    with pytest.raises(Missing, match="keys new"):
        Keys(tmp_path / "none.txt")
    assert Keys().open


def test_every_route_but_health_asks_for_the_key(model, tmp_path):
    key = new_key(tmp_path / "keys.txt", "alice")
    options = {"keys_file": str(tmp_path / "keys.txt"), "engine": ENGINE, "name": "tiny"}
    with serving(model, **options) as url, httpx.Client() as http:
        root = url.removesuffix("/v1")
        paths = http.get(root + "/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
        assert len(paths["paths"]) >= 14
        for path, methods in paths["paths"].items():
            for method in methods:
                for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": key}):
                    answer = http.request(method, root + path, headers=headers)
                    assert answer.status_code == (200 if path == "/health" else 401), path
        for path in ("/openapi.json", "/nothing", "/v1/models/../../metrics"):
            assert http.get(root + path).status_code == 401
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        assert client.models.list().data[0].id == "tiny"
        remove_key(tmp_path / "keys.txt", "alice")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_keys_file_that_is_damaged_while_it_runs_lets_nobody_in(model, tmp_path):
    file = tmp_path / "keys.txt"
    key = new_key(file, "alice")
    with serving(model, keys_file=str(file), engine=ENGINE, name="tiny") as url:
        headers = {"authorization": f"Bearer {key}"}
        good = file.read_text()
        file.write_text("no key\n")
        answer = httpx.get(url + "/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys")
        file.write_text(good)
        assert httpx.get(url + "/models", headers=headers).status_code == 200


def test_a_full_disk_keeps_the_old_keys(tmp_path):
    file = tmp_path / "keys.txt"
    key = new_key(file, "alice")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"keys\.txt: cannot be written: "):
            new_key(file, "bob")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Keys(file).owner(key) == "alice"
    assert list(tmp_path.iterdir()) == [file]


def test_ports_and_keys_are_looked_at_before_the_model(tmp_path):
    def refusal(**options) -> str:
        with pytest.raises(UserError) as caught:
            serve_model(ServeRun("nothing.gguf", serve=ServeConfig(**{"port": 0, **options})))
        return str(caught.value)

    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert "program holds the port; give another port" in refusal(port=port)
        assert "program holds the port; give another grpc_port" in refusal(grpc_port=port)
    assert "both 8001" in refusal(port=8001, grpc_port=8001)
    assert "no such keys file" in refusal(keys_file=str(tmp_path / "keys.txt"))
    assert "host must be an address of this machine" in refusal(host="192.0.2.1")


def test_the_command_makes_keys(tmp_path, capsys, monkeypatch):
    from internjax.cli import run

    monkeypatch.chdir(tmp_path)
    assert run(["keys", "new", "alice"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys(tmp_path / "keys.txt").owner(key) == "alice"
    assert run(["keys"]) == 0
    assert capsys.readouterr().out == "alice\n"
    assert run(["keys", "remove", "alice"]) == 0
    assert run(["keys", "remove", "alice"]) == 2
    assert run(["keys", "new"]) == 2


# Limits -------------------------------------------------------------------------------------


def test_allowances_fill_steadily_and_unused_tokens_come_back():
    now = [0.0]
    limits = Limits(60, 600, clock=lambda: now[0])
    for _ in range(60):
        limits.take("a", "requests")
    limits.take("b", "requests")
    with pytest.raises(ApiError, match="60 requests") as caught:
        limits.take("a", "requests")
    assert (caught.value.status, caught.value.retry_seconds) == (429, 1)
    now[0] += 1.0
    limits.take("a", "requests")
    limits.take("a", "tokens", 600)
    with pytest.raises(ApiError) as caught:
        limits.take("a", "tokens", 100)
    assert caught.value.retry_seconds == 10
    limits.give_back("a", "tokens", 550)
    limits.take("a", "tokens", 550)
    with pytest.raises(ApiError, match="600 a minute") as caught:
        limits.take("b", "tokens", 601)
    assert caught.value.status == 400
    limits.give_back("b", "tokens", 10_000)
    limits.take("b", "tokens", 600)
    with pytest.raises(ApiError):
        limits.take("b", "tokens", 1)
    Limits().take("c", "tokens", 10**9)


def test_limits_over_http(model, tmp_path):
    file = tmp_path / "keys.txt"
    alice, bob = new_key(file, "alice"), new_key(file, "bob")
    options = {"keys_file": str(file), "requests_per_minute": 3, "tokens_per_minute": 200}
    options |= {"max_request_tokens": 150, "max_body_bytes": 20_000}
    with serving(model, name="tiny", engine=ENGINE, **options) as url, httpx.Client() as http:

        def ask(key, **changes):
            headers = {"authorization": f"Bearer {key}"}
            return http.post(url + CHAT, json={**BODY, **changes}, headers=headers)

        too_many = ask(alice, max_tokens=140)
        assert too_many.status_code == 400
        assert "150" in too_many.json()["error"]["message"]
        assert ask(alice).status_code == 200
        assert ask(alice).status_code == 200, "the unused reservation came back"
        refused = ask(alice)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["type"] == "rate_limit_error"
        # 128 reserved, all of them used; 72 and a little are left
        assert ask(bob, max_tokens=107, ignore_eos=True).status_code == 200
        assert ask(bob, max_tokens=107, ignore_eos=True).status_code == 429

        def endless():
            for _ in range(30):
                yield b" " * 1000

        headers = {"authorization": f"Bearer {bob}", "content-type": "application/json"}
        large = http.post(url + CHAT, content=endless(), headers=headers)
        assert large.status_code == 413, "also without a declared length"
        assert large.json()["error"]["code"] == "body_too_large"


def test_pages_of_known_origins_may_ask(url):
    ask = {"origin": "https://page.example", "access-control-request-method": "POST",
           "access-control-request-headers": "authorization"}  # fmt: skip
    allowed = httpx.options(url + CHAT, headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    answer = httpx.post(url + CHAT, json={}, headers={"origin": "https://page.example"})
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(url + CHAT, headers=ask | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


# Logs, ids, series --------------------------------------------------------------------------


def test_log_lines_are_json_without_text(url, caplog):
    secret = [{"role": "user", "content": "the password is swordfish"}]
    with caplog.at_level(logging.INFO, "internjax.requests"):
        given = {"x-request-id": "mine-1"}
        ok = httpx.post(url + CHAT, json={**BODY, "messages": secret}, headers=given)
        bad = httpx.post(url + CHAT, json={"model": "no"}, headers={"x-request-id": "bad id!"})
        assert until(lambda: len(caplog.records) == 2)
    first, second = (json.loads(record.message) for record in caplog.records)
    assert ok.headers["x-request-id"] == "mine-1" == first["request_id"]
    assert first["model"] == "tiny"
    assert first["completion_tokens"] == ok.json()["usage"]["completion_tokens"]
    assert first["prompt_tokens"] == ok.json()["usage"]["prompt_tokens"]
    assert first["finish_reason"] in ("stop", "length")
    assert first["seconds"] > 0
    assert bad.json()["error"]["request_id"] == second["request_id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", second["request_id"])
    assert (second["status"], second["error"]) == (400, "invalid_request_error")
    assert "swordfish" not in caplog.text


def test_text_is_logged_only_when_asked_for(model, caplog):
    with serving(model, name="tiny", engine=ENGINE, log_text=True) as url:
        with caplog.at_level(logging.INFO, "internjax.requests"):
            answer = httpx.post(url + CHAT, json=BODY).json()
            assert until(lambda: len(caplog.records) == 1)
        line = json.loads(caplog.records[0].message)
        assert "hi" in line["prompt"]
        assert line["answer"] == answer["choices"][0]["message"]["content"]


def test_series(url):
    before = series(url)
    httpx.post(url + CHAT, json={**BODY, "max_tokens": 9, "ignore_eos": True})
    httpx.post(url + CHAT, json={"model": "no"})
    after = series(url)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["time_to_first_token_seconds_count"] == 1
    assert grown["time_per_output_token_seconds_count"] == 1
    assert grown['request_seconds_count{finish_reason="length"}'] == 1
    assert grown["output_tokens_total"] == 9
    assert grown['http_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown['http_requests_total{path="/v1/chat/completions",status="400"}'] == 1
    whole, first = "request_seconds_sum", "time_to_first_token_seconds_sum"
    assert grown[whole + '{finish_reason="length"}'] > grown[first] > 0
    assert after["in_flight"] == after["waiting"] == after["running"] == 0
    assert after["kv_used_share"] == 0
    assert after["programs"] >= 3
    with httpx.stream("POST", url + CHAT, json={**LONG, "stream": True, "n": 32}) as stream:
        lines = stream.iter_lines()  # the name keeps it open
        next(lines)
        seen = []
        assert until(lambda: seen.append(series(url)) or seen[-1]["running"] == 8)
        assert 0 < seen[-1]["kv_used_share"] <= 1
        assert seen[-1]["waiting"] <= 24
    assert until(lambda: series(url)["cancelled_total"] > after["cancelled_total"])


# Leaving ------------------------------------------------------------------------------------


def test_a_cancelled_request_is_gone_within_two_steps(model):
    worker = EngineThread(Engine(model, ENGINE))
    news = []
    begun = threading.Event()

    def emit(delta):
        news.append((worker.engine.stats.steps, delta.finish_reason))
        if len(news) == 3:
            begun.set()

    params = SamplingParams(max_tokens=300, ignore_eos=True)
    request = worker.submit(Job([1, 2, 3], params), emit)
    assert begun.wait(60)
    worker.engine.cancel(request)
    at = worker.engine.stats.steps
    assert until(lambda: news[-1][1])
    assert news[-1][1] == "cancelled"
    assert news[-1][0] - at <= 2
    worker.close()


def storm(url, count, at_once, seed):
    """Drops streams at random moments, some before their first byte; returns how many."""
    random_ = random.Random(seed)

    async def one(http, turn):
        async with turn:
            wanted = random_.choice((0, 1, 1, 2, 5, 20))
            path = random_.choice((CHAT, "/completions", "/responses"))
            body = {"model": "tiny", "stream": True}
            body |= {
                CHAT: {"messages": HI, "max_tokens": 300, "ignore_eos": True},
                "/completions": {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "n": 2},
                "/responses": {"input": "hi", "max_output_tokens": 300},
            }[path]
            if not wanted:
                sent = asyncio.create_task(http.post(url + path, json=body))
                await asyncio.sleep(random_.random() * 0.05)
                sent.cancel()
                await asyncio.gather(sent, return_exceptions=True)
                return
            async with http.stream("POST", url + path, json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                seen = 0
                async for _ in answer.aiter_lines():
                    seen += 1
                    if seen >= wanted:
                        return

    async def all_of_them():
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            turn = asyncio.Semaphore(at_once)
            await asyncio.gather(*(one(http, turn) for _ in range(count)))

    asyncio.run(all_of_them())


def check_storm(model, url, count, at_once):
    asked = {"json": {**BODY, "temperature": 0}, "timeout": 60}  # the first compiles
    expected = httpx.post(url + CHAT, **asked).json()["choices"]
    storm(url, count, at_once, seed=count)
    assert until(lambda: series(url)["in_flight"] == 0, 30)
    after = series(url)
    assert after["requests_total"] == sum(
        after[f"{name}_total"] for name in ("finished", "cancelled", "failed")
    )
    assert after["failed_total"] == 0
    assert after["kv_used_share"] == 0
    assert after["cancelled_total"] > count // 3
    again = httpx.post(url + CHAT, **asked).json()["choices"]
    assert again == expected


def test_a_storm_of_aborts_leaves_nothing_behind(model, url):
    check_storm(model, url, 60, 16)


@pytest.mark.slow
def test_a_storm_of_500_aborts(model):
    with serving(model, name="tiny", engine=ENGINE) as url:
        check_storm(model, url, 500, 24)


def test_memory_is_bounded_and_private():
    memory = Memory(2)
    for name in "ab":
        memory.keep("alice", name, Talk())
    assert memory.find("alice", "a")
    assert memory.find("bob", "a") is None
    memory.keep("bob", "a", Talk())
    assert memory.find("alice", "b") is None, "the one unused for longest makes room"
    assert memory.find("alice", "a")
    assert len(memory) == 2


def test_sigterm_drains(model):
    """Running answers end whole, new requests get 503 and when to come again, then a clean end."""
    seen = {}

    def client(url):
        body = {**LONG, "stream": True, "n": 32}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            health = url.removesuffix("/v1") + "/health"
            seen["unwell"] = until(lambda: httpx.get(health).status_code == 503)
            seen["refused"] = httpx.post(url + CHAT, json=BODY)
            seen["rest"] = [line for line in lines if line]

    threads = []

    def ready(url):
        threads.append(threading.Thread(target=client, args=(url,)))
        threads[0].start()

    before = signal.getsignal(signal.SIGTERM)
    run_server(model, ServeConfig(port=0, name="tiny", engine=ENGINE), on_ready=ready)
    threads[0].join(30)
    assert signal.getsignal(signal.SIGTERM) is before
    assert seen["unwell"]
    assert seen["refused"].status_code == 503
    assert int(seen["refused"].headers["retry-after"]) >= 1
    assert seen["refused"].json()["error"]["code"] == "closing"
    assert seen["rest"][-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in seen["rest"][:-1]]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons.count("length") == 32
