"""Replicas behind a router: pure routing, and real processes that are killed while they answer."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2
import pytest
from hypothesis import given, settings, strategies as st

from internjax.errors import UserError
from internjax.models.native import save_native
from internjax.serve.replicas.config import RouterConfig
from internjax.serve.replicas.metrics import labelled, merge
from internjax.serve.replicas.route import Key, choose, key_of
from internjax.serve.replicas.shares import cores_of, environment, gpus_of, visible_gpus
from tests.test_serve_engine import make_model

# Routing ------------------------------------------------------------------------------------


@dataclass
class Fake:
    """What `choose` sees of a replica."""

    index: int
    ready: bool = True
    in_flight: int = 0
    requests: int = 0


def chat(*texts, **fields):
    """A conversation: system, user, assistant, user ..."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return key_of("/v1/chat/completions", json.dumps({"messages": messages, **fields}).encode())


def test_turns_of_a_conversation_share_a_key_and_others_do_not():
    first = chat("be kind", "hello", model="m")
    assert first == chat("be kind", "hello", "hi!", "how are you?", model="m", temperature=1)
    assert first != chat("be kind", "goodbye", model="m")
    assert first != chat("be rude", "hello", model="m")
    assert first != chat("be kind", "hello", model="m", tools=[{"type": "function"}])
    assert first != chat("be kind", "hello", model="adapter")


def test_prompts_that_begin_alike_share_a_key():
    def key(prompt):
        return key_of("/v1/completions", json.dumps({"prompt": prompt}).encode())

    examples = "Q: 1+1? A: 2. " * 100
    assert key(examples + "Q: 2+2?") == key(examples + "Q: 3+3?") != key("Q" + examples)
    assert key([*range(300), 1]) == key([*range(300), 2]) != key([1, *range(300)])
    assert key([examples]) is not None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": 3}', b"[" * 9999, b'{"a":' * 9999]
)
def test_what_makes_no_sense_has_no_key(body):
    assert key_of("/v1/completions", body) is None


def test_a_session_stays_where_its_history_is():
    key = key_of("/v1/chat/interactive", b'{"session_id": 7, "prompt": "x"}')
    assert key == key_of("/v1/chat/interactive", b'{"session_id": 7, "prompt": "another"}')
    replicas = [Fake(i) for i in range(3)]
    home = choose(replicas, key, spread=0)
    home.in_flight = 99
    assert choose(replicas, key, spread=0) is home
    home.ready = False
    assert choose(replicas, key, spread=0) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=9), st.integers(1, 6))
def test_a_replica_that_fails_moves_only_its_own_keys(texts, count):
    replicas = [Fake(i) for i in range(count + 1)]
    before = {t: choose(replicas, Key(t), spread=4).index for t in texts}
    replicas[-1].ready = False
    after = {t: choose(replicas, Key(t), spread=4).index for t in texts}
    assert all(after[t] == before[t] for t in texts if before[t] != count)
    assert count not in after.values()


def test_keys_spread_over_the_replicas():
    replicas = [Fake(i) for i in range(4)]
    found = Counter(choose(replicas, Key(str(i)), 4).index for i in range(1000))
    assert all(180 < found[i] < 320 for i in range(4))  # 250 +- 5 standard deviations


def test_a_busy_favourite_gives_way_and_no_key_goes_to_the_idlest():
    replicas = [Fake(0), Fake(1)]
    home = choose(replicas, Key("x"), spread=2)
    other = replicas[1 - home.index]
    home.in_flight = 2
    assert choose(replicas, Key("x"), spread=2) is home
    home.in_flight = 3
    assert choose(replicas, Key("x"), spread=2) is other
    assert choose(replicas, None, spread=2) is other
    other.in_flight, other.requests = 3, 9
    assert choose(replicas, None, spread=2) is home  # as busy, asked less often
    assert choose([Fake(0, ready=False)], None, spread=2) is None


# The machine's parts, metrics, config -------------------------------------------------------


def test_cores_and_gpus_are_divided():
    assert [cores_of(i, 3, range(8)) for i in range(3)] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert cores_of(2, 3, [4, 5]) == (4, 5)
    assert [gpus_of(i, 2, ["0", "1", "2", "3"]) for i in range(2)] == [("0", "1"), ("2", "3")]
    with pytest.raises(UserError, match="2 GPUs cannot be divided"):
        gpus_of(0, 4, ["0", "1"])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}) == ("GPU-a", "GPU-b")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    shared = environment(1, 2, {"CUDA_VISIBLE_DEVICES": "2,5", "A": "b"})
    assert shared == {"CUDA_VISIBLE_DEVICES": "5", "A": "b"}
    assert environment(0, 2, {"CUDA_VISIBLE_DEVICES": "-1"})["CUDA_VISIBLE_DEVICES"] == "-1"


