"""Runs code in pydantic-monty: a Python subset without files, network, processes or native code.

The interpreter is a separate worker process that asks its host for everything outside the language;
this host grants nothing: no mount, no function, no module. A crash or a hang costs the worker only.
"""

import functools

from internjax.sandbox.result import Limits, SandboxResult, cut

NAME = "monty"


@functools.cache
def why_not() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    try:
        import pydantic_monty
    except ModuleNotFoundError:
        return "not installed (pip install 'internjax[agents]')"
    try:
        with pydantic_monty.Monty() as pool, pool.checkout() as session:
            answer = session.feed_run("40 + 2")
    except (OSError, RuntimeError, pydantic_monty.MontyError) as error:
        return f"does not start: {error}"
    return None if answer == 42 else f"gives {answer!r} for 40 + 2"


def run(code: str, limits: Limits) -> SandboxResult:
    """Runs code in a fresh worker."""
    from pydantic_monty import CollectString, Monty, MontyError

    printed = CollectString(max_bytes=limits.output_bytes)
    inner = {
        "max_feed_duration_secs": limits.timeout_seconds,
        "max_memory": limits.memory_bytes,
        "max_recursion_depth": 500,
    }
    # A sleep does not count as running: without this policy a loop of sleeps would never end.
    policy = {"sleep": "zero"}
    value, error = None, None
    # The outer deadline kills a worker that does not keep its own.
    with (
        Monty(request_timeout=limits.timeout_seconds + 1.0) as pool,
        pool.checkout(limits=inner, os_policy=policy) as session,
    ):
        try:
            value = session.feed_run(code, print_callback=printed)
        except MontyError as problem:
            error = str(problem)
    stdout, flooded = cut(printed.output, limits.output_bytes)
    if error and f"> {limits.output_bytes} bytes" in error:
        flooded, error = True, f"OutputLimit: stopped after {limits.output_bytes} bytes of output"
    shown, long = (None, False) if value is None else cut(_show(value), limits.output_bytes)
    return SandboxResult(stdout, shown, error, NAME, truncated=flooded or long)


def _show(value: object) -> str:
    try:
        return repr(value)
    except RecursionError:
        return f"<{type(value).__name__}: too deeply nested to show>"
