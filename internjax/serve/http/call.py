"""What is known of one HTTP request: begun by the guard, filled in by a route, logged at last."""

import logging
import time
from dataclasses import dataclass, field

from fastapi import Request

from internjax.serve.http.json_line import one_line

log = logging.getLogger("internjax.requests")


@dataclass
class Call:
    """One HTTP request.

    Fields:
      id: in the header `x-request-id`, in every error and in the log.
      key: name of the API key, never the key; caller: whose allowance it takes.
      cached_tokens: of the prompt, found in the cache.
      reserved: tokens taken of that allowance.
      prompt, answer: text, written down only if the operator asks for it.
    """

    id: str
    method: str = ""
    path: str = ""
    key: str = ""
    caller: str = ""
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reserved: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    status: int = 0
    error: str = ""
    prompt: str = ""
    answer: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def used(self) -> int:
        """Tokens that this request has cost."""
        return self.prompt_tokens + self.completion_tokens

    def write(self, *, with_text: bool) -> None:
        """Logs one line of JSON; without the texts unless asked."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(time.monotonic() - self.started, 4),
            "finish_reason": ",".join(self.finish_reasons),
        }
        if self.error:
            line["error"] = self.error
        if with_text:
            line |= {"prompt": self.prompt, "answer": self.answer}
        log.info(one_line(line))


def call_of(http: Request) -> Call:
    """Returns the record that the guard began for a request."""
    return http.scope["internjax.call"]
