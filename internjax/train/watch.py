"""Watching a run: loss spikes, updates that are skipped, and steps that never end.

Each has actions of its own: "log" (a line on stderr and in alerts.jsonl), "webhook" (the same as
a JSON POST) and "stop".
"""

import http.client
import json
import math
import os
import statistics
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internjax.errors import UserError

ACTIONS = ("log", "webhook", "stop")
EXIT_AGAIN = 75  # EX_TEMPFAIL: the same command may be started again and goes on


@dataclass(frozen=True)
class WatchConfig:
    """When to raise the alarm and what then happens: any of log, webhook, stop.

    Fields:
      spike_ratio: a loss this many times the median of the last `spike_window` losses (1: the
        loss before) is a spike; 0 switches it off.
      max_bad_steps: updates in a row with a NaN or infinite loss or gradient that are skipped
        before the run stops, whatever `on_bad` says.
      stall_seconds: longest silence between two steps once the first is done; 0 switches it off.
      webhook: address that alerts are POSTed to.
    """

    spike_ratio: float = 1.5
    spike_window: int = 10
    on_spike: tuple[str, ...] = ("log",)
    on_bad: tuple[str, ...] = ("log",)
    stall_seconds: float = 300.0
    on_stall: tuple[str, ...] = ("log",)
    webhook: str = ""

    def __post_init__(self):
        for name in ("on_spike", "on_bad", "on_stall"):
            for action in getattr(self, name):
                if action not in ACTIONS:
                    raise UserError(f"{name}: no action {action!r}; legal are {list(ACTIONS)}.")
                if action == "webhook" and not self.webhook:
                    raise UserError(f"{name} has webhook, but no address webhook=http://...")
        if self.spike_window < 1 or self.spike_ratio < 0 or self.stall_seconds < 0:
            raise UserError(
                f"watch: spike_window={self.spike_window} must be at least 1, spike_ratio="
                f"{self.spike_ratio} and stall_seconds={self.stall_seconds} at least 0."
            )


@dataclass(frozen=True)
class Alert:
    """Something a person should know: what, at which step, in words, and the numbers."""

    kind: str
    step: int
    text: str
    values: dict[str, Any]


class Watch:
    """Looks at every record of the step log. A context manager: a thread looks for stalls.

    Args:
      folder: of alerts.jsonl; name: of the run, told in alerts.
      max_bad_steps: skipped updates in a row that are let pass.
      primary: whether this process logs and posts; stopping is every process's own.
    """

    def __init__(
        self, cfg: WatchConfig, folder: Path, *, name: str, max_bad_steps: int, primary: bool = True
    ):
        self._cfg, self._folder, self._name, self._primary = cfg, folder, name, primary
        self._max_bad_steps = max_bad_steps
        self._losses: deque[float] = deque(maxlen=cfg.spike_window)
        self._bad: list[Mapping[str, Any]] = []
        self._beat: tuple[int, float] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_for_stalls, daemon=True)

    def __enter__(self) -> "Watch":
        if self._cfg.stall_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, record: Mapping[str, Any]) -> None:
        """Takes the record of a step; raises UserError where the run shall stop."""
        self._beat = (record["step"], time.monotonic())
        loss = record.get("loss")
        if not record.get("finite", True):
            self._check_bad(record)
            return
        self._bad = []
        if loss is None or not math.isfinite(loss):
            return
        if self._cfg.spike_ratio and self._losses:
            usual = statistics.median(self._losses)
            if loss > self._cfg.spike_ratio * usual:
                text = f"loss {loss:.4g} after a usual {usual:.4g}"
                self._act(
                    self._cfg.on_spike,
                    Alert("loss_spike", record["step"], text, {"loss": loss, "usual": usual}),
                )
        self._losses.append(loss)

    def _check_bad(self, record: Mapping[str, Any]) -> None:
        """Tells of a skipped update; stops a run whose last updates were all skipped."""
        loss = record.get("loss")
        if record.get("loss_scale", 0) > 1 and loss is not None and math.isfinite(loss):
            return  # float16's scale was too high and falls: that is how it is found
        self._bad.append(record)
        values = {key: record.get(key) for key in ("loss", "grad_norm", "loss_scale")}
        text = f"loss {record.get('loss')}, gradient norm {record.get('grad_norm')}: update skipped"
        self._act(self._cfg.on_bad, Alert("bad_update", record["step"], text, values))
        first, last = self._bad[0], self._bad[-1]
        if len(self._bad) > self._max_bad_steps:
            raise UserError(
                f"loss or gradient is NaN or infinite for {len(self._bad)} updates in a row, steps"
                f" {first['step']} to {last['step']} (loss {last.get('loss')}, gradient norm"
                f" {last.get('grad_norm')}): lower optim.lr, or look at the batches of these steps."
            )

    def _look_for_stalls(self) -> None:
        limit, told = self._cfg.stall_seconds, None
        while not self._done.wait(min(limit / 4, 10)):
            beat = self._beat
            if beat is None or beat == told or time.monotonic() - beat[1] <= limit:
                continue
            told = beat
            text = f"no step for {limit:.0f} seconds after step {beat[0]}"
            actions = self._cfg.on_stall
            self._act(
                tuple(a for a in actions if a != "stop"),
                Alert("stall", beat[0], text, {"seconds": limit}),
            )
            if "stop" in actions:  # the main thread hangs in a step: nobody else can end the run
                _say(f"{self._name}: {text}: stopped; the same command goes on.")
                os._exit(EXIT_AGAIN)

    def _act(self, actions: tuple[str, ...], alert: Alert) -> None:
        if self._primary and "log" in actions:
            _say(f"{self._name}: step {alert.step}: {alert.text}")
            with (self._folder / "alerts.jsonl").open("a", encoding="utf-8") as file:
                file.write(_json(asdict(alert)) + "\n")
        if self._primary and "webhook" in actions:
            body = _json({"run": self._name, **asdict(alert)})
            threading.Thread(target=_post, args=(self._cfg.webhook, body), daemon=True).start()
        if "stop" in actions:
            raise UserError(
                f"stopped at step {alert.step}: {alert.text}; go on from a checkpoint before it,"
                " past its batches."
            )


def _post(address: str, body: str) -> None:
    """POSTs JSON; an address that does not answer is told and disturbs nothing else."""
    url = urllib.parse.urlsplit(address)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    path = url.path + (f"?{url.query}" if url.query else "")
    try:
        connection = kind(url.netloc, timeout=10)
        connection.request("POST", path or "/", body, {"Content-Type": "application/json"})
        status = connection.getresponse().status
        connection.close()
    except OSError as error:
        _say(f"webhook {address}: {error}")
        return
    if status >= 300:
        _say(f"webhook {address}: answered {status}")


def _json(value: Mapping[str, Any]) -> str:
    """Writes JSON, in which what is not finite is null."""
    if isinstance(value.get("values"), dict):
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in value["values"].items()
        }
        value = {**value, "values": finite}
    return json.dumps(value, ensure_ascii=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
