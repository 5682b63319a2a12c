"""Tools in chats: how the model is told of them, and the grammar that holds it to them.

Whatever `tool_choice` says, an answer that may contain calls is decoded under a grammar: free words
up to the marker that opens a call, then the call in the form the chat template shows, its arguments
under the tool's own JSON schema. So reading a finished answer (`calls.CallReader`) cannot fail.
JSON is spaced as the template writes calls of the past, which is what the model has learnt, and
what the prefix cache finds again in the next turn.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from internjax.data.chat import encode_prompt, render
from internjax.data.templates import ChatTemplate, Message
from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError
from internjax.serve.grammar import COMPACT, schema_problem
from internjax.serve.json_schema import checked_schema

MAX_CALLS = 16
"""Calls that one answer may make; a small model may repeat itself for ever."""

_COMPACT = {"x-guidance": COMPACT}
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_INTRODUCTION = """You can call these functions, one a line, their arguments as JSON schema:
{tools}
To call a function, answer with nothing but
<tool_call>{{"name": <function>, "arguments": <object>}}</tool_call>"""


@dataclass(frozen=True)
class Style:
    """How a template writes a call: opening markers, {"name", `key`: arguments}, closing marker."""

    opener: tuple[str, ...]
    closer: str
    key: str


STYLES = {
    "hermes": Style(("<tool_call>",), "</tool_call>", "arguments"),
    "internlm2": Style(("<|action_start|>", "<|plugin|>"), "<|action_end|>", "parameters"),
}


@dataclass(frozen=True)
class ToolPlan:
    """What a chat request's `tools` and `tool_choice` come to.

    Fields:
      tools: plain dicts in OpenAI's form, shown to the model; empty without tools.
      grammar: holds the answer; None when no call may be made.
      style: how calls are written; None when none may be made.
      anywhere: whether words may stand before the first call.
      markers: whether some marker is a special token, which the text then has to show.
    """

    tools: tuple[dict, ...] = ()
    grammar: dict | None = None
    style: Style | None = None
    anywhere: bool = False
    markers: bool = False


NO_TOOLS = ToolPlan()


def plan_tools(
    tools: list[dict] | None,
    choice: str | dict | None,
    style: str,
    *,
    tokenizer: Tokenizer,
    parallel: bool = True,
    asked: dict | None = None,
) -> ToolPlan:
    """Decides how a request's tools are used.

    Args:
      choice: OpenAI's `tool_choice`; None is "auto".
      style: `ChatTemplate.tool_style`; "" falls back to hermes tags, which `prompt_ids` explains.
      parallel: whether an answer may make several calls; a named function is called once.
      asked: a grammar for answers in words; calls remain possible under "auto".

    Raises:
      UserError: a choice without tools, or of a function that is not there, or a schema that
        cannot be enforced.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise UserError("tool_choice: there are no tools to choose from.")
        return NO_TOOLS
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise UserError("tools: two functions have the same name.")
    if choice == "none":
        return NO_TOOLS
    mode, allowed = _allowed(names, choice)
    if asked and mode != "auto":
        raise UserError("the answer cannot be held to a tool call and to another format at once.")
    written = STYLES[style or "hermes"]
    calls = 1 if mode == "named" or not parallel else MAX_CALLS
    schemas = {
        tool["function"]["name"]: _arguments(tool["function"].get("parameters"), index)
        for index, tool in enumerate(tools)
    }
    lark = _lark({name: schemas[name] for name in allowed}, written, tokenizer, calls)
    lark += _start(mode, asked, written, tokenizer)
    marks = (*written.opener, written.closer)
    return ToolPlan(
        tuple(tools),
        {"lark": lark},
        written,
        anywhere=mode == "auto" and not asked,
        markers=any(_is_special(mark, tokenizer) for mark in marks),
    )


def _allowed(names: Sequence[str], choice: str | dict | None) -> tuple[str, list[str]]:
    """Returns "auto", "required" or "named", and the functions that may be called."""
    if choice in (None, "auto", "required"):
        return choice or "auto", list(names)
    if not isinstance(choice, dict):
        raise UserError(f"tool_choice: {choice!r} is none of none, auto, required or an object.")
    if choice.get("type") == "allowed_tools":
        given = choice.get("allowed_tools") or {}
        mode, listed = given.get("mode"), given.get("tools") or []
        if mode not in ("auto", "required"):
            raise UserError(f"tool_choice: mode {mode!r} of allowed_tools is not auto or required.")
        wanted = [_function_name(tool) for tool in listed]
    else:
        mode, wanted = "named", [_function_name(choice)]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise UserError(f"tool_choice: {choice!r} names none of {', '.join(names)}.")
    return mode, [name for name in names if name in wanted]


def _function_name(choice: dict) -> str | None:
    return (choice.get("function") or {}).get("name")