def test_metrics_are_labelled_and_stand_together():
    text = """
# HELP t_seconds A time.
# TYPE t_seconds histogram
t_seconds_bucket{le="0.1"} 1
t_seconds_bucket{le="+Inf"} 2
t_seconds_count 2
plain 3
"""
    merged = merge({0: text, 1: text}).splitlines()
    assert merged == [
        "# HELP t_seconds A time.",
        "# TYPE t_seconds histogram",
        *(
            line
            for i in (0, 1)
            for line in (
                f't_seconds_bucket{{le="0.1",replica="{i}"}} 1',
                f't_seconds_bucket{{le="+Inf",replica="{i}"}} 2',
                f't_seconds_count{{replica="{i}"}} 2',
            )
        ),
        'plain{replica="0"} 3',
        'plain{replica="1"} 3',
    ]
    assert labelled('a{b="x} y"} 1', 3) == 'a{b="x} y",replica="3"} 1'


def test_config_says_what_is_wrong():
    with pytest.raises(UserError, match="spread=-1"):
        RouterConfig(spread=-1)
    with pytest.raises(UserError, match="health_seconds=0"):
        RouterConfig(health_seconds=0)


def test_the_front_imports_no_jax():
    code = (
        "import sys, internjax.experiments.serve, internjax.serve.replicas.run, uvicorn;"
        "print({m.partition('.')[0] for m in sys.modules} & {'jax', 'jaxlib', 'numpy', 'fastapi'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Real processes -----------------------------------------------------------------------------

KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model(context=512, num_layers=1)
    path = tmp_path_factory.mktemp("models") / "smollm2-tiny"
    save_native(path, model.cfg, model.params, model.tokenizer)
    return path


@contextlib.contextmanager
def front(folder, *options, replicas=2):
    """Runs `internjax serve` with replicas; gives (process, client)."""
    command = [sys.executable, "-m", "internjax.cli", "serve", str(folder), "serve.port=0"]
    command += [f"serve.replicas={replicas}", "serve.name=tiny", "serve.api_key=secret"]
    command += ["serve.engine.slots=4", "serve.engine.context=512", *options]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}  # replicas share it
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environ = os.environ | cache
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        url = re.search(r"(http://\S+)/v1", process.stdout.readline())[1]
        with httpx2.Client(base_url=url, headers=KEY, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def health(client):
    answer = client.get("/health", headers={"authorization": ""})
    return answer, answer.json()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def all_ready(client):
    return all(r["state"] == "ready" for r in health(client)[1]["replicas"])


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def complete(client, prompt, max_tokens=4, **fields):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    return client.post("/v1/completions", json=body | fields)


def metric(client, name):
    text = client.get("/metrics").text
    return [float(v) for v in re.findall(rf'^{name}{{replica="\d+"}} (\S+)$', text, re.M)]


class Stream(threading.Thread):
    """Reads one streamed completion: `events`, and the replica that makes them."""

    def __init__(self, client, prompt, max_tokens):
        super().__init__(daemon=True)
        self.client, self.prompt, self.max_tokens = client, prompt, max_tokens
        self.begun, self.events, self.replica = threading.Event(), [], None
        self.start()

    def run(self):
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": self.max_tokens}
        body |= {"stream": True, "ignore_eos": True, "temperature": 0}
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            self.id = answer.headers["x-request-id"]
            self.replica = int(answer.headers["x-replica"])
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()

    def whole(self):
        last = json.loads(self.events[-2])
        return self.events[-1] == "[DONE]" and last["choices"][0]["finish_reason"] == "length"

    def failed(self):
        error = json.loads(self.events[-2]).get("error")
        return error is not None and self.id in error["message"] and error["type"] == "server_error"


def check_start(process, client):
    answer, state = health(client)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert state["status"] == "starting"
    assert complete(client, "x").status_code == 503
    wait_for(lambda: all_ready(client))
    with open(f"/proc/{process.pid}/maps") as maps:
        assert "jaxlib" not in maps.read()


def check_guarding(client):
    no_key = {"authorization": "Bearer wrong"}
    for path in ("/v1/models", "/metrics", "/nothing"):
        assert client.get(path, headers=no_key).status_code == 401
    assert client.post("/v1/completions", headers=no_key, json={}).status_code == 401
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/%00%ff?a=%zz").status_code == 404
    assert client.post("/v1/completions", content=b"x" * (5 << 20)).status_code == 413
    bad = complete(client, "x", temperature=-1)
    assert bad.status_code == 400 and "temperature" in bad.json()["error"]["message"]


def check_affinity(client):
    prompts = [f"{i}: tell me" for i in range(6)]
    homes = {p: complete(client, p).headers["x-replica"] for p in prompts}
    assert set(homes.values()) == {"0", "1"}
    for prompt in prompts:
        answer = complete(client, prompt, headers=None)
        assert answer.status_code == 400  # an unknown field, passed on and refused
        assert complete(client, prompt).headers["x-replica"] == homes[prompt]
    assert sum(metric(client, "internjax_replica_requests_total")) >= 18


def check_memory(client):
    """What one replica remembers is found again: stored responses and sessions."""
    body = {"model": "tiny", "max_output_tokens": 3}
    made = [client.post("/v1/responses", json=body | {"input": f"{i}"}).json() for i in range(4)]
    for response in made:
        path = f"/v1/responses/{response['id']}"
        assert client.get(path).json()["id"] == response["id"]
        follow = {"input": "and?", "previous_response_id": response["id"]}
        assert client.post("/v1/responses", json=body | follow).status_code == 200
        assert client.delete(path).status_code == 200
        assert client.get(path).status_code == 404
    turn = {"interactive_mode": True, "request_output_len": 3, "prompt": "hello"}
    for session in (1, 2, 3):
        lengths = [
            client.post("/v1/chat/interactive", json=turn | {"session_id": session}).json()
            for _ in range(3)
        ]
        grows = [length["history_tokens"] for length in lengths]
        assert grows[0] < grows[1] < grows[2]


def check_leaving(client):
    before = sum(metric(client, "internjax_cancelled_total"))
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 480, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: sum(metric(client, "internjax_cancelled_total")) == before + 1, 10)
    assert metric(client, "internjax_in_flight") == [0, 0]


