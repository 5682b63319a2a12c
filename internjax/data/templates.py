"""The chat formats of published models, written as functions from messages to pieces of text.

A piece is `(text, trained)`: `trained` marks what the model itself writes, its answer and the token
that ends it; None where that cannot be told. Knows nothing of tokens; a stranger's Jinja template
is run by `data.jinja_sandbox`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from internjax.errors import UserError

Message = dict[str, Any]
"""{"role", "content"} and where they apply "name", "tool_calls", "tool_call_id" (OpenAI's form)."""

Piece = tuple[str, bool | None]


@dataclass(frozen=True)
class ChatTemplate:
    """How one family of models writes a chat.

    Attributes:
        name: what configs call it.
        pieces: (messages, add_generation_prompt, tools) -> pieces, in order.
        stop: texts at which an answer ends; none of them is part of it.
        default_system: the system text used when the messages bring none; "" is none.
        tool_style: how a call is written, a key of `tool_calls.STYLES`; "" without tool calls.
        thinks: what an answer holds in `<think>` is handed over apart, as "reasoning_content".
    """

    name: str
    pieces: Callable[[list[Message], bool, list[dict] | None], Iterator[Piece]]
    stop: tuple[str, ...]
    default_system: str = ""
    tool_style: str = ""
    thinks: bool = False


# The system text that the InternLM chat models were released with.
_INTERNLM_SYSTEM = """You are an AI assistant whose name is InternLM (书生·浦语).
- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI \
Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the \
user such as English and 中文."""
_SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_QWEN2_SYSTEM = "You are a helpful assistant."
_QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# Qwen2.5's way of telling a model its tools; the words are part of what the model was trained on.
_TOOLS_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_TOOLS_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def split_system(messages: list[Message], default: str) -> tuple[str, list[Message]]:
    """Returns the system text and the other messages: "" omits it, none at all means `default`."""
    if messages[0]["role"] == "system" and not messages[0].get("name"):
        return messages[0]["content"], messages[1:]
    return default, messages


def to_json(value: Any) -> str:
    """JSON as the templates of Hugging Face models write it."""
    return json.dumps(value, ensure_ascii=False)


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one tool call, which OpenAI's form gives as JSON text."""
    given = call["function"].get("arguments") or {}
    return json.loads(given) if isinstance(given, str) else given


def _internlm_v1_0(messages: list[Message], prompt: bool, tools: list | None) -> Iterator[Piece]:
    yield "<s>", False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "user":
            yield f"<|User|>:{content}<eoh>\n", False
        elif role == "assistant":
            yield "<|Bot|>:", False
            yield f"{content}<eoa>", True
            yield "\n", False
        elif content:
            raise UserError(
                f"The template internlm-v1.0 has no {role} turn; v1.1 has a system one."
            )
    if prompt:
        yield "<|Bot|>:", False


def _internlm_v1_1(messages: list[Message], prompt: bool, tools: list | None) -> Iterator[Piece]:
    yield "<s>", False
    system, messages = split_system(messages, _INTERNLM_SYSTEM)
    if system:
        yield f"<|System|>:{system}\n", False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "user":
            yield f"<|User|>:{content}\n", False
        elif role == "assistant":
            yield "<|Bot|>:", False
            yield f"{content}<eoa>", True
            yield "\n", False
        else:
            raise UserError(f"The template internlm-v1.1 has no {role} turn here.")
    if prompt:
        yield "<|Bot|>:", False


def _internlm2(messages: list[Message], prompt: bool, tools: list | None) -> Iterator[Piece]:
    """Turns as in arXiv:2403.17297 and InternLM's chat format page: tools are system turns with a
    name, their results environment turns with the same name."""
    yield "<s>", False
    system, messages = split_system(messages, _INTERNLM_SYSTEM)
    if system:
        yield from _turn("system", system)
    if tools:
        described = [tool.get("function", tool) for tool in tools]
        yield from _turn("system name=<|plugin|>", to_json(described))
    interpreter_calls: set[str] = set()
    for message in messages:
        role, content = message["role"], message["content"]
        calls = message.get("tool_calls") or []
        interpreter_calls |= {c.get("id") for c in calls if c["function"]["name"] == "interpreter"}
        if role == "assistant":
            body = content + "".join(map(_internlm2_call, calls))
            yield from _turn("assistant", body, trained=True)
        elif role in ("tool", "environment"):
            by_code = message.get("name") == "interpreter" or (
                message.get("tool_call_id") in interpreter_calls
            )
            name = "<|interpreter|>" if by_code else "<|plugin|>"
            yield from _turn(f"environment name={name}", content)
        else:
            yield from _turn(role + _internlm2_name(message.get("name")), content)
    if prompt:
        yield "<|im_start|>assistant\n", False


def _internlm2_name(name: str | None) -> str:
    marked = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>", "file": "file"}
    return f" name={marked[name]}" if name in marked else ""


def _internlm2_call(call: dict[str, Any]) -> str:
    arguments, name = arguments_of(call), call["function"]["name"]
    if name == "interpreter":
        return (
            f"<|action_start|><|interpreter|>\n```python\n{arguments['code']}\n```\n<|action_end|>"
        )
    body = to_json({"name": name, "parameters": arguments})
    return f"<|action_start|><|plugin|>\n{body}<|action_end|>"


def _turn(header: str, body: str, *, trained: bool = False) -> Iterator[Piece]:
    yield f"<|im_start|>{header}\n", False
    yield f"{body}<|im_end|>", trained
    yield "\n", False


def _chatml(default: str, *, thinks: bool = False) -> Callable[..., Iterator[Piece]]:
    """ChatML with `default` as system text; tools and their results as Qwen2.5 writes them.

    With `thinks`, as in Qwen3, answers after the last question show their thoughts, and the very
    last answer always has a place for them; earlier thoughts are left out.
    """

    def pieces(messages: list[Message], prompt: bool, tools: list | None) -> Iterator[Piece]:
        system, messages = split_system(messages, default)
        if tools:
            listed = "".join("\n" + to_json(tool) for tool in tools)
            head = f"{system}\n\n" if system else ""
            system = f"{head}{_TOOLS_HEAD}{listed}{_TOOLS_TAIL}"
        if system:
            yield from _turn("system", system)
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "assistant":
                thought = message.get("reasoning_content") or ""
                shown = thinks and index > asked and (thought or index == len(messages) - 1)
                head = f"<think>\n{thought.strip('\n')}\n</think>\n\n" if shown else ""
                blocks = [content.lstrip("\n") if shown else content] if content else []
                blocks += map(_hermes_call, message.get("tool_calls") or [])
                yield from _turn("assistant", head + "\n".join(blocks), trained=True)
            elif role in ("tool", "environment"):
                yield from _tool_response(messages, index)
            else:
                yield from _turn(role, content)
        if prompt:
            yield "<|im_start|>assistant\n", False

    return pieces


def _hermes_call(call: dict[str, Any]) -> str:
    body = to_json({"name": call["function"]["name"], "arguments": arguments_of(call)})
    return f"<tool_call>\n{body}\n</tool_call>"


def _tool_response(messages: list[Message], index: int) -> Iterator[Piece]:
    """Results that follow each other share one user turn."""

    def is_result(at: int) -> bool:
        return 0 <= at < len(messages) and messages[at]["role"] in ("tool", "environment")

    if not is_result(index - 1):
        yield "<|im_start|>user", False
    yield f"\n<tool_response>\n{messages[index]['content']}\n</tool_response>", False
    if not is_result(index + 1):
        yield "<|im_end|>\n", False


def _llama3(messages: list[Message], prompt: bool, tools: list | None) -> Iterator[Piece]:
    """Llama 3's turns (its model card); tools of 3.1 and later come with the checkpoint's Jinja."""
    if tools:
        raise UserError("The template llama3 lists no tools: use the one in the checkpoint.")
    yield "<|begin_of_text|>", False
    system, messages = split_system(messages, "")
    turns = [{"role": "system", "content": system}, *messages] if system else messages
    for message in turns:
        role = "ipython" if message["role"] in ("tool", "environment") else message["role"]
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", False
        yield f"{message['content'].strip()}<|eot_id|>", role == "assistant"
    if prompt:
        yield "<|start_header_id|>assistant<|end_header_id|>\n\n", False


_END = ("<|im_end|>",)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("internlm-v1.0", _internlm_v1_0, ("<eoa>",)),
        ChatTemplate("internlm-v1.1", _internlm_v1_1, ("<eoa>",), _INTERNLM_SYSTEM),
        ChatTemplate("internlm2", _internlm2, _END, _INTERNLM_SYSTEM, "internlm2"),
        ChatTemplate("chatml", _chatml(""), _END, "", "hermes"),
        ChatTemplate("smollm2", _chatml(_SMOLLM2_SYSTEM), _END, _SMOLLM2_SYSTEM, "hermes"),
        ChatTemplate("qwen2", _chatml(_QWEN2_SYSTEM), _END, _QWEN2_SYSTEM, "hermes"),
        ChatTemplate("qwen2.5", _chatml(_QWEN2_5_SYSTEM), _END, _QWEN2_5_SYSTEM, "hermes"),
        ChatTemplate("qwen3", _chatml("", thinks=True), _END, "", "hermes", True),
        ChatTemplate("llama3", _llama3, ("<|eot_id|>",)),
    )
}

# Published names -> template: the first prefix that fits. Base models have no chat format.
_OF_MODEL = {
    "internlm-chat-7b-v1_1": "internlm-v1.1",
    "internlm-chat-7b-8k": "internlm-v1.1",
    "internlm-chat-20b": "internlm-v1.1",
    "internlm-chat-7b": "internlm-v1.0",
    "internlm2": "internlm2",
    "internlm3": "internlm2",
    "smollm2": "smollm2",
    "qwen2.5": "qwen2.5",
    "qwen2_5": "qwen2.5",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama-3": "llama3",
    "llama3": "llama3",
}


def template_of_model(name: str) -> ChatTemplate | None:
    """The template of a published model name, or None when it is not one of ours."""
    key = name.lower().rpartition("/")[2].removeprefix("meta-")
    return next((TEMPLATES[t] for prefix, t in _OF_MODEL.items() if key.startswith(prefix)), None)
