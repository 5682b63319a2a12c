"""What `ModelStatistics` tells: counts and times of the prompts that came over gRPC."""

import threading
import time
from dataclasses import dataclass, field

from tritonclient.grpc import service_pb2 as pb

from internjax.serve.scheduler import Request


@dataclass
class Statistics:
    """Sums since the start; times in nanoseconds.

    Fields:
      first: from arrival to the first token, waiting and prefill together; rest: from there on.
      last_ms: when the newest prompt arrived, in milliseconds since 1970.
    """

    succeeded: int = 0
    succeeded_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    started: int = 0
    first_ns: int = 0
    rest_ns: int = 0
    last_ms: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, request: Request) -> None:
        """Books a request that has ended, or that nobody waits for any more."""
        end = request.finished_seconds or time.monotonic()
        whole = _ns(end - request.arrived_seconds)
        with self._lock:
            self.last_ms = max(self.last_ms, int(1e3 * _wall(request.arrived_seconds)))
            if request.finish_reason in ("stop", "length"):
                self.succeeded, self.succeeded_ns = self.succeeded + 1, self.succeeded_ns + whole
            else:
                self.failed, self.failed_ns = self.failed + 1, self.failed_ns + whole
            if request.first_token_seconds is not None:
                self.started += 1
                self.first_ns += _ns(request.first_token_seconds - request.arrived_seconds)
                self.rest_ns += _ns(end - request.first_token_seconds)

    def message(self, name: str, version: str, steps: int) -> pb.ModelStatistics:
        """Writes the protocol's message; `steps`: decoding steps of the engine, of all faces."""
        duration = pb.StatisticDuration
        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=self.last_ms,
            inference_count=self.succeeded,
            execution_count=steps,
            inference_stats=pb.InferStatistics(
                success=duration(count=self.succeeded, ns=self.succeeded_ns),
                fail=duration(count=self.failed, ns=self.failed_ns),
                compute_input=duration(count=self.started, ns=self.first_ns),
                compute_infer=duration(count=self.started, ns=self.rest_ns),
            ),
        )


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


def _wall(monotonic: float) -> float:
    return time.time() - (time.monotonic() - monotonic)
