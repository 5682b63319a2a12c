"""What a sandbox is asked for and what it gives back."""

from dataclasses import dataclass

from internjax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What one run may use; each limit holds whatever the code does."""

    timeout_seconds: float
    memory_bytes: int
    output_bytes: int

    def __post_init__(self):
        least = {"timeout_seconds": 0.1, "memory_bytes": 64 << 20, "output_bytes": 1}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least {low}.")


@dataclass(frozen=True)
class SandboxResult:
    """What became of a piece of code.

    Attributes:
        stdout: what it printed (standard error too), cut at the output limit.
        value: `repr` of its last line if that is an expression and not None; else None.
        error: None if it ended well, else the last line of the traceback or the limit it hit.
        backend: which confinement ran it.
        seconds: wall clock, start of the sandbox included.
        truncated: whether `stdout` or `value` was cut.
    """

    stdout: str
    value: str | None
    error: str | None
    backend: str
    seconds: float = 0.0
    truncated: bool = False


def cut(text: str, limit: int) -> tuple[str, bool]:
    """The first `limit` characters, and whether there were more."""
    return text[:limit], len(text) > limit
