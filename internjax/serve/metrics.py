"""Prometheus series of one engine and of the interfaces in front of it.

The engine's own counters are read when somebody looks; only durations are gathered as requests
end. Each server has a registry of its own, so that two of them in one process stay apart.
"""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from internjax.serve.thread import EngineThread, Timing

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
GAUGES = ("max_in_flight", "programs", "blocks", "held_blocks", "cached_blocks")
"""Fields of `EngineStats` that are states; all others only grow."""


class Metrics:
    """What `/metrics` shows."""

    def __init__(self, worker: EngineThread):
        self.registry = registry = CollectorRegistry()
        self._first = Histogram(
            "internjax_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._each = Histogram(
            "internjax_time_per_output_token_seconds",
            "Mean time between a request's tokens after the first.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "internjax_request_seconds",
            "From a request's arrival to its last token.",
            ["finish_reason"],
            buckets=SECONDS,
            registry=registry,
        )
        self._calls = Counter(
            "internjax_http_requests", "Answered by path and status.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        registry.register(_EngineState(worker))
        worker.observers.append(self.observe)

    def observe(self, timing: Timing) -> None:
        """Books one request that has ended; called in the engine's thread."""
        self._whole.labels(timing.finish_reason).observe(timing.finished - timing.arrived)
        if timing.first is None:
            return
        self._first.observe(timing.first - timing.arrived)
        if timing.tokens > 1:
            self._each.observe((timing.finished - timing.first) / (timing.tokens - 1))

    def count_call(self, path: str, status: int) -> None:
        """Books one answer over HTTP; status 0 is a client that left before there was any."""
        self._calls.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All series in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineState:
    """Reads the engine's counters and the state of its line whenever it is asked."""

    def __init__(self, worker: EngineThread):
        self.worker = worker

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self.worker.engine
        counters = asdict(engine.stats)
        for name, value in counters.items():
            kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            words = f"{name.replace('_', ' ').capitalize()}, as the engine counts."
            yield kind(f"internjax_{name}", words, value)
        with engine.work:
            running, waiting = len(engine.scheduler.running()), len(engine.scheduler.waiting)
        share = counters["held_blocks"] / counters["blocks"]
        states = {
            "in_flight": ("Requests that wait or run.", running + waiting),
            "running": ("Requests that hold a slot.", running),
            "waiting": ("Requests in the queue.", waiting),
            "round_seconds": ("How long the round that runs lasts.", self.worker.round_seconds),
            "kv_used_share": ("Share of the cache that running requests hold.", share),
        }
        for name, (words, value) in states.items():
            yield GaugeMetricFamily(f"internjax_{name}", words, value)
