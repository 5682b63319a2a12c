"""An engine that hangs is given up: whoever waits is told, and the process makes room for another.

Hangs are real ones: the engine's round blocks for a prompt that says so, behind real servers.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx2 as httpx
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.models.native import save_native
from internjax.serve.engine import Engine
from internjax.serve.local import LocalLM
from internjax.serve.replicas.config import LOST_EXIT
from internjax.serve.server import ServeConfig, serving
from internjax.serve.watchdog import watch, where
from tests.grpc_client import free_port, text
from tests.test_serve_engine import CONFIG, make_model

HANG = "hang for ever"
SECONDS = 2.0
# The same in a process of its own; the slash keeps pytest's own engine out of it.
PATCH = f"""
import time
from internjax.serve.engine import Engine
step = Engine.step
def blocking(engine):
    if any(bytes(r.prompt) == {HANG.encode()!r} for r in engine.scheduler.all()):
        time.sleep(1e6)
    return step(engine)
Engine.step = blocking
"""


@pytest.fixture(scope="module")
def model():
    model = make_model()
    LocalLM(model, CONFIG).generate(["abc"], SamplingParams(max_tokens=3))  # compiles for all
    return model


@pytest.fixture
def hangs(monkeypatch):
    """Lets rounds with the prompt `HANG` block until the test has ended."""
    step, free = Engine.step, threading.Event()

    def blocking(engine):
        if any(bytes(r.prompt) == HANG.encode() for r in engine.scheduler.all()):
            free.wait()
        return step(engine)

    monkeypatch.setattr(Engine, "step", blocking)
    yield
    free.set()


def complete(url, prompt, **more):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "ignore_eos": True}
    return httpx.post(url + "/completions", json=body | more, timeout=60)


def health(url):
    return httpx.get(url.removesuffix("/v1") + "/health")


def metric(url, name):
    found = httpx.get(url.removesuffix("/v1") + "/metrics").text
    return float(re.search(rf"^internjax_{name} (\S+)$", found, re.M)[1])


class Looks(threading.Event):
    """Takes no time; is set when the watchdog has looked so often."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def wait(self, seconds):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(
    ("rounds", "alarms"),
    [
        ([7.0] * 5, 1),  # one look begins, four periods of a quarter pass
        ([7.0] * 4 + [8.0] * 4 + [9.0] * 4, 0),  # slow rounds that end
        ([None] * 50, 0),  # nothing to do
        ([7.0] * 4 + [None] + [7.5] * 4, 0),
        ([None] * 9 + [7.0] * 30, 1),
    ],
)
def test_only_a_round_that_does_not_end_raises_the_alarm(rounds, alarms):
    raised, given = [], iter(rounds)
    watch(lambda: next(given), 2.0, Looks(len(rounds)), lambda: raised.append(1))
    assert len(raised) == alarms


def test_a_hanging_engine_is_given_up(model, hangs, caplog):
    options = {"name": "tiny", "engine": CONFIG, "hang_seconds": SECONDS, "grpc_port": free_port()}
    address = f"127.0.0.1:{options['grpc_port']}"
    with (
        serving(model, **options) as url,
        triton.InferenceServerClient(address) as client,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor() as pool,
    ):
        lights = health_pb2_grpc.HealthStub(channel)
        light = lambda: lights.Check(health_pb2.HealthCheckRequest()).status  # noqa: E731
        assert complete(url, "abc").status_code == 200
        assert (health(url).json(), light()) == ({"status": "ok"}, 1)
        begun = time.monotonic()
        whole = pool.submit(complete, url, HANG)
        while not metric(url, "in_flight"):
            time.sleep(0.01)
        mates = [pool.submit(complete, url, "abc", stream=s, max_tokens=200) for s in (0, 1)]
        over_grpc = pool.submit(client.infer, "tiny", text("abc"), parameters={"max_tokens": 200})
        answer = whole.result()
        assert time.monotonic() - begun > SECONDS / 2
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert "has not ended for 2 s" in error["message"]
        assert error["request_id"] == answer.headers["x-request-id"]
        assert mates[0].result().status_code == 500
        events = [x[6:] for x in mates[1].result().text.split("\n\n") if x]
        assert "has not ended" in json.loads(events[-2])["error"]["message"]
        assert events[-1] == "[DONE]"
        with pytest.raises(InferenceServerException, match=r"not ended.*request") as caught:
            over_grpc.result()
        assert caught.value.status() == "StatusCode.INTERNAL"

        unwell = health(url)
        assert unwell.status_code == 503
        assert unwell.json()["status"] == "hung"
        assert "has not ended for 2 s" in unwell.json()["reason"]
        refused = complete(url, "abc")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "hung")
        assert int(refused.headers["retry-after"]) >= 1
        assert metric(url, "hangs_total") == 1
        assert metric(url, "round_seconds") >= SECONDS / 2
        assert metric(url, 'request_seconds_count{finish_reason="error"}') == 4
        with pytest.raises(InferenceServerException, match="has not ended") as caught:
            client.infer("tiny", text("abc"))
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        time.sleep(0.2)  # the gRPC server looks every 50 ms
        assert light() == 2
        assert not client.is_server_live()
        assert not client.is_model_ready("tiny")
        (entry,) = client.get_model_repository_index().models
        assert "has not ended" in entry.reason
    places = [r.message for r in caplog.records if "hangs here" in r.message]
    assert len(places) == 1
    assert "free.wait()" in places[0], "the log says where"


