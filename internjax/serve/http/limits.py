"""How much each caller may ask a minute: requests and tokens, as buckets that fill steadily."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from internjax.serve.http.errors import ApiError

MAX_CALLERS = 10_000
"""Callers remembered; of more, those that asked longest ago begin anew."""


@dataclass
class Bucket:
    """Holds up to `size` units and gains `size` of them in a minute; it starts full."""

    size: float
    level: float
    filled: float  # seconds on the clock when `level` was right

    def refill(self, now: float) -> None:
        """Brings the level up to date."""
        self.level = min(self.size, self.level + (now - self.filled) * self.size / 60)
        self.filled = now

    def seconds_until(self, amount: float) -> float:
        """How long until it holds that much; 0 when it does."""
        return max(0.0, (amount - self.level) * 60 / self.size)


class Limits:
    """The allowances of all callers. Law: a caller's level never exceeds the size.

    A request reserves the tokens it may produce, and what it did not produce is given back when it
    has ended; so no number of simultaneous requests passes the limit.
    """

    def __init__(
        self,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts with full buckets; 0 sets no limit."""
        self._sizes = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    def take(self, caller: str, unit: str, amount: int = 1) -> None:
        """Takes units ("requests" or "tokens") of a caller's allowance.

        Raises:
          ApiError: 429 when there are too few, 400 when there never will be enough.
        """
        size = self._sizes[unit]
        if not size:
            return
        if amount > size:
            raise ApiError(
                400,
                f"the request may take {amount} {unit}, but this key has {size} a minute: ask for "
                "fewer tokens.",
                code="tokens_limit",
            )
        bucket = self._bucket(caller, unit)
        wait = bucket.seconds_until(amount)
        if wait:
            raise ApiError(
                429,
                f"this key has used up its {size} {unit} a minute; try again in "
                f"{math.ceil(wait)} s.",
                code="rate_limit_exceeded",
                retry_seconds=math.ceil(wait),
            )
        bucket.level -= amount

    def give_back(self, caller: str, unit: str, amount: int) -> None:
        """Returns units that were taken and not used."""
        if self._sizes[unit] and amount > 0:
            bucket = self._bucket(caller, unit)
            bucket.level = min(bucket.size, bucket.level + amount)

    def _bucket(self, caller: str, unit: str) -> Bucket:
        now, size = self._clock(), self._sizes[unit]
        bucket = self._buckets.setdefault((caller, unit), Bucket(size, size, now))
        self._buckets.move_to_end((caller, unit))
        while len(self._buckets) > 2 * MAX_CALLERS:
            self._buckets.popitem(last=False)
        bucket.refill(now)
        return bucket
