"""Finds out that a thread hangs: it has begun a round that does not end.

JAX cannot be interrupted: a computation that waits for ever for a device, a kernel that loops, or a
lock that nobody gives back leave a thread that is alive and does nothing. Only time tells.
"""

import sys
import threading
import traceback
from collections.abc import Callable

PERIOD_SECONDS = 1.0


def watch(
    begun: Callable[[], float | None],
    seconds: float,
    over: threading.Event,
    alarm: Callable[[], None],
) -> None:
    """Calls `alarm` once when one round lasts for so long; returns after that, or at `over`.

    Time is counted by looking, not by the clock: while the whole process was stopped (a debugger,
    a paused container) nobody looked, and that does not count.

    Args:
      begun: when the round that runs has begun, other than that of any other round; None: idle.
    """
    period = min(PERIOD_SECONDS, seconds / 4)
    last, lasted = None, 0.0
    while not over.wait(period):
        now = begun()
        lasted = lasted + period if now is not None and now == last else 0.0
        last = now
        if lasted >= seconds:
            alarm()
            return


def where(thread: threading.Thread) -> str:
    """Returns the Python stack of a thread, innermost last; "" if it has ended."""
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame else ""
