"""The agent loop: ask the model, carry out its calls, show it the results, until it answers.

It talks to anything with `chat.completions.create` of the openai client. How a model is asked and
how its answer is read is the policy's; what a run may cost is one `Budget`; all of it ends up in a
`Trace`, also when the budget ends the run.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from internjax.agents.tool import Tool, ToolError, toolbox, use
from internjax.errors import Missing, UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What a run may cost; the last step is told that it is the last.

    Attributes:
        steps: answers of the model.
        tokens: prompt and completion of all steps together.
        seconds: wall clock, tools included.
        step_tokens: completion tokens of one step.
    """

    steps: int = 4
    tokens: int = 16_000
    seconds: float = 300.0
    step_tokens: int = 256

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"budget.{name}={value}: it must be above 0.")


@dataclass(frozen=True)
class Call:
    """A call as the model made it; arguments are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Result:
    """What the model is told of a call: the tool's text, or what was wrong with the call."""

    text: str
    ok: bool
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of a run as people read it.

    Attributes:
        kind: user, thought, call, result, error or answer.
        name: of the tool.
        seconds: what it took, where that was measured.
    """

    kind: str
    text: str
    name: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Step:
    """One answer of the model and what came of it.

    Attributes:
        message: the assistant's message as it went into the transcript.
        thought: what it said besides its calls.
        calls, results: side by side.
        seconds: of the model alone; the tools' stand in their results.
        prompt_tokens, completion_tokens: as the server counted them.
    """

    message: Message
    thought: str
    calls: tuple[Call, ...]
    results: tuple[Result, ...]
    seconds: float
    prompt_tokens: int
    completion_tokens: int

    def rows(self) -> list[Row]:
        """The thought, then each call followed by its result."""
        rows = [Row("thought", self.thought, seconds=self.seconds)] if self.thought else []
        for call, result in zip(self.calls, self.results, strict=True):
            rows.append(Row("call", call.arguments, call.name, self.seconds))
            kind = "result" if result.ok else "error"
            rows.append(Row(kind, result.text, call.name, result.seconds))
        return rows


@dataclass(frozen=True)
class Trace:
    """A whole run.

    Attributes:
        finish: "answer", or what ran out: "steps", "tokens", "seconds".
        answer: None unless the model answered.
    """

    question: str
    model: str
    policy: str
    steps: tuple[Step, ...]
    answer: str | None
    finish: str
    seconds: float

    def rows(self) -> list[Row]:
        """The run from question to answer (or the error that there is none)."""
        rows = [Row("user", self.question)]
        for step in self.steps:
            rows += step.rows()
        if self.answer is None:
            return [*rows, Row("error", f"no answer: out of {self.finish}")]
        return [*rows, Row("answer", self.answer)]

    def save(self, path: Path) -> None:
        """Writes the run as JSON, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(path)


@dataclass(frozen=True)
class Reply:
    """A message as the policy read it: calls, or an answer, or a hint on what was wrong with it."""

    message: Message
    thought: str = ""
    calls: tuple[Call, ...] = ()
    answer: str | None = None
    hint: str = ""


@runtime_checkable
class Policy(Protocol):
    """How to ask for actions and how to read them; stateless, so one serves many runs."""

    name: str

    def opening(self, question: str, tools: dict[str, Tool]) -> list[Message]:
        """The first messages."""
        ...

    def request(
        self, messages: list[Message], tools: dict[str, Tool], *, first: bool, last: bool
    ) -> dict[str, Any]:
        """Keyword arguments for `chat.completions.create`, messages among them."""
        ...

    def read(self, message: Any, *, cut_off: bool) -> Reply:
        """Reads the assistant's message of the openai client."""
        ...

    def report(self, reply: Reply, results: list[Result]) -> list[Message]:
        """The messages that tell the model the results, or the hint when there are none."""
        ...


@dataclass
class _Spent:
    start: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def run(
    client: Any,
    model: str,
    question: str,
    tools: Iterable[Tool],
    policy: Policy,
    *,
    budget: Budget | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trace:
    """Lets a model answer a question with tools.

    Args:
        client: an `openai.OpenAI`, or anything with its `chat.completions.create`.
        on_step: called after each step, e.g. to show it.

    Raises:
        UserError: no tools, or two of one name.
        Exception: whatever a tool raises that is no `ToolError`: the tool is broken, not the model.
        openai.APIError: what the server says against a request.
    """
    budget, box = budget or Budget(), toolbox(tools)
    messages = policy.opening(question, box)
    spent, steps, answer, finish = _Spent(), [], None, None
    while finish is None:
        last = spent.steps + 1 == budget.steps
        asked = policy.request(messages, box, first=spent.steps == 0, last=last)
        begin = spent.seconds()
        completion = _ask(client, model, asked, budget, spent)
        if completion is None:
            finish = "seconds"
            break
        seconds = spent.seconds() - begin
        choice, usage = completion.choices[0], completion.usage
        reply = policy.read(choice.message, cut_off=choice.finish_reason == "length")
        results = [_carry_out(box, call) for call in reply.calls]
        messages = [*messages, reply.message, *policy.report(reply, results)]
        steps.append(
            Step(
                reply.message,
                reply.thought,
                reply.calls,
                tuple(results),
                seconds,
                usage.prompt_tokens,
                usage.completion_tokens,
            )
        )
        if on_step is not None:
            on_step(steps[-1])
        spent.steps += 1
        spent.tokens += usage.prompt_tokens + usage.completion_tokens
        answer = reply.answer
        finish = "answer" if answer is not None else _ran_out(budget, spent)
    return Trace(question, model, policy.name, tuple(steps), answer, finish, spent.seconds())


def connect(url: str, *, api_key: str = "none") -> Any:
    """An openai client for a server at `url` (ending in /v1) that never retries on its own."""
    try:
        from openai import OpenAI
    except ModuleNotFoundError as error:
        raise Missing("Agents need the openai client: pip install 'internjax[agents]'") from error
    return OpenAI(base_url=url, api_key=api_key, max_retries=0)


def _ask(client: Any, model: str, asked: dict, budget: Budget, spent: _Spent) -> Any | None:
    """One completion within what is left of the budget; None when the time ran out."""
    left = budget.seconds - spent.seconds()
    if left <= 0:
        return None
    try:
        asked = {"temperature": 0, **asked}  # a policy may draw
        return client.chat.completions.create(
            model=model, max_tokens=budget.step_tokens, timeout=left, **asked
        )
    except Exception as error:
        # openai is optional here: its timeout error is known by name, everything else passes on.
        if type(error).__name__ == "APITimeoutError":
            return None
        raise


def _carry_out(box: dict[str, Tool], call: Call) -> Result:
    start = time.perf_counter()
    try:
        text, ok = use(box, call.name, call.arguments), True
    except ToolError as error:
        text, ok = str(error), False
    return Result(text, ok, time.perf_counter() - start)


def _ran_out(budget: Budget, spent: _Spent) -> str | None:
    over = {
        "steps": spent.steps >= budget.steps,
        "tokens": spent.tokens >= budget.tokens,
        "seconds": spent.seconds() >= budget.seconds,
    }
    return next((name for name, is_over in over.items() if is_over), None)
