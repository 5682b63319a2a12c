"""The socket of a server and its address. Imports no JAX: a router's front process needs it too."""

import contextlib
import errno
import socket
from collections.abc import Iterator

from internjax.errors import UserError


@contextlib.contextmanager
def listening(host: str, port: int, key: str = "port") -> Iterator[socket.socket]:
    """Gives a listening TCP socket while the block runs; port 0 lets the system choose.

    Args:
      key: what the port is called in the configuration, for messages.

    Raises:
      UserError: the port is taken or the address cannot be used.
    """
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(_refusal(host, port, key, error)) from error
    try:
        listener.listen(128)
        yield listener
    finally:
        listener.close()


def check_free(host: str, ports: dict[str, int]) -> None:
    """Refuses, before a model is loaded, what could not be listened on afterwards.

    Args:
      ports: by the name of their key.
    """
    taken: dict[int, str] = {}
    for key, port in ports.items():
        if port and port in taken:
            raise UserError(f"{taken[port]} and {key} are both {port}: give each one of its own.")
        taken[port] = key
        with listening(host, port, key):
            pass


def _refusal(host: str, port: int, key: str, error: OSError) -> str:
    """Why nobody can listen there, and what to do."""
    what = f"cannot listen on {host}:{port} ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        return f"{what}: another program holds the port; give another {key}, 0 takes a free one."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{what}: ports below 1024 are for administrators; give {key} a higher one."
    return (
        f"{what}: host must be an address of this machine: 127.0.0.1 for this machine alone, "
        "0.0.0.0 for the network, too."
    )


def base_url(listener: socket.socket) -> str:
    """Returns "http://HOST:PORT/v1" of a TCP listener."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}/v1"
