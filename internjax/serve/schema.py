"""The bodies that the HTTP server reads, and what of them the engine is asked.

Fields of OpenAI's API that change nothing here are named and ignored; any other unknown field is
refused, because a parameter that is accepted but not obeyed falsifies results.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from internjax.errors import UserError
from internjax.models.lm import SamplingParams

Text = Annotated[str, StringConstraints(max_length=1 << 20)]
TokenIds = Annotated[list[int], Field(max_length=1 << 20)]

# Bounds that the sampler's float32 and int32 hold: beyond them one request would fail all others.
Temperature = Annotated[float, Field(ge=0, le=100)]
TopK = Annotated[int, Field(ge=-1, lt=1 << 31)]
Repetition = Annotated[float, Field(ge=0.01, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, lt=1)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
StopIds = Annotated[list[int], Field(max_length=64)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]
COLDEST = 1e-4
"""Temperatures below are 0: quotients would overflow, and the likeliest token wins anyway."""


class Body(BaseModel):
    """A request body; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class OpenAIBody(Body):
    """A body whose clients may send more of OpenAI's API, without meaning here."""

    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """How the answer is formed; `regex_schema` is LMDeploy's."""

    type: Literal["text", "json_object", "json_schema", "regex_schema"]
    json_schema: JsonSchema | None = None
    regex_schema: Text | None = None


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class SamplingBody(OpenAIBody):
    """What chat and plain completions share."""

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    typical_p: TopP | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    min_new_tokens: int | None = Field(default=None, ge=0)
    bad_words: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    stop_token_ids: StopIds | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Repetition | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    n: int | None = Field(default=None, ge=1, le=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    grammar: dict[str, Any] | None = None

    # Without meaning here: only responses are stored.
    metadata: Any = None
    store: Any = None

    def sampling(
        self,
        max_tokens: int,
        *,
        logprobs: int | None,
        grammar: dict | None,
        index: int = 0,
        markers: bool = False,
    ) -> SamplingParams:
        """Returns the parameters of choice number `index`; None means the API's default.

        Args:
          markers: special tokens stand in the text, for tool calls are read by them.
        """
        given = {
            name: getattr(self, name)
            for name in (
                "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
                "logit_bias", "ignore_eos", "typical_p", "min_tokens", "skip_special_tokens",
            )
            if getattr(self, name) is not None
        }  # fmt: skip
        if self.min_new_tokens is not None:  # LMDeploy's name of the same
            if self.min_tokens not in (None, self.min_new_tokens):
                raise UserError("min_tokens and min_new_tokens differ: give one of them.")
            given["min_tokens"] = self.min_new_tokens
        if markers:
            given["skip_special_tokens"] = False
        bad_words = (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        # Choices of one request differ by their seeds; the first has the seed as it was given.
        seed = None if self.seed is None else self.seed + 0x9E3779B1 * index
        heat = 1.0 if self.temperature is None else self.temperature
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=heat if heat >= COLDEST else 0.0,
                top_k=max(self.top_k or 0, 0),
                seed=seed,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                bad_words=tuple(bad_words or ()),
                logprobs=logprobs,
                grammar=grammar,
                **given,
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def asked_grammar(self) -> dict | None:
        """Returns the grammar that `grammar` or `response_format` asks for.

        Raises:
          UserError: both ask.
        """
        form = self.response_format
        if form is None or form.type == "text":
            return self.grammar
        if self.grammar:
            raise UserError("give grammar or response_format, not both.")
        if form.type == "json_object":
            return {"json_schema": {"type": "object"}}
        if form.type == "regex_schema":
            return {"regex": form.regex_schema or ""}
        if form.json_schema is None:
            raise UserError("response_format: type json_schema needs the field json_schema.")
        return {"json_schema": form.json_schema.schema_}


def one_by_one(given: str | list, name: str) -> list[str | list[int]]:
    """Returns texts or lists of ids one by one, whichever of the four forms they came in.

    Raises:
      UserError: there is none.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise UserError(f"{name} is an empty list: give at least one.")
    return given


class CompletionBody(SamplingBody):
    prompt: Text | list[Text] | TokenIds | list[TokenIds]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: int | None = Field(default=None, ge=1, le=64)
    suffix: str | None = None

    @property
    def several(self) -> int:
        """Answers generated for each prompt; of more than `n` the likeliest are given.

        Raises:
          UserError: fewer than `n`, or more in a stream, which cannot choose at the end.
        """
        n = self.n or 1
        if self.best_of is None or self.best_of == n:
            return n
        if self.best_of < n:
            raise UserError(f"best_of={self.best_of} is less than n={n}: give at least n.")
        if self.stream:
            raise UserError(f"best_of={self.best_of} chooses at the end: it cannot be streamed.")
        return self.best_of

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts one by one."""
        return one_by_one(self.prompt, "prompt")


class EmbeddingBody(Body):
    model: str
    input: Text | list[Text] | TokenIds | list[TokenIds]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Any = None

    def texts(self) -> list[str | list[int]]:
        """Returns the texts one by one."""
        texts = one_by_one(self.input, "input")
        if len(texts) > 2048:
            raise UserError(f"input has {len(texts)} texts; at most 2048 are taken at once.")
        return texts


class TokenizeBody(Body):
    model: str | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


class EncodeBody(Body):
    input: Text | Annotated[list[Text], Field(max_length=2048)]
    do_preprocess: bool = False
    add_bos: bool = True
