"""A real HTTP server on loopback that answers chats from a script, in OpenAI's form.

For tests of clients: the bytes travel, the openai client parses them, only the model is scripted.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | dict[str, Any] | Callable[[dict[str, Any]], "str | dict[str, Any]"]
"""Text; or fields of the message (content, tool_calls) and "finish_reason", "status", "delay",
of a stream "pause" (seconds between its words) and "break" (words before the line goes dead);
or a function of the request's body that returns one of these."""


@dataclass
class Script:
    """What the server will answer, in order, what it was asked, and how many left a stream."""

    answers: list[Answer]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    left: int = 0


def tool_call(name: str, arguments: dict[str, Any] | str, call_id: str = "call_1") -> dict:
    """A message that calls one function; a str goes out as arguments as it is."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    call = {"id": call_id, "type": "function", "function": function}
    return {"content": None, "tool_calls": [call], "finish_reason": "tool_calls"}


@contextlib.contextmanager
def scripted(*answers: Answer) -> Iterator[Script]:
    """Serves the script while the block runs; a request after its end gets status 400."""
    script = Script(list(answers))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                script.requests.append(body)
                answer = script.answers.pop(0) if script.answers else {"status": 400}
            given = answer(body) if callable(answer) else answer
            given = {"content": given} if isinstance(given, str) else dict(given)
            time.sleep(given.pop("delay", 0.0))
            status = given.pop("status", 200)
            if body.get("stream") and status == 200:
                self._send_events(body, given)
                return
            self._send(status, _completion(body, given) if status == 200 else _refusal())

        def do_GET(self) -> None:
            cards = [{"id": name, "object": "model"} for name in ("scripted", "scripted-adapter")]
            self._send(200, {"object": "list", "data": cards})

        def _send_events(self, body: dict[str, Any], given: dict[str, Any]) -> None:
            pause, left = given.pop("pause", 0.0), given.pop("break", None)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            if left is not None:
                self.send_header("Content-Length", "1000000")  # more than will come
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for number, chunk in enumerate(_chunks(_completion(body, given))):
                    if number == left:
                        return
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    time.sleep(pause)
                self.wfile.write(b"data: [DONE]\n\n")
                return
            script.left += 1

        def _send(self, status: int, payload: dict[str, Any]) -> None:
            data = json.dumps(payload).encode()
            with contextlib.suppress(ConnectionError):  # a client may have given up waiting
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Silent: requests are kept in the script."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.port = server.server_port
    script.url = f"http://127.0.0.1:{script.port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(body: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    finish = given.pop("finish_reason", "stop")
    message = {"role": "assistant", "content": None, **given}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def _chunks(completion: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same completion as a stream: a word or a call at a time, then the end, then the usage."""
    (choice,), usage = completion["choices"], completion["usage"]
    head = {**completion, "object": "chat.completion.chunk", "usage": None}
    words = (choice["message"]["content"] or "").split(" ")
    deltas = [
        {"role": "assistant", "content": words[0]},
        *({"content": f" {w}"} for w in words[1:]),
    ]
    calls = choice["message"].get("tool_calls") or ()
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(calls)]
    for delta in deltas:
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    yield {**head, "choices": [end]}
    yield {**head, "choices": [], "usage": usage}


def _refusal() -> dict[str, Any]:
    return {"error": {"message": "the script has ended", "type": "invalid_request_error"}}
