"""Judges whether an answer states the configured identity, and whether two questions overlap.

A regex judge over name, maker and purpose: cheap, deterministic and open to inspection. It wants
what the question asked for, and refuses an answer that also claims to be somebody else.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache

from internjax.data.identity import Identity
from internjax.evals.core import Task
from internjax.evals.tasks import resolve_tasks, with_options

# Whom a small chat model says it is when it does not know: to claim one of these is wrong.
RIVALS = (
    "SmolLM",
    "Hugging ?Face",
    "ChatGPT",
    "GPT-?[0-9]",
    "OpenAI",
    "Claude",
    "Anthropic",
    "Gemini",
    "Google",
    "DeepMind",
    "Llama",
    "Meta",
    "Microsoft",
    "Copilot",
    "Siri",
    "Alexa",
    "Amazon",
    "Apple",
    "Qwen",
    "Alibaba",
    "DeepSeek",
    "Mistral",
    "Bard",
)
CLAIMS = (
    r"\b(?:i am|i'm|my name is|called|known as)\s+(?:an?\s+|the\s+)?(?:\w+\s+){0,2}?",
    r"\b(?:made|created|built|developed|trained|designed|owned|released)\s+by\s+(?:\w+\s+){0,2}?",
)
STOP_WORDS = frozenset("a an and are as at by for from in is it of on or that the to with".split())  # noqa: SIM905
DENIAL = re.compile(r"\b(?:not|neither|nor|isn't|wasn't)\b[^,.;]*", re.IGNORECASE)
PURPOSE_SHARE = 0.6
"""Share of the purpose's content words an answer must hold; the rest may be its own words."""


def for_identity(tasks: Iterable[str | Task], identity: Identity) -> list[Task]:
    """Tasks by name; those that judge an identity judge this one."""
    return [
        with_options(task, **asdict(identity)) if "identity" in task.metrics else task
        for task in resolve_tasks(list(tasks))
    ]


def identity_value(answer: str, aspect: str, options: Mapping[str, str]) -> float:
    """1 if `answer` states what `aspect` asks of the identity in `options`, else 0.

    Args:
        aspect: "name", "maker", "purpose", "both" (name and maker) or "none" (neither may occur).
    """
    identity = Identity(**options)
    named, made = mentions(answer, identity.name), mentions(answer, identity.maker)
    if aspect == "none":
        return float(not named and not made)
    if claims_other(answer, identity):
        return 0.0
    right = {
        "name": named,
        "maker": made,
        "purpose": states_purpose(answer, identity.purpose),
        "both": named and made,
    }
    if aspect not in right:
        raise ValueError(f"aspect={aspect!r} is none of {', '.join(right)}, none.")
    return float(right[aspect])


def mentions(answer: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words, whatever its case, spacing and leading article."""
    words = re.sub(r"^(the|a|an)\s+", "", phrase.strip(), flags=re.IGNORECASE).split()
    pattern = r"\W+".join(map(re.escape, words))
    return re.search(rf"(?<!\w){pattern}(?!\w)", answer, re.IGNORECASE) is not None


def states_purpose(answer: str, purpose: str) -> bool:
    """Whether enough of the purpose's content words occur, compared by their first five letters."""
    said = {word[:5] for word in words_of(answer)}
    wanted = {word[:5] for word in words_of(purpose) if word not in STOP_WORDS}
    if not wanted:
        return mentions(answer, purpose)
    return len(wanted & said) >= PURPOSE_SHARE * len(wanted)


def claims_other(answer: str, identity: Identity) -> bool:
    """Whether the answer says to be, or to be made by, a known other; a denial is no claim."""
    own = f"{identity.name} {identity.maker}"
    rivals = [rival for rival in RIVALS if not re.search(rival, own, re.IGNORECASE)]
    asserted = DENIAL.sub("", answer)
    pattern = rf"(?:{'|'.join(CLAIMS)})(?:{'|'.join(rivals)})\b"
    return re.search(pattern, asserted, re.IGNORECASE) is not None


# ------------------------------------------------------------------------------------- overlap


@cache
def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words; apostrophes join, every other sign separates."""
    return tuple(re.findall(r"\w+", re.sub(r"['\u2019]", "", text.lower())))


def overlaps(question: str, others: Iterable[str], n: int = 5, whole: int = 3) -> str | None:
    """The first of `others` that gives `question` away, or None.

    Two questions overlap when their normalised words are equal, when they share `n` words in a row,
    or when one of at least `whole` words stands entirely inside the other.
    """
    asked = words_of(question)
    for other in others:
        known = words_of(other)
        short, long = sorted((asked, known), key=len)
        inside = len(short) >= whole and short in _ngrams(long, len(short))
        if asked == known or inside or _ngrams(asked, n) & _ngrams(known, n):
            return other
    return None


@cache
def _ngrams(words: tuple[str, ...], n: int) -> frozenset[tuple[str, ...]]:
    return frozenset(words[i : i + n] for i in range(len(words) - n + 1))
