"""The only way code written by a model runs: confined, limited, and never without confinement.

Two backends: "bubblewrap" (the real Python in its own Linux namespaces, with a system call filter
and resource limits) and "monty" (pydantic-monty: a Python subset without files, network or native
code, interpreted in a separate worker). When neither works nothing runs: there is no unconfined
fallback, and every result names the backend that ran.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from internjax.errors import Missing, UserError
from internjax.sandbox import bubblewrap, monty
from internjax.sandbox.result import Limits, SandboxResult

__all__ = ["BACKENDS", "Backend", "Limits", "SandboxResult", "choose_backend", "run_python"]


@dataclass(frozen=True)
class Backend:
    """One way to confine code.

    Attributes:
        why_not: returns the reason why it cannot run here, or None; cached after the first call.
        run: (code, limits) -> SandboxResult; raises `Missing` when the confinement cannot be built.
        language: what a model that writes code for it must know.
    """

    why_not: Callable[[], str | None]
    run: Callable[[str, Limits], SandboxResult]
    language: str


BACKENDS = {
    "bubblewrap": Backend(
        bubblewrap.why_not,
        bubblewrap.run,
        "Python with its standard library and numpy; no network, no subprocesses, no files "
        "outside the working directory",
    ),
    "monty": Backend(
        monty.why_not,
        monty.run,
        "a subset of Python (functions, classes, math, re, json, datetime); no other imports, "
        "no files, no network",
    ),
}
"""In the order of preference."""


def choose_backend(backend: str | None = None) -> str:
    """Names the backend that will run code here.

    Args:
        backend: a key of `BACKENDS` that must work; None takes the first that does.

    Raises:
        UserError: an unknown name.
        Missing: the named backend, or with None every backend, cannot run here.
    """
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}.")
    problems = {}
    for name in [backend] if backend else BACKENDS:
        problem = BACKENDS[name].why_not()
        if problem is None:
            return name
        problems[name] = problem
    reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise Missing(f"No sandbox can run code here ({reasons}).")


def run_python(
    code: str,
    *,
    backend: str | None = None,
    timeout_seconds: float = 5.0,
    memory_bytes: int = 256 << 20,
    output_bytes: int = 16 << 10,
) -> SandboxResult:
    """Runs untrusted Python code; whatever it does comes back as a result, never as an exception.

    Args:
        code: Python source; the value of its last line, if that is an expression, is returned.
        backend: see `choose_backend`; an explicit one that cannot run raises.
        timeout_seconds: of wall clock, and of processor time.
        memory_bytes: of address space (bubblewrap) or of heap (monty).
        output_bytes: of printed text; code that prints more is stopped.

    Raises:
        UserError, Missing: the request cannot be carried out; no code has run.
    """
    limits = Limits(timeout_seconds, memory_bytes, output_bytes)
    name = choose_backend(backend)
    start = time.perf_counter()
    result = BACKENDS[name].run(code, limits)
    return replace(result, seconds=time.perf_counter() - start)
