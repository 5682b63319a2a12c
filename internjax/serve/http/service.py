"""What the routes share: the engine, the tokenizer, the limits, the names that are served."""

from dataclasses import dataclass

from internjax.data.templates import ChatTemplate
from internjax.data.tokenizer import Tokenizer
from internjax.serve.http.errors import ApiError
from internjax.serve.thread import EngineThread


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Fields:
      name: the one model that is served; created: when, in seconds since 1970.
      api_key: asked of every client when not empty; max_body_bytes: of one request.
      default_max_tokens: length of a chat answer when the request names none.
    """

    name: str
    engine: EngineThread
    tokenizer: Tokenizer
    template: ChatTemplate
    api_key: str = ""
    max_body_bytes: int = 4 << 20
    default_max_tokens: int = 512
    created: int = 0


def encode(service: Service, prompt: str, add_bos: bool = True) -> list[int]:
    return service.tokenizer.encode(prompt, bos=add_bos and service.tokenizer.adds_bos)


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"the model {name!r} is not served here; the one that is: {service.name!r}.",
            code="model_not_found",
            param="model",
        )
