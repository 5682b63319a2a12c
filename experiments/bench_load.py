"""The requests that a serving benchmark sends: fixed lengths, or real conversations."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from internjax.data.chat import encode_chat, encode_prompt
from internjax.data.chat_samples import Messages, read_chats
from internjax.data.templates import ChatTemplate
from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError

log = logging.getLogger(__name__)

LEAST_TOKENS = 4  # of a prompt and of an answer; shorter ones are no conversation


@dataclass(frozen=True)
class Work:
    """One request: token ids to go on with or a chat to answer, and how many tokens come back."""

    prompt: Sequence[int] | Messages
    new: int

    @property
    def is_chat(self) -> bool:
        """Whether the prompt goes through the model's chat template."""
        return isinstance(self.prompt[0], dict)


def fixed(prompt: int, new: int, count: int, vocab_size: int, *, seed: int) -> list[Work]:
    """Returns `count` requests of random ids, no two alike: a cache of prompts gains nothing."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (count, prompt))
    return [Work(row, new) for row in ids.tolist()]


def conversations(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    max_prompt: int,
    max_total: int,
) -> list[Work]:
    """Reads chats and keeps those that fit: the opening turns are asked, the answer is counted.

    As the peers' serving benchmarks do with ShareGPT: a conversation has two turns or more, its
    first two are used, both have 4 tokens or more, the prompt (chat template included) at most
    `max_prompt`, prompt and answer together at most `max_total`. Malformed rows are passed over.

    Args:
      sources: files of conversations (alpaca, ShareGPT or OpenAI form), or ENTRY/FILE of the
        catalogue.
    """
    works = []
    for source in sources:
        for chat in read_chats(find(source), on_fault=log.info):
            work = first_answer(chat, tokenizer, template, max_prompt, max_total)
            works += [work] if work else []
    return works


def first_answer(
    chat: Messages, tokenizer: Tokenizer, template: ChatTemplate, max_prompt: int, max_total: int
) -> Work | None:
    """Returns the request for a chat's first answer; None where it does not fit."""
    at = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
    asked, answer = chat[:at], chat[at]["content"]
    prompt = len(encode_prompt(tokenizer, template, asked))
    _, mask = encode_chat(tokenizer, template, [*asked, {"role": "assistant", "content": answer}])
    new = sum(mask)
    fits = LEAST_TOKENS <= prompt <= max_prompt and prompt + new <= max_total
    return Work(asked, new) if fits and answer.strip() and new >= LEAST_TOKENS else None


def find(source: str) -> Path:
    """Returns the file of a path, or of ENTRY/FILE in the catalogue (fetched when needed)."""
    from internjax import catalog

    if (path := Path(source).expanduser()).exists():
        return path
    entry, _, file = source.partition("/")
    path = catalog.get(entry, file)
    if not path.is_file():
        names = ", ".join(f"{entry}/{x.name}" for x in catalog.ls(entry, file))
        raise UserError(f"data={source}: name one file, of {names}.")
    return path


def sample(works: Sequence[Work], count: int, *, seed: int) -> list[Work]:
    """Draws `count` different requests."""
    if count > len(works):
        raise UserError(
            f"requests={count}: only {len(works)} conversations fit; take fewer, or more data."
        )
    return random.Random(seed).sample(list(works), count)


def poisson(count: int, rate: float, *, seed: int) -> Float64[np.ndarray, " count"]:
    """Returns when requests start, in seconds: `rate` a second on average, independently."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()
