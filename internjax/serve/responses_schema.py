"""The body of `/v1/responses`, and the chat that it comes to.

Items of text, of function calls and of their results become messages; everything that would need
another machine (images, files, hosted tools, background work) is refused by name.
"""

from typing import Any, Literal

from pydantic import Field

from internjax.errors import UserError
from internjax.serve.schema import (
    Body,
    ChatBody,
    Function,
    JsonSchema,
    Messages,
    OpenAIBody,
    ResponseFormat,
    Temperature,
    Text,
    Tool,
    ToolChoice,
    TopLogprobs,
    TopP,
)

WRITTEN_PARTS = ("input_text", "output_text", "text")


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(Body):
    format: TextFormat = TextFormat()
    verbosity: None = None


class FunctionTool(Function):
    type: Literal["function"]


class ResponseBody(OpenAIBody):
    """What `/v1/responses` takes; fields that can only be None are not served."""

    model: str
    input: Text | Messages
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    max_tool_calls: None = None
    prompt: None = None
    reasoning: None = None

    # Of OpenAI's API, without meaning here.
    prompt_cache_retention: Any = None
    stream_options: Any = None

    def new_messages(self) -> list[dict[str, Any]]:
        """Returns the input as messages.

        Raises:
          UserError: an item is of a kind that is not served.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        for index, item in enumerate(self.input):
            _add(messages, item, f"input.{index}")
        return messages

    def chat(self, messages: list[dict[str, Any]]) -> ChatBody:
        """Returns the same question for the chat interface, about all the messages so far."""
        if self.instructions:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        form = (self.text or TextConfig()).format
        schema = None
        if form.type == "json_schema":
            schema = JsonSchema(**form.model_dump(by_alias=True, exclude={"type"}))
        return ChatBody(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=ResponseFormat(type=form.type, json_schema=schema),
            tools=self._tools(),
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=bool(self.include) or self.top_logprobs is not None,
            top_logprobs=self.top_logprobs,
        )

    def _tools(self) -> list[Tool] | None:
        if self.tools is None:
            return None
        bare = [tool.model_dump(exclude={"type"}) for tool in self.tools]
        return [Tool(type="function", function=Function(**tool)) for tool in bare]

    def _choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "function":
            raise UserError(f"tool_choice: {choice!r} is neither a word nor a function.")
        return {"type": "function", "function": {"name": choice.get("name")}}


def _add(messages: list[dict[str, Any]], item: dict[str, Any], place: str) -> None:
    """Appends one item; calls that follow each other belong to one message of the assistant."""
    kind = item.get("type", "message")
    if kind == "message" and "role" in item:
        content = _written(item.get("content"), f"{place}.content")
        messages.append({"role": item["role"], "content": content})
    elif kind == "function_call":
        function = {"name": _string(item, "name", place)}
        function["arguments"] = _string(item, "arguments", place)
        call = {"id": _string(item, "call_id", place), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _written(item.get("output"), f"{place}.output")
        call_id = _string(item, "call_id", place)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
    else:
        raise UserError(
            f"{place}: items of type {kind!r} are not served; those that are: message (with a "
            "role), function_call, function_call_output."
        )


def _written(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{place}: give text, or a list of parts.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in WRITTEN_PARTS or not isinstance(part.get("text"), str):
            legal = ", ".join(WRITTEN_PARTS)
            raise UserError(f"{place}: parts of type {kind!r} are not served; legal are {legal}.")
        texts.append(part["text"])
    return "".join(texts)


def _string(item: dict[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise UserError(f"{place}.{name}: text is needed here.")
    return value