def test_idleness_and_long_answers_are_no_hang(model):
    with serving(model, name="tiny", engine=CONFIG, hang_seconds=1.0) as url:
        time.sleep(1.5)
        assert complete(url, "abc").status_code == 200
        until = time.monotonic() + 2
        with ThreadPoolExecutor() as pool:
            while time.monotonic() < until:  # never idle
                assert all(
                    a.status_code == 200 for a in pool.map(lambda _: complete(url, "a"), range(3))
                )
        assert health(url).status_code == 200
        assert metric(url, "hangs_total") == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_leaves_nobody_waiting(model, monkeypatch, caplog):
    def fails(engine, *_):
        raise RuntimeError("broken on purpose")

    with serving(model, name="tiny", engine=CONFIG, hang_seconds=0) as url:
        monkeypatch.setattr(Engine, "_prefill_some", fails)
        monkeypatch.setattr(Engine, "fail_all", fails)
        answer = complete(url, "abc")
        assert answer.status_code == 500
        assert "thread has ended" in answer.json()["error"]["message"]
        assert health(url).json()["status"] == "dead"
        assert complete(url, "abc").status_code == 503


def test_where_names_the_line():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert "stop.wait" not in where(thread)
    assert "threading.py" in where(thread)
    stop.set()
    thread.join()
    assert where(thread) == ""


def test_seconds_below_zero_are_refused():
    with pytest.raises(UserError, match="hang_seconds=-1"):
        ServeConfig(hang_seconds=-1)


# Real processes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "smollm2-tiny"
    save_native(path, model.cfg, model.params, model.tokenizer)
    return path


@contextlib.contextmanager
def running(code, folder, *options):
    """Runs `internjax serve` after some code, in a process; gives (process, base URL)."""
    words = ["serve", str(folder), "serve.port=0", "serve.name=tiny", "serve.engine.context=256"]
    words += ["serve.engine.slots=4", *options]
    code += f"\nimport sys; from internjax.cli import run; sys.exit(run({words!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, re.search(r"(http://\S+/v1)", process.stdout.readline())[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.slow
def test_the_process_ends_so_that_another_is_started(folder):
    with running(PATCH, folder, "serve.hang_seconds=2") as (process, url):
        answer = complete(url, HANG)
        assert answer.status_code == 500
        assert health(url).json()["status"] == "hung"
        assert process.wait(20) == LOST_EXIT
        log = process.stderr.read()
        assert "time.sleep(1e6)" in log or "blocking" in log
        assert f"exit code {LOST_EXIT}" in log


@pytest.mark.slow
def test_a_replica_that_hangs_is_replaced(folder, tmp_path):
    script = tmp_path / "replica.py"
    script.write_text(
        PATCH + "import sys; from internjax.experiments.serve_replica import main\nsys.exit(main())"
    )
    front = f"""
from internjax.experiments import serve
from internjax.serve.replicas import run
run_replicas = run.run_replicas
run.run_replicas = lambda cfg, command, told, **more: run_replicas(
    cfg, [command[0], {str(script)!r}], told, **more)
"""
    options = ("serve.replicas=2", "serve.hang_seconds=3")
    with running(front, folder, *options) as (_, url), ThreadPoolExecutor() as pool:
        state = lambda: {r["state"] for r in health(url).json()["replicas"]}  # noqa: E731
        until = time.monotonic() + 90
        while state() != {"ready"} and time.monotonic() < until:
            time.sleep(0.1)
        assert [complete(url, f"{i}").status_code for i in range(6)] == [200] * 6
        whole, stream = pool.submit(complete, url, HANG), pool.submit(complete, url, HANG, stream=1)
        assert whole.result().status_code == 500
        event = json.loads(stream.result().text.split("\n\n")[0].removeprefix("data: "))
        assert event["error"]["type"] == "server_error"
        time.sleep(1.5)  # until the next health check: then nobody is sent there
        assert [complete(url, f"{i}").status_code for i in range(6)] == [200] * 6
        found = httpx.get(url.removesuffix("/v1") + "/metrics").text
        losses = re.findall(r'^internjax_replica_losses_total{replica="\d"} (\d)', found, re.M)
        assert sorted(losses) == ["0", "1"]
        while state() != {"ready"} and time.monotonic() < until:
            time.sleep(0.1)
        assert state() == {"ready"}
