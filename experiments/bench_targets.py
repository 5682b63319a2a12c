"""Whom a serving benchmark asks: the engine in this process, or any OpenAI server over HTTP.

A target is a function of one `Work` that returns when its pieces came. Both are called by many
threads at once. The HTTP client is the standard library's: at hundreds of pieces a second a richer
one would take the processor from the server beside it.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from internjax.data.chat import encode_prompt
from internjax.errors import UserError
from internjax.experiments.bench_load import Work
from internjax.models.lm import SamplingParams
from internjax.models.load import Model
from internjax.serve.thread import EngineThread, Job

TIMEOUT_SECONDS = 600  # without a byte from the server


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Fields:
      prompt_tokens, tokens: of the prompt and of the answer.
      times: when each piece of the answer came, seconds since the request was sent.
    """

    prompt_tokens: int
    tokens: int
    times: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first piece."""
        return self.times[0]

    @property
    def seconds(self) -> float:
        """Seconds to the last piece."""
        return self.times[-1]

    @property
    def tpot(self) -> float:
        """Seconds a token after the first one, on average."""
        return (self.seconds - self.ttft) / max(1, self.tokens - 1)


Target = Callable[[Work], Answer]


def in_process(worker: EngineThread, model: Model) -> Target:
    """The engine, without a server: its news are taken as they come."""

    def ask(work: Work) -> Answer:
        begin, times, tokens = time.perf_counter(), [], 0
        ids = work.prompt
        if work.is_chat:
            ids = encode_prompt(model.tokenizer, model.template, work.prompt)
        params = SamplingParams(max_tokens=work.new, ignore_eos=True)
        for news in worker.stream(Job(ids, params)):
            if news.error:
                raise UserError(f"the engine failed: {news.error}")
            if news.tokens:
                times.append(time.perf_counter() - begin)
                tokens += len(news.tokens)
        return checked(Answer(len(ids), tokens, tuple(times)), work)

    return ask


def over_http(url: str, name: str, api_key: str) -> Target:
    """An OpenAI server at `url` (ending in /v1): ids go to completions, chats to chat completions.

    The server must know `ignore_eos`, as vLLM, SGLang, LMDeploy, llama.cpp and InternJAX do.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url={url}: give http://HOST:PORT/v1 (or https).")
    secure = parts.scheme == "https"
    connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}

    def ask(work: Work) -> Answer:
        path = parts.path.rstrip("/") + ("/chat/completions" if work.is_chat else "/completions")
        body = json.dumps(request_body(name, work))
        link = connection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
        begin = time.perf_counter()
        try:
            link.request("POST", path, body, headers)
            reply = link.getresponse()
            if reply.status != 200:
                raise UserError(f"{url} refused the request: {_reason(reply)}")
            return checked(_timed(reply, begin), work)
        except OSError as error:
            raise UserError(f"url={url}: no server answers there ({error}).") from error
        finally:
            link.close()

    return ask


def request_body(name: str, work: Work) -> dict:
    """The request in OpenAI's form: greedy, streamed, of exactly `work.new` tokens."""
    return {
        "model": name,
        ("messages" if work.is_chat else "prompt"): work.prompt,
        "max_tokens": work.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def checked(answer: Answer, work: Work) -> Answer:
    """Returns an answer of the length that was asked for; others would falsify every figure."""
    if answer.tokens != work.new:
        raise UserError(
            f"{work.new} tokens were asked for with ignore_eos, {answer.tokens} came: the server"
            " cut the answer or does not obey."
        )
    return answer


def events(reply: http.client.HTTPResponse) -> Iterator[dict]:
    """Yields the JSON objects of a stream of server-sent events up to `[DONE]`."""
    for line in reply:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise UserError("the server ended a stream without [DONE]: it was cut off.")


def _timed(reply: http.client.HTTPResponse, begin: float) -> Answer:
    times, usage = [], None
    for event in events(reply):
        now = time.perf_counter() - begin
        if "error" in event:
            raise UserError(f"the server ended a stream with an error: {event['error']}")
        if any(c.get("text") or c.get("delta", {}).get("content") for c in event["choices"]):
            times.append(now)
        usage = event.get("usage") or usage
    if usage is None:
        raise UserError("the server told no usage: it must obey stream_options.include_usage.")
    # An answer of tokens that are no text has no piece: its end stands for it.
    return Answer(usage["prompt_tokens"], usage["completion_tokens"], tuple(times) or (now,))


def _reason(reply: http.client.HTTPResponse) -> str:
    text = reply.read(4096).decode("utf-8", "replace")
    return f"status {reply.status}: {' '.join(text.split())}"