def check_killing(process, client):
    """kill -9 of one replica: its streams get an error, the other's end well, all goes on."""
    homes = {complete(client, f"{i}").headers["x-replica"]: f"{i}" for i in range(8)}
    victim = children(process)[0]
    streams = [Stream(client, homes[h], 480) for h in ("0", "1") for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(complete, client, homes[h], 480) for h in ("0", "1")]
        for stream in streams:
            assert stream.begun.wait(60)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not all_ready(client))
        assert complete(client, homes["0"]).status_code == 200  # the other one answers
        assert complete(client, homes["1"]).status_code == 200
        answers = [w.result() for w in waiting]
    for stream in streams:
        stream.join(60)
    lost = {s.replica for s in streams if s.failed()}
    assert len(lost) == 1
    assert all(s.failed() if s.replica in lost else s.whole() for s in streams)
    assert sorted(a.status_code for a in answers) == [200, 500]
    error = next(a for a in answers if a.status_code == 500)
    assert error.headers["x-request-id"] in error.json()["error"]["message"]
    wait_for(lambda: all_ready(client))
    assert sorted(metric(client, "internjax_replica_restarts_total")) == [0, 1]
    assert sum(metric(client, "internjax_replica_failed_total")) == 3
    assert complete(client, homes[str(lost.pop())]).headers["x-replica"] in "01"


def check_drain(process, client):
    pids = children(process)
    stream = Stream(client, "last words", 480)
    assert stream.begun.wait(60)
    process.send_signal(signal.SIGTERM)
    stream.join(60)
    assert stream.whole()
    assert process.wait(60) == 0
    assert not any(map(alive, pids))


def test_a_life_with_two_replicas(folder):
    with front(folder) as (process, client):
        check_start(process, client)
        check_guarding(client)
        check_affinity(client)
        check_memory(client)
        check_leaving(client)
        check_killing(process, client)
        check_drain(process, client)


@pytest.mark.slow
def test_a_frozen_replica_is_replaced(folder):
    with front(folder, "serve.router.health_seconds=3", replicas=1) as (process, client):
        wait_for(lambda: all_ready(client))
        (child,) = children(process)
        stream = Stream(client, "abc", 480)
        assert stream.begun.wait(60)
        os.kill(child, signal.SIGSTOP)
        wait_for(lambda: health(client)[1]["replicas"][0]["restarts"] == 1)
        stream.join(60)
        assert stream.failed()
        wait_for(lambda: all_ready(client))
        assert complete(client, "abc").status_code == 200


@pytest.mark.slow
def test_replicas_do_not_outlive_a_killed_front(folder):
    with front(folder) as (process, client):
        wait_for(lambda: all_ready(client))
        pids = children(process)
        process.kill()
        wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.slow
def test_what_a_replica_refuses_ends_the_command(folder):
    command = [sys.executable, "-m", "internjax.cli", "serve", str(folder), "serve.port=0"]
    command += ["serve.replicas=2", "serve.engine.kv_dtype=float99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "kv_dtype='float99'" in done.stderr and "could not start" in done.stderr
