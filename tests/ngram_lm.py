"""A real, tiny language model with known probabilities, and an OpenAI-compatible server of it.

Byte bigrams with add-one smoothing: every log-likelihood can be added up by hand, answers differ
between prompts, and nothing needs a tokenizer. The server echoes the prompt's log-probabilities.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from internjax.models.lm import Generation, Loglik, Progress, Prompt, SamplingParams

BOS = 0
CORPUS = (
    "the water is cold. the water is cold. the ice is cold. the sun is warm. "
    "i am bigram, made by the test lab. i am bigram. 7 and 5 is 12. "
)


class BigramLM:
    """P(byte | byte before), counted over `corpus`; `calls` counts the requests it was asked."""

    def __init__(self, corpus: str = CORPUS, name: str = "bigram"):
        data = np.frombuffer(b"\0" + corpus.encode(), np.uint8)
        counts = np.ones((256, 256))
        np.add.at(counts, (data[:-1], data[1:]), 1)
        self.logp = np.log(counts / counts.sum(axis=1, keepdims=True))
        self.name = name
        self.calls = 0

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Loglik]:
        self.calls += len(pairs)
        return [self._score(*pair) for pair in pairs]

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        self.calls += len(texts)
        return [self._score("", text).sum for text in texts]

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        self.calls += len(prompts)
        return [self._generate(prompt, params) for prompt in prompts]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        yield from self.generate([prompt], params)[0].text

    def echo(self, text: str) -> list[tuple[str, float | None, str, float]]:
        """(byte as text, its log-probability, likeliest, its log-probability)."""
        data = text.encode()
        rows = []
        for index, byte in enumerate(data):
            row = self.logp[data[index - 1] if index else BOS]
            best = int(row.argmax())
            value = float(row[byte]) if index else None
            piece = bytes([byte]).decode(errors="replace")
            rows.append((piece, value, chr(best), float(row[best])))
        return rows

    def _score(self, context: str, continuation: str) -> Loglik:
        data = list((context + continuation).encode())
        start = len(context.encode())
        before = [BOS, *data]
        values = [self.logp[before[i], data[i]] for i in range(start, len(data))]
        greedy = all(self.logp[before[i]].argmax() == data[i] for i in range(start, len(data)))
        return Loglik(float(math.fsum(values)), len(values), greedy)

    def _generate(self, prompt: Prompt, params: SamplingParams) -> Generation:
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        byte, out = (text.encode() or b"\0")[-1], []
        for _ in range(params.max_tokens):
            byte = int(self.logp[byte].argmax())
            out.append(byte)
        answer = bytes(out).decode("ascii", errors="replace")
        reason = "length"
        for stop in params.stop:
            if stop in answer:
                answer, reason = answer.partition(stop)[0], "stop"
        return Generation(answer, tuple(out), reason, len(text), None, len(out))


@contextmanager
def serve(lm: BigramLM, fail: Callable[[dict], int | None] = lambda body: None) -> Iterator[str]:
    """Serves `lm` on loopback, yields the URL; `fail` may turn a request into an HTTP status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = fail(body)
            reply = {"error": {"message": "refused by the test"}} if status else self._reply(body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status or 200)
            kind = "text/event-stream" if isinstance(reply, bytes) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _reply(self, body: dict) -> dict | bytes:
            params = SamplingParams(max_tokens=body["max_tokens"], stop=tuple(body.get("stop", ())))
            chat = "messages" in body
            if body.get("echo"):
                usage = {"prompt_tokens": len(body["prompt"].encode())}
                return {"choices": [self._echo(body["prompt"])], "usage": usage}
            answer = lm.generate([body["messages"] if chat else body["prompt"]], params)[0]
            if body.get("stream"):
                return self._events(answer.text, chat)
            part = {"message": {"content": answer.text}} if chat else {"text": answer.text}
            choice = part | {"index": 0, "finish_reason": answer.finish_reason}
            usage = {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            }
            return {"choices": [choice], "usage": usage}

        def _echo(self, prompt: str) -> dict:
            rows = lm.echo(prompt + " ")  # one generated token follows, as max_tokens=1 asks
            logprobs = {
                "tokens": [row[0] for row in rows],
                "token_logprobs": [row[1] for row in rows],
                "top_logprobs": [{row[2]: row[3]} for row in rows],
                "text_offset": list(range(len(rows))),
            }
            return {"text": prompt + " ", "finish_reason": "length", "logprobs": logprobs}

        def _events(self, text: str, chat: bool) -> bytes:
            lines = []
            for piece in text:
                part = {"delta": {"content": piece}} if chat else {"text": piece}
                lines.append(json.dumps({"choices": [part | {"index": 0}]}))
            return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
