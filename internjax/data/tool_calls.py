"""Reads the tool calls out of what a model wrote, in the style its template taught it."""

import json
import re
from typing import Any

from internjax.errors import UserError

_PATTERNS = {
    "internlm2": re.compile(
        r"<\|action_start\|>\s*<\|(?P<kind>plugin|interpreter)\|>(?P<body>.*?)(?:<\|action_end\|>|\Z)",
        re.DOTALL,
    ),
    "hermes": re.compile(r"<tool_call>(?P<body>.*?)(?:</tool_call>|\Z)", re.DOTALL),
}
STYLES = tuple(_PATTERNS)
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)


def parse_tool_calls(text: str, style: str) -> tuple[str, list[dict[str, Any]]]:
    """Splits an answer into its words and its calls.

    A call that is not valid JSON of the expected form stays in the words, so nothing is lost.

    Args:
        text: decoded with its special tokens, for the `internlm2` style consists of them.
        style: `ChatTemplate.tool_style`.

    Returns:
        The words, and the calls as OpenAI's `{"type", "function": {"name", "arguments"}}` with
        arguments as JSON text; the caller gives them ids.
    """
    if style not in _PATTERNS:
        raise UserError(f"No tool calls are known in style {style!r}; known: {', '.join(STYLES)}.")
    calls: list[dict[str, Any]] = []

    def take(found: re.Match) -> str:
        call = _read_call(found.groupdict())
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    words = _PATTERNS[style].sub(take, text).strip()
    return words, calls


def _read_call(found: dict[str, str]) -> dict[str, Any] | None:
    if found.get("kind") == "interpreter":
        fenced = _FENCE.fullmatch(found["body"])
        return _call("interpreter", {"code": fenced[1]}) if fenced else None
    try:
        given = json.loads(found["body"])
    except json.JSONDecodeError:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = given.get("arguments", given.get("parameters", {}))
    return _call(given["name"], arguments) if isinstance(arguments, dict) else None


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": name, "arguments": text}}
