"""Tools in chats: how the model is told of them, held to their schemas, and read back.

With `tool_choice` required or naming a function, the answer is decoded under the tools' own JSON
schemas, so that reading it cannot fail unless it was cut off. With "auto" the model may answer in
words or write a call in its template's style; what is no valid call stays words.
"""

import json
import uuid
from dataclasses import dataclass

from internjax.data.chat import encode_prompt, render
from internjax.data.templates import ChatTemplate, Message
from internjax.data.tokenizer import Tokenizer
from internjax.data.tool_calls import parse_tool_calls
from internjax.errors import UserError

OPENERS = {"hermes": "<tool_call>", "internlm2": "<|action_start|>"}

_INTRODUCTION = """You can call these functions, one a line, their arguments as JSON schema:
{tools}
To call a function, answer with nothing but
<tool_call>{{"name": <function>, "arguments": <object>}}</tool_call>"""


@dataclass(frozen=True)
class ToolPlan:
    """What a chat request's `tools` and `tool_choice` come to.

    Fields:
      tools: plain dicts in OpenAI's form, shown to the model; empty without tools.
      grammar: holds the answer to a call; None when it may be words.
      style: how calls are written in free text, a key of `OPENERS`; "" when none is looked for.
    """

    tools: tuple[dict, ...] = ()
    grammar: dict | None = None
    style: str = ""


NO_TOOLS = ToolPlan()


def plan_tools(tools: list[dict] | None, choice: str | dict | None, style: str) -> ToolPlan:
    """Decides how a request's tools are used.

    Args:
      choice: OpenAI's `tool_choice`; None is "auto".
      style: `ChatTemplate.tool_style`; "" falls back to hermes tags, which `prompt_ids` explains.

    Raises:
      UserError: a choice without tools, or of a function that is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise UserError("tool_choice: there are no tools to choose from.")
        return ToolPlan()
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise UserError("tools: two functions have the same name.")
    if choice == "none":
        return ToolPlan()
    if choice in (None, "auto"):
        return ToolPlan(tuple(tools), style=style or "hermes")
    if choice != "required":
        wanted = (choice.get("function") or {}).get("name")
        if wanted not in names:
            raise UserError(f"tool_choice: {choice!r} names none of {', '.join(names)}.")
        allowed = [tool for tool in tools if tool["function"]["name"] == wanted]
    else:
        allowed = tools
    return ToolPlan(tuple(tools), {"json_schema": call_schema(allowed)})


def call_schema(tools: list[dict]) -> dict:
    """Returns the schema of one call, {"name", "arguments"}, of any of the tools."""
    forms, definitions = [], {}
    for tool in tools:
        arguments = tool["function"].get("parameters") or {"type": "object", "properties": {}}
        if arguments.get("type") == "object":
            # Unless the tool says so, arguments that it does not know are no arguments.
            arguments = {"additionalProperties": False, **arguments}
        definitions |= arguments.get("$defs", {})  # references are written from the root
        forms.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": {k: v for k, v in arguments.items() if k != "$defs"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {**schema, "$defs": definitions} if definitions else schema


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


def read_constrained(text: str) -> list[dict]:
    """Reads the call that was decoded under `call_schema`, in OpenAI's form."""
    call = json.loads(text)
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return [_with_id({"function": {"name": call["name"], "arguments": arguments}})]


def read_free(text: str, plan: ToolPlan) -> tuple[str, list[dict]]:
    """Splits a free answer (special tokens shown) into words and calls of known functions."""
    words, calls = parse_tool_calls(text, plan.style)
    names = {tool["function"]["name"] for tool in plan.tools}
    if not calls or any(call["function"]["name"] not in names for call in calls):
        return text, []
    return words, [_with_id(call) for call in calls]


def _with_id(call: dict) -> dict:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", **call}
