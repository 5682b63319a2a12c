"""Ctrl-C that is neither lost nor taken for a bug.

Where no exception can leave (a garbage collector's callback, a finalizer), Python reports a
`KeyboardInterrupt` and goes on; an extension that is being imported turns it into an `ImportError`
or aborts the process. In both cases the interrupt comes again a moment later.
"""

import signal
import sys
import threading
from types import FrameType

AGAIN_SECONDS = 0.05
IMPORTING = "<frozen importlib._bootstrap>"


def keep_interrupts() -> None:
    """To be called once, in `main`; changes nothing where interrupts are ignored (nohup)."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _again()
        else:
            report(unraisable)

    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, after the import that is under way."""
    at = frame
    while at is not None:
        if at.f_code.co_filename == IMPORTING:
            _again()
            return
        at = at.f_back
    raise KeyboardInterrupt


def _again() -> None:
    main = threading.main_thread().ident
    threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT)).start()
