"""Shows a run: line by line in the terminal, and as a block of the report."""

from rich.console import Console
from rich.markup import escape

from internjax.agents.loop import Step, Trace
from internjax.report import Trace as TraceBlock, TraceStep

_STYLES = {"thought": "italic", "call": "cyan", "result": "green", "error": "red"}


def print_step(console: Console, step: Step) -> None:
    """Prints a step: its thought, each call and what came back."""
    for row in step.rows():
        style = _STYLES[row.kind]
        label = f"{row.kind} {row.name}".strip()
        console.print(f"[bold]{label:>16}[/]  [{style}]{escape(row.text)}[/]", highlight=False)


def print_ending(console: Console, trace: Trace) -> None:
    """Prints the answer, or what ran out, and what the run cost."""
    tokens = sum(step.prompt_tokens + step.completion_tokens for step in trace.steps)
    if trace.answer is None:
        console.print(f"[bold red]{'no answer':>16}[/]  out of {trace.finish}")
    else:
        console.print(f"[bold]{'answer':>16}[/]  {escape(trace.answer)}", highlight=False)
    cost = f"{len(trace.steps)} steps, {tokens} tokens, {trace.seconds:.1f} s"
    console.print(f"[dim]{'':>16}  {cost}[/]")


def to_block(trace: Trace, *, title: str = "", note: str = "") -> TraceBlock:
    """The run as a block of `internjax.report`."""
    steps = [TraceStep(row.kind, row.text, row.name, row.seconds) for row in trace.rows()]
    return TraceBlock(title or trace.question, steps, note)
