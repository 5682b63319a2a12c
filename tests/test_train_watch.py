"""The watch: what it takes for a spike, a bad update and a stall, and what it then does."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from internjax.errors import UserError
from internjax.train.facts import document_facts
from internjax.train.watch import EXIT_AGAIN, Watch, WatchConfig

ROOT = Path(__file__).resolve().parent.parent


def watching(folder: Path, losses: list[float], **changes) -> list[dict]:
    """Shows a watch finite losses; returns the alerts it wrote."""
    with Watch(WatchConfig(**changes), folder, name="run", max_bad_steps=3) as watch:
        for step, loss in enumerate(losses, start=1):
            watch.check({"step": step, "loss": loss, "finite": bool(np.isfinite(loss))})
    path = folder / "alerts.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("losses", "window", "spikes"),
    [
        ([4.0, 3.0, 2.0, 1.0], 10, []),
        ([2.0, 2.9, 2.0], 1, []),
        ([2.0, 3.1, 2.0, 3.1], 1, [2, 4]),  # against the loss before
        ([2.0, 2.0, 2.0, 3.1, 3.1, 3.1], 5, [4, 5, 6]),  # against the median: a new level is told
        ([2.0, 3.1, 3.1, 3.1, 3.1], 1, [2]),
    ],
)
def test_a_spike_is_a_loss_far_above_the_usual(tmp_path: Path, capsys, losses, window, spikes):
    alerts = watching(tmp_path, losses, spike_window=window)
    assert [a["step"] for a in alerts] == spikes
    assert all(a["kind"] == "loss_spike" and a["values"]["loss"] == 3.1 for a in alerts)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"run: step {s}: loss 3.1 after a usual 2" for s in spikes]


def test_a_switched_off_watch_says_nothing(tmp_path: Path):
    assert watching(tmp_path, [1.0, 9.0], spike_ratio=0.0, stall_seconds=0.0) == []
    assert watching(tmp_path, [1.0, 9.0], on_spike=()) == []


def test_stop_on_a_spike_names_the_step(tmp_path: Path):
    with pytest.raises(UserError, match=r"stopped at step 2: loss 9 after a usual 1; go on from"):
        watching(tmp_path, [1.0, 9.0, 1.0], on_spike=("stop",))


def test_bad_updates_are_told_and_stop_the_run_when_they_do_not_end(tmp_path: Path):
    nan = float("nan")
    alerts = watching(tmp_path, [1.0, nan, nan, nan, 1.0, nan])
    assert [(a["kind"], a["step"]) for a in alerts] == [("bad_update", s) for s in (2, 3, 4, 6)]
    assert alerts[0]["values"]["loss"] is None  # JSON has no NaN
    with pytest.raises(UserError, match=r"4 updates in a row, steps 2 to 5 .*lower optim.lr"):
        watching(tmp_path, [1.0, nan, nan, nan, nan])
    with pytest.raises(UserError, match="stopped at step 2"):
        watching(tmp_path, [1.0, nan], on_bad=("stop",))


def test_an_overflow_that_only_lowers_the_loss_scale_is_no_bad_update(tmp_path: Path):
    with Watch(WatchConfig(), tmp_path, name="run", max_bad_steps=1) as watch:
        for step, scale in enumerate([65536.0, 32768.0, 16384.0, 8192.0]):
            watch.check({"step": step, "loss": 2.0, "finite": False, "loss_scale": scale})
        assert not (tmp_path / "alerts.jsonl").exists()
        with pytest.raises(UserError, match="2 updates in a row"):
            for step in (5, 6):  # the scale can fall no further
                watch.check({"step": step, "loss": 2.0, "finite": False, "loss_scale": 1.0})


@pytest.fixture
def posted():
    """A web server on the loopback; yields its address and what is POSTed to it."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook?key=1", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_webhook_gets_the_alert_as_json(tmp_path: Path, posted):
    address, bodies = posted
    watching(tmp_path, [1.0, 2.0], on_spike=("webhook",), webhook=address)
    wait_for(lambda: bodies)
    (path, kind, body) = bodies[0]
    assert path == "/hook?key=1" and kind == "application/json"
    assert body["run"] == "run" and body["kind"] == "loss_spike" and body["step"] == 2
    assert body["values"] == {"loss": 2.0, "usual": 1.0}


def test_a_webhook_that_does_not_answer_disturbs_nothing(tmp_path: Path, capsys):
    address = "http://127.0.0.1:9/"  # the discard port: nobody listens
    watching(tmp_path, [1.0, 2.0, 1.0], on_spike=("webhook",), webhook=address)
    said = []

    def told() -> bool:
        said.append(capsys.readouterr().err)
        return f"webhook {address}: " in "".join(said)

    wait_for(told)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"on_spike": ("mail",)}, r"on_spike: no action 'mail'; legal are \['log', 'webhook', "),
        ({"on_stall": ("webhook",)}, "on_stall has webhook, but no address"),
        ({"spike_window": 0}, "spike_window=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        WatchConfig(**changes)


def test_a_stall_is_told_once_and_only_after_the_first_step(tmp_path: Path, capsys):
    cfg = WatchConfig(stall_seconds=0.1)
    with Watch(cfg, tmp_path, name="run", max_bad_steps=3) as watch:
        time.sleep(0.3)  # the first step compiles
        assert not (tmp_path / "alerts.jsonl").exists()
        watch.check({"step": 7, "loss": 1.0})
        wait_for((tmp_path / "alerts.jsonl").exists)
        time.sleep(0.3)
    lines = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert [(json.loads(x)["kind"], json.loads(x)["step"]) for x in lines] == [("stall", 7)]


HANGS = """
import sys, time
from pathlib import Path
from internjax.train.watch import Watch, WatchConfig

cfg = WatchConfig(stall_seconds=0.2, on_stall=("log", "stop"))
with Watch(cfg, Path(sys.argv[1]), name="run", max_bad_steps=3) as watch:
    watch.check({"step": 7, "loss": 1.0})
    time.sleep(60)
"""


def test_a_stalled_run_can_be_ended_from_outside_its_main_thread(tmp_path: Path):
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == EXIT_AGAIN
    assert "run: no step for 0 seconds after step 7: stopped; the same command" in done.stderr


def test_facts_of_packed_documents():
    rows = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2]])
    facts = document_facts(rows)
    assert facts["num_documents"] == 4 and facts["padding"] == 3 / 16
    assert (facts["longest_document"], facts["shortest_document"]) == (7, 1)
    empty = document_facts(np.zeros((2, 3), int))
    assert empty["num_documents"] == empty["longest_document"] == empty["shortest_document"] == 0
