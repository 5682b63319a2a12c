"""Generated sums: a task with a known answer that a small model cannot do in its head.

It shows what a tool is worth: the same questions to the bare model and to the model with tools,
graded by the same rule.
"""

import random
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from internjax.agents.loop import Budget, Policy, Trace, run
from internjax.agents.tool import Tool

_FORMS = (
    "What is {sum}?",
    "Calculate {sum}.",
    "What is the sum of {list}?",
    "Add {list}.",
    "How much is {sum}?",
)


@dataclass(frozen=True)
class Sum:
    """A question and its right answer."""

    question: str
    answer: int


@dataclass(frozen=True)
class Comparison:
    """The two scores, each out of `len(traces)`, and how they came about."""

    bare_right: int
    tool_right: int
    bare_answers: tuple[str, ...]
    traces: tuple[Trace, ...]


def make_sums(count: int, seed: int = 0) -> list[Sum]:
    """Generates sums of two or three numbers of two to four digits, in five wordings."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        numbers = [rng.randint(11, 9999) for _ in range(rng.choice((2, 3)))]
        listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
        total = " + ".join(map(str, numbers))
        question = _FORMS[index % len(_FORMS)].format(sum=total, list=listed)
        made.append(Sum(question, sum(numbers)))
    return made


def is_right(text: str | None, answer: int) -> bool:
    """Whether the right number stands in the text (thousands separators allowed)."""
    found = re.findall(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?", text or "")
    return any(float(number.replace(",", "")) == answer for number in found)


def compare(
    client: Any,
    model: str,
    tools: Iterable[Tool],
    policy: Policy,
    sums: Iterable[Sum],
    *,
    budget: Budget | None = None,
    bare_tokens: int = 48,
    concurrency: int = 8,
    on_done: Callable[[Sum, str, Trace], None] | None = None,
) -> Comparison:
    """Asks every sum twice: the bare model, and the model with tools.

    Args:
        bare_tokens: most tokens of a bare answer, enough for a sentence or two.
        concurrency: sums asked at once; the outcome does not depend on it.
        on_done: called after each sum, in their order.
    """
    tools, sums, answers, traces = list(tools), list(sums), [], []
    bare_right = tool_right = 0

    def ask(each: Sum) -> tuple[str, Trace]:
        completion = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": each.question}],
            max_tokens=bare_tokens,
            temperature=0,
        )
        bare = completion.choices[0].message.content or ""
        return bare, run(client, model, each.question, tools, policy, budget=budget)

    with ThreadPoolExecutor(concurrency) as pool:
        for each, (bare, trace) in zip(sums, pool.map(ask, sums), strict=True):
            answers.append(bare)
            traces.append(trace)
            bare_right += is_right(bare, each.answer)
            tool_right += is_right(trace.answer, each.answer)
            if on_done is not None:
                on_done(each, bare, trace)
    return Comparison(bare_right, tool_right, tuple(answers), tuple(traces))