def _arguments(parameters: dict | None, index: int) -> str:
    """Returns the JSON schema of one tool's arguments as text, checked."""
    try:
        return _checked(json.dumps(parameters), f"tools/{index}/function/parameters ")
    except RecursionError as error:
        raise UserError(f"tools/{index}: its parameters are nested too deeply.") from error


@functools.lru_cache(maxsize=256)
def _checked(parameters: str, place: str) -> str:
    schema = json.loads(parameters) or {"type": "object", "properties": {}}
    clean = checked_schema(schema, place, schema_problem)
    if clean.setdefault("type", "object") != "object":
        raise UserError(f"{place}#/type: arguments are an object, not {clean['type']!r}.")
    # Unless the tool says so, arguments that it does not know are no arguments.
    clean = {"additionalProperties": False, **clean} if _closes(clean) else clean
    return json.dumps({"x-guidance": SPACED, **clean}, ensure_ascii=False)


def _closes(schema: dict) -> bool:
    """Whether the properties are all listed in one place: elsewhere they may be in a branch."""
    return not {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"} & set(schema)


def _lark(schemas: dict[str, str], style: Style, tokenizer: Tokenizer, calls: int) -> str:
    """Returns the rules `calls`, one call or several, and what they are made of."""
    rules = [
        f'calls: call ("\\n"? open call){{0,{calls - 1}}}' if calls > 1 else "calls: call",
        f"open: {_opener(style, tokenizer)}",
        f'call: "\\n"? form "\\n"? {_mark(style.closer, tokenizer)}',
        "form: " + " | ".join(f"form_{index}" for index in range(len(schemas))),
    ]
    for index, (name, schema) in enumerate(schemas.items()):
        begin = f'{{"name": {json.dumps(name)}, {json.dumps(style.key)}: '
        rules.append(f"form_{index}: {_quoted(begin)} %json {schema} {_quoted('}')}")
    return "\n".join(rules) + "\n"


def _opener(style: Style, tokenizer: Tokenizer) -> str:
    return " ".join(_mark(name, tokenizer) for name in style.opener)


def _start(mode: str, asked: dict | None, style: Style, tokenizer: Tokenizer) -> str:
    """Returns the rules in front of `calls`: words, a format, or nothing."""
    if mode != "auto":
        return "start: open calls\n"
    if asked:
        ((kind, value),) = asked.items()
        if kind != "json_schema":
            raise UserError(f"tools with a grammar of kind {kind} are not served: json_schema is.")
        schema = checked_schema(value, "json_schema ", schema_problem)
        return f"start: open calls | answer\nanswer: %json {json.dumps(schema | _COMPACT)}\n"
    # An opener of letters ends the words at its last letter; a special token is no part of words.
    words = f"WORDS {_opener(style, tokenizer)}"
    rule = "words: " if _is_special(style.opener[0], tokenizer) else "words[lazy]: "
    return f"start: WORDS | words calls\nWORDS: /(.|\\n)*/\n{rule}{words}\n"


def _is_special(name: str, tokenizer: Tokenizer) -> bool:
    return name in tokenizer.special_tokens


def _mark(name: str, tokenizer: Tokenizer) -> str:
    """A marker in Lark: one special token of the vocabulary where there is one, else letters."""
    index = tokenizer.special_tokens.get(name)
    return _quoted(name) if index is None else f"<[{index}]>"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def prompt_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message], tools: tuple[dict, ...]
) -> list[int]:
    """Returns the ids of a chat up to where the answer begins.

    A template that has no words for tools gets them as system text, calls and results as tags.
    """
    listed = list(tools) or None
    if _knows_tools(template, listed) or not (listed or any(map(_is_of_tools, messages))):
        return encode_prompt(tokenizer, template, messages, tools=listed)
    return encode_prompt(tokenizer, template, _spell_out(messages, listed))


def _knows_tools(template: ChatTemplate, tools: list[dict] | None) -> bool:
    if template.tool_style:
        return True
    probe = [{"role": "user", "content": "?"}]
    return tools is not None and render(template, probe, tools=tools) != render(template, probe)


def _is_of_tools(message: Message) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _spell_out(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    plain = []
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "tool":
            plain.append({"role": "user", "content": f"<tool_response>{content}</tool_response>"})
        elif message.get("tool_calls"):
            calls = "".join(map(_spell_call, message["tool_calls"]))
            plain.append({"role": "assistant", "content": f"{content}{calls}"})
        else:
            plain.append(message)
    if tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = _INTRODUCTION.format(tools=lines)
        if plain and plain[0].get("role") == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _spell_call(call: dict) -> str:
    try:
        function = call["function"]
        form = {"name": function["name"], "arguments": json.loads(function["arguments"] or "{}")}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"messages: a tool call is not in OpenAI's form ({error!r}).") from error
    return f"<tool_call>{json.dumps(form, ensure_ascii=False)}</tool_call>"
