"""The socket of a server and its address. Imports no JAX: a router's front process needs it too."""

import contextlib
import socket
from collections.abc import Iterator

from internjax.errors import UserError


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Gives a listening TCP socket while the block runs; port 0 lets the system choose.

    Raises:
      UserError: the port is taken or the address cannot be used.
    """
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}): another program may "
            "hold the port; give port=0 or another one."
        ) from error
    try:
        listener.listen(128)
        yield listener
    finally:
        listener.close()


def base_url(listener: socket.socket) -> str:
    """Returns "http://HOST:PORT/v1" of a TCP listener."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}/v1"
