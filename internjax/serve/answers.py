"""One choice of an answer while it grows, and the JSON that OpenAI's API makes of it."""

from dataclasses import dataclass, field
from typing import Any

from internjax.data.tokenizer import Tokenizer
from internjax.serve.scheduler import Delta, IdLogprob
from internjax.serve.text import overlap
from internjax.serve.tools import NO_TOOLS, OPENERS, ToolPlan, read_constrained, read_free


class AnswerFailed(RuntimeError):
    """The engine could not finish a request; the message says why."""


class AnswerCancelled(AnswerFailed):
    """The request was ended from outside, as a shutdown does."""


@dataclass
class Answer:
    """Gathers the news of one request.

    Fields:
      plan: whether tool calls are to be read out of it.
      text, tokens, logprobs: all so far; the end token has no entry in `logprobs`.
      sent: letters of the text that a stream has handed out.
    """

    tokenizer: Tokenizer
    plan: ToolPlan = NO_TOOLS
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[IdLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    sent: int = 0

    def take(self, delta: Delta) -> None:
        """Adds news.

        Raises:
          AnswerFailed: the request ended with an error. AnswerCancelled: by a shutdown.
        """
        if delta.finish_reason == "cancelled":
            raise AnswerCancelled("the request was cancelled")
        if delta.finish_reason == "error":
            raise AnswerFailed(delta.error)
        self.text += delta.text
        self.tokens += delta.tokens
        if not (delta.tokens and delta.tokens[-1] in self.tokenizer.eos_ids):
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    def newly_certain(self) -> str:
        """Returns text not handed out yet that cannot belong to a tool call any more."""
        end = len(self.text)
        if self.plan.grammar and self.plan.tools:
            end = 0
        elif self.plan.style:
            opener = OPENERS[self.plan.style]
            at = self.text.find(opener)
            if self.tokenizer.special_tokens.get(opener) in self.tokens:
                end = self.sent
            else:
                end = at if at >= 0 else end - overlap(self.text, opener)
        new = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return new

    def result(self) -> tuple[str, list[dict], str]:
        """Returns words, tool calls and the finish reason of an answer that has ended.

        A call that was cut off by its length is no call.
        """
        assert self.finish_reason, "the answer has not ended"
        if self.plan.tools and self.finish_reason == "stop":
            if self.plan.grammar:
                return "", read_constrained(self.text), "tool_calls"
            shown = [t for t in self.tokens if t not in self.tokenizer.eos_ids]
            words, calls = read_free(self.tokenizer.decode(shown), self.plan)
            if calls:
                return words, calls, "tool_calls"
        return self.text, [], self.finish_reason


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The API's account of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_choice(index: int, answer: Answer, *, logprobs: bool) -> dict[str, Any]:
    """One finished choice of `/v1/chat/completions`."""
    words, calls, reason = answer.result()
    message = {"role": "assistant", "content": words if words or not calls else None}
    if calls:
        message["tool_calls"] = calls
    entries = chat_logprobs(answer.tokenizer, answer.logprobs) if logprobs else None
    return {"index": index, "message": message, "logprobs": entries, "finish_reason": reason}


def chat_logprobs(tokenizer: Tokenizer, entries: list[IdLogprob]) -> dict[str, list]:
    """Log-probabilities in the chat form."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**one(e.id, e.logprob), "top_logprobs": [one(i, x) for i, x in e.top]} for e in entries
    ]
    return {"content": content}


def completion_logprobs(
    tokenizer: Tokenizer, entries: list[IdLogprob | None], ids: list[int], offset: int = 0
) -> dict[str, list]:
    """Log-probabilities in the form of `/v1/completions`.

    Args:
      entries: one an id; None for a prompt's first token, which nothing predicts.
      offset: letters that stand before the first of these tokens.
    """
    pieces = [tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)

    def rivals(entry: IdLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        names = ((tokenizer.token_bytes(i).decode(errors="replace"), x) for i, x in entry.top)
        best: dict[str, float] = {}
        for name, logprob in names:  # two ids may look alike; the likelier one is listed
            best.setdefault(name, _finite(logprob))
        return best

    return {
        "tokens": pieces,
        "token_logprobs": [None if e is None else _finite(e.logprob) for e in entries],
        "top_logprobs": [rivals(e) for e in entries],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity: a forbidden token's log-probability is written as the API does."""
    return max(logprob, -9999.0)
