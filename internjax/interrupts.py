"""Ctrl-C that is not lost.

Where no exception can leave (a garbage collector's callback, a finalizer), Python reports a
`KeyboardInterrupt` and goes on; an extension that is being imported turns it into an `ImportError`.
"""

import signal
import sys
import threading

AGAIN_SECONDS = 0.05  # by then the callback is over


def keep_interrupts() -> None:
    """Raises an interrupt again that Python could only report; to be called once, in `main`."""
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            report(unraisable)

    sys.unraisablehook = hook


def comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether an error was raised because of a Ctrl-C: one of those behind it is an interrupt."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
