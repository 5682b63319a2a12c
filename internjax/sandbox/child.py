"""What runs inside bubblewrap: sets the limits, runs the code, reports as one JSON line.

Its source is handed to the confined interpreter, which cannot see this package: standard library
only. File descriptor 1 is the code's output; the report leaves by what was standard error.
"""

import ast
import json
import os
import resource
import sys
import traceback


def main() -> None:
    report = os.fdopen(os.dup(2), "w")
    os.dup2(1, 2)
    request = json.loads(sys.stdin.readline())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    sys.path.append("/packages")
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    report.write("ready\n")
    report.flush()
    value, error = run(request["code"])
    try:
        sys.stdout.flush()
    except Exception as problem:
        error = error or f"{type(problem).__name__}: {problem}"
    limit = request["value_chars"]
    cut = value is not None and len(value) > limit
    value = value[:limit] if cut else value
    report.write(json.dumps({"value": value, "error": error and error[:2000], "cut": cut}) + "\n")
    report.flush()
    os._exit(0)  # no exit handler, destructor or thread of the code runs after its report


def run(code: str) -> tuple[str | None, str | None]:
    """Executes code; returns the repr of its last expression, and what went wrong."""
    space = {"__name__": "__main__"}
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), space)
        if last is None:
            return None, None
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space)
        return None if value is None else repr(value), None
    except BaseException as problem:  # SystemExit and KeyboardInterrupt are the code's own too
        return None, explain(problem)


def explain(problem: BaseException) -> str:
    """The traceback's last line with the line number in the code."""
    lines = [
        f.lineno for f in traceback.extract_tb(problem.__traceback__) if f.filename == "<code>"
    ]
    where = f" (line {lines[-1]})" if lines else ""
    try:
        return f"{type(problem).__name__}: {problem}{where}"
    except BaseException:  # its __str__ is the code's as well
        return f"{type(problem).__name__}{where}"


main()
