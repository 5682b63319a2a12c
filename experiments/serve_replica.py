"""The process of one replica: reads what it must do from its standard input, and serves.

Started by the front process of `internjax serve serve.replicas=N`, never by hand.
"""

import json
import os
import signal
import socket
import sys
import threading

from internjax.errors import UserError
from internjax.experiments.serve import log_to_terminal


def main() -> int:
    """Serves until SIGTERM, or until the input ends because the front process has died.

    Returns the exit code: 2 for what the user must mend, as the command line does.
    """
    told = json.loads(sys.stdin.buffer.readline())
    log_to_terminal(f"replica {told['replica']} ")
    if told["cores"]:  # before JAX counts them
        os.sched_setaffinity(0, told["cores"])

    from internjax.experiments.config import build
    from internjax.experiments.serve_model import ServeRun, serve_model

    threading.Thread(target=_follow_the_front, daemon=True).start()
    try:
        cfg = build(ServeRun, told["config"])
        with socket.socket(fileno=told["fd"]) as listener:
            serve_model(cfg, given=listener)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _follow_the_front() -> None:
    """Drains this process when nobody is left to ask it."""
    while os.read(sys.stdin.fileno(), 4096):  # not through the buffer: it is locked at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
