"""Chat data from jsonl or json files in the three public forms, as lists of messages.

alpaca: instruction, input, output, optional system and history; sharegpt: conversations of from and
value; openai: messages (or the bare list) of role and content. Everything is checked: the first
fault raises as `file:line:field: message` (for a json array, the line is the row's number).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internjax.errors import Corrupt, Missing, UserError

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
FORMS = ("alpaca", "sharegpt", "openai")


class _Fault(ValueError):
    """A field and what is wrong with it."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field, self.message = field, message


def read_chats(
    path: Path, *, form: str = "auto", on_fault: Callable[[str], None] | None = None
) -> list[Messages]:
    """Reads all conversations of a .jsonl or .json file.

    Args:
      form: alpaca, sharegpt, openai, or auto: each row by the keys it has.
      on_fault: told of each row that is not a conversation, which is then left out.

    Raises:
      Missing: no such file. Corrupt: a row is not a conversation, with file, line and field.
    """
    if form not in ("auto", *FORMS):
        raise UserError(f"no form {form!r} of chat data: legal are auto, {', '.join(FORMS)}.")
    path = Path(path)
    chats = []
    for line, row in _rows(path):
        try:
            messages = CONVERT[_form_of(row) if form == "auto" else form](row)
            check_messages(messages)
        except _Fault as fault:
            said = f"{path.name}:{line}:{fault.field}: {fault.message}"
            if on_fault is None:
                raise Corrupt(said) from None
            on_fault(said)
            continue
        chats.append(messages)
    if not chats:
        raise Corrupt(f"{path.name}:1:-: the file holds no conversation")
    return chats


def check_messages(messages: Messages) -> None:
    """Checks roles, contents and order: system first only, an assistant answer somewhere after."""
    if not messages:
        raise _Fault("messages", "is empty")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message["role"] not in ROLES:
            raise _Fault(f"{where}.role", f"{message['role']!r} is none of {', '.join(ROLES)}")
        if message["role"] == "system" and i:
            raise _Fault(f"{where}.role", "system may only be the first message")
        if message["role"] == "user" and not message["content"].strip():
            raise _Fault(f"{where}.content", "is empty")
        if message["role"] == "assistant" and not (
            message["content"].strip() or message.get("tool_calls")
        ):
            raise _Fault(f"{where}.content", "is empty: nothing to learn")
    first = messages[1 if messages[0]["role"] == "system" else 0 :][:1]
    if not first or first[0]["role"] != "user":
        raise _Fault("messages", "do not start with a user message")
    if not any(m["role"] == "assistant" for m in messages):
        raise _Fault("messages", "hold no assistant message")


def from_alpaca(row: dict) -> Messages:
    """Converts instruction, input, output, system, history."""
    _only(row, ("instruction", "input", "output", "system", "history", "id"))
    messages = [{"role": "system", "content": s}] if (s := _text(row, "system", "")) else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise _Fault("history", "is not a list of [question, answer]")
    for i, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        ):
            raise _Fault(f"history[{i}]", "is not [question, answer]")
        messages += _turn(*pair)
    question, more = _text(row, "instruction"), _text(row, "input", "")
    return messages + _turn(f"{question}\n{more}" if more else question, _text(row, "output"))


def from_sharegpt(row: dict) -> Messages:
    """Converts conversations of from and value, with an optional system text.

    `function_call` values become tool calls of the assistant, `observation` values tool answers.
    """
    turns = _list(row, "conversations")
    messages = [{"role": "system", "content": s}] if (s := _text(row, "system", "")) else []
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise _Fault(where, "is not an object")
        speaker, value = _text(turn, "from", where=where), _text(turn, "value", where=where)
        if speaker not in SHAREGPT_ROLES:
            legal = ", ".join(SHAREGPT_ROLES)
            raise _Fault(f"{where}.from", f"{speaker!r} is none of {legal}")
        message = {"role": SHAREGPT_ROLES[speaker], "content": value}
        if speaker == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls(value, where)}
        messages.append(message)
    return messages


def from_openai(row: dict | list) -> Messages:
    """Converts OpenAI messages; content may be a list of text parts."""
    rows = row if isinstance(row, list) else _list(row, "messages")
    messages = []
    for i, given in enumerate(rows):
        where = f"messages[{i}]"
        if not isinstance(given, dict):
            raise _Fault(where, "is not an object")
        message = {"role": _text(given, "role", where=where)}
        content = given.get("content")
        if content is None and given.get("tool_calls"):
            content = ""
        message["content"] = _content(content, f"{where}.content")
        for key, kind in (("name", str), ("tool_call_id", str), ("tool_calls", list)):
            if given.get(key) is not None:
                if not isinstance(given[key], kind):
                    raise _Fault(f"{where}.{key}", f"is not a {kind.__name__}")
                message[key] = given[key]
        messages.append(message)
    return messages


CONVERT = {"alpaca": from_alpaca, "sharegpt": from_sharegpt, "openai": from_openai}


def _form_of(row: Any) -> str:
    if isinstance(row, list):
        return "openai"
    if isinstance(row, dict):
        for key, form in (
            ("messages", "openai"),
            ("conversations", "sharegpt"),
            ("instruction", "alpaca"),
        ):
            if key in row:
                return form
    raise _Fault("-", "has none of the keys messages, conversations, instruction")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, row); a .json file is one array and counts rows."""
    if not path.is_file():
        raise Missing(f"{path} is not there: give a .jsonl or .json file of conversations.")
    data = path.read_bytes()
    if path.suffix == ".json":
        rows = _parse(path, 1, data)
        if not isinstance(rows, list):
            raise Corrupt(f"{path.name}:1:-: is not a JSON array of rows")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield number, _parse(path, number, line)


def _parse(path: Path, line: int, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path.name}:{line}:-: is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise Corrupt(f"{path.name}:{line}:-: is not JSON: {error.msg} at {at}") from None


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _only(row: Any, legal: tuple[str, ...]) -> None:
    if not isinstance(row, dict):
        raise _Fault("-", "is not an object")
    if unknown := [key for key in row if key not in legal]:
        raise _Fault(unknown[0], f"is no field of this form; fields are {', '.join(legal)}")


def _text(row: Any, key: str, default: str | None = None, where: str = "") -> str:
    path = f"{where}.{key}" if where else key
    if not isinstance(row, dict):
        raise _Fault(where or "-", "is not an object")
    value = row.get(key, default)
    if value is None:
        raise _Fault(path, "is missing")
    if not isinstance(value, str):
        raise _Fault(path, f"is {type(value).__name__}, not a string")
    return value


def _list(row: Any, key: str) -> list:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, list):
        raise _Fault(key, "is missing" if value is None else "is not a list")
    return value


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _Fault(where, "is missing" if value is None else "is not a string or list of parts")
    for i, part in enumerate(value):
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise _Fault(f"{where}[{i}]", "is not a text part; only text can be used here")
    return "".join(part["text"] for part in value)


def _calls(value: str, where: str) -> list[dict]:
    """Turns a function_call value (JSON object or list of name, arguments) into tool calls."""
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise _Fault(f"{where}.value", f"is not a JSON function call: {error.msg}") from None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            raise _Fault(f"{where}.value", "a function call has no name")
    return [
        {
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": a
                if isinstance(a := call.get("arguments", {}), str)
                else json.dumps(a, ensure_ascii=False),
            },
        }
        for call in calls
    ]
