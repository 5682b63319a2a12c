"""Python as a tool: what the model writes runs in `internjax.sandbox`, never in this process."""

from internjax.agents.tool import Example, Tool, ToolError, tool
from internjax.sandbox import BACKENDS, choose_backend, run_python

# About letters, not numbers, and one only: a small model copies the example that is most like its
# question. With a sum here SmolLM2 gave every sum to Python and none came out right.
EXAMPLES = (
    Example(
        "Write the word river backwards.",
        {"code": "print('river'[::-1])"},
        "revir",
        "Backwards it is revir.",
        "I write code.",
    ),
)


def make_python(
    *, backend: str | None = None, timeout_seconds: float = 5.0, memory_bytes: int = 256 << 20
) -> Tool:
    """Python over the sandbox that works here; the description tells the model which it is.

    Raises:
        Missing: no sandbox works here (see `choose_backend`).
    """
    chosen = choose_backend(backend)

    def run(code: str) -> str:
        """Runs Python code.

        Args:
            code: Python source; print the result
        """
        result = run_python(
            code, backend=chosen, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes
        )
        shown = "\n".join(filter(None, (result.stdout.rstrip("\n"), result.value)))
        if result.error is not None:
            raise ToolError("\n".join(filter(None, (shown, result.error))))
        return shown or "The code printed nothing: print the result."

    language = BACKENDS[chosen].language
    about = f"Runs Python code and returns what it prints. Sandbox {chosen}: {language}."
    return tool(run, name="python", description=about, examples=EXAMPLES)
