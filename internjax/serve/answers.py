"""One choice of an answer while it grows, and the JSON that OpenAI's API makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internjax.data.tokenizer import Tokenizer
from internjax.serve.calls import CallReader
from internjax.serve.scheduler import Delta, IdLogprob
from internjax.serve.tools import NO_TOOLS, ToolPlan


class AnswerFailed(RuntimeError):
    """The engine could not finish a request; the message says why."""


class AnswerCancelled(AnswerFailed):
    """The request was ended from outside, as a shutdown does."""


@dataclass
class Answer:
    """Gathers the news of one request.

    Fields:
      plan: whether tool calls are to be read out of it.
      keeps_end: whether a token that ended the answer has an entry in `logprobs`: in raw
        completions, not in chats.
      text, tokens, logprobs: all so far.
      total_logprob: of all tokens, that one too (nats), as far as they were asked for.
      sent: letters of the words that a stream has handed out.
    """

    tokenizer: Tokenizer
    plan: ToolPlan = NO_TOOLS
    keeps_end: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[IdLogprob] = field(default_factory=list)
    total_logprob: float = 0.0
    finish_reason: str | None = None
    sent: int = 0

    def __post_init__(self):
        style = self.plan.style
        self._reader = CallReader(style, anywhere=self.plan.anywhere) if style else None
        self._shown: list[int] = []  # letters of arguments handed out, one entry a call
        self._cut = ""

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
        self.total_logprob += sum(entry.logprob for entry in delta.logprobs)
        ends = delta.by_token and not self.keeps_end
        self.logprobs += delta.logprobs[:-1] if ends else delta.logprobs
        self.finish_reason = delta.finish_reason
        if self._reader:
            self._reader.push(delta.text)
            self._cut = self._reader.finish() if self.finish_reason else ""

    @property
    def words(self) -> str:
        """The text that cannot belong to a tool call any more."""
        return self._reader.words if self._reader else self.text

    @property
    def mean_logprob(self) -> float:
        """Log-probability a token (nats)."""
        return self.total_logprob / max(1, len(self.tokens))

    def newly_certain(self) -> str:
        """Returns words not handed out yet."""
        new = self.words[self.sent :]
        self.sent += len(new)
        return new

    def new_call_pieces(self) -> list[dict]:
        """Returns what of the calls was not handed out yet, as OpenAI streams it.

        A call's first piece has its id and name, the others go on with its arguments.
        """
        pieces = []
        for index, call in enumerate(self._reader.calls if self._reader else ()):
            if index == len(self._shown):
                self._shown.append(0)
                function = {"name": call.name, "arguments": ""}
                pieces.append({"index": index, **call.message(), "function": function})
            new = call.arguments[self._shown[index] :]
            if new:
                self._shown[index] += len(new)
                pieces.append({"index": index, "function": {"arguments": new}})
        return pieces

    def result(self) -> tuple[str, list[dict], str]:
        """Returns words, tool calls and the finish reason of an answer that has ended.

        A call that was cut off, by its length or a stop string, is no call: it stays words.
        """
        assert self.finish_reason, "the answer has not ended"
        calls = self._reader.calls if self._reader else []
        made = [call.message() for call in calls if call.complete]
        reason = "tool_calls" if made and self.finish_reason == "stop" else self.finish_reason
        return self.words + self._cut, made, reason


def best(answers: Sequence[Answer], keep: int) -> list[int]:
    """Returns the indices of the `keep` answers likeliest a token, best first.

    That is what OpenAI's `best_of` promises ("the highest log probability per token").
    """
    return sorted(range(len(answers)), key=lambda i: -answers[i].mean_logprob)[:keep]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The API's account of one request; `cached_tokens` of the prompt were not computed anew."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
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
