"""Chats to text and to token ids, with a mask of what the model itself writes.

Text inside messages is never read as markup: before a template runs, every marker that a message
contains is broken up with a letter that no message holds, and mended after the template's own
markers have become ids. So a user who types `<|im_end|>` has typed ten letters, not ended the turn.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internjax.data.jinja_sandbox import GENERATION_END, GENERATION_START, compile_template
from internjax.data.special_tokens import END_OF_TURN
from internjax.data.templates import (
    TEMPLATES,
    ChatTemplate,
    Message,
    Piece,
    template_of_model,
)
from internjax.data.tokenizer import Tokenizer, check_text, load_tokenizer
from internjax.errors import Missing, UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "environment")
_BREAK = "\ufdd0"  # a noncharacter: Unicode keeps it out of exchanged text, `_clean` out of ours
_THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
_RESERVED = str.maketrans("", "", _BREAK + GENERATION_START + GENERATION_END)


def render(
    template: ChatTemplate,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict] | None = None,
) -> str:
    """Returns the chat as text; with `add_generation_prompt` it ends where the answer begins."""
    messages = _clean_messages(messages, template.thinks)
    pieces = template.pieces(messages, add_generation_prompt, tools)
    return "".join(text for text, _ in pieces)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict] | None = None,
) -> tuple[list[int], list[int]]:
    """Returns ids and loss mask: 1 on each assistant answer and the token that ends it, else 0.

    Text is cut where an answer begins, so the ids before it are those of the prompt at generation.

    Raises:
        UserError: a message is malformed, or a Jinja template hides where an answer stands.
    """
    protect = _protector(tokenizer)
    messages = protect(_clean_messages(messages, template.thinks))
    pieces = template.pieces(messages, add_generation_prompt, protect(tools))
    ids: list[int] = []
    mask: list[int] = []
    for text, trained in _joined(pieces):
        if trained is None and not add_generation_prompt:
            raise UserError(
                f"The chat template {template.name} rewrites answers when more follows, so it "
                "cannot be told which ids to train: name a template instead, one of "
                f"{', '.join(TEMPLATES)}."
            )
        new = _encode_piece(tokenizer, text, ids)
        ids += new
        mask += [int(trained or 0)] * len(new)
    return ids, mask


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[Message],
    *,
    tools: list[dict] | None = None,
) -> list[int]:
    """Returns the ids after which the model writes its next answer."""
    return encode_chat(tokenizer, template, messages, add_generation_prompt=True, tools=tools)[0]


def template_for(name_or_path: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """Finds the template of a name in `TEMPLATES`, of a published model name, or of a checkpoint.

    A `.jinja` file, or the template inside a folder or GGUF, is run in a sandbox. Pass the
    `tokenizer` when it is already loaded. A checkpoint without a template of its own gets that of
    its name; a base model gets one that says, when used, that there is none.

    Raises:
        Missing: it is neither a name nor a path.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if path.exists():
        if path.suffix == ".jinja":
            return jinja_template(path.read_text(encoding="utf-8"), tokenizer, name=path.stem)
        tokenizer = tokenizer or load_tokenizer(path)
        if tokenizer.chat_template is not None:
            return jinja_template(tokenizer.chat_template, tokenizer, name="jinja")
        return template_of_model(path.name) or _NO_TEMPLATE
    if found := template_of_model(name):
        return found
    raise Missing(
        f"No chat template for {name!r}: name one of {', '.join(TEMPLATES)}, "
        "or give a checkpoint that brings its own."
    )


def _refuse(messages: list[Message], prompt: bool, tools: list[dict] | None) -> Iterator[Piece]:
    raise UserError(
        "This model brings no chat template (a base model?): complete plain text with it, or name "
        f"a template, one of {', '.join(TEMPLATES)}."
    )


_NO_TEMPLATE = ChatTemplate("none", _refuse, ())


def jinja_template(source: str, tokenizer: Tokenizer | None, *, name: str) -> ChatTemplate:
    """Wraps a checkpoint's own Jinja template.

    What is trained is what stands in `{% generation %}`; a template without that tag is rendered up
    to each answer and through it, and the difference, up to its end token, is trained.
    """
    run = compile_template(source)
    fixed = _token_texts(tokenizer)
    ends = [end for end in END_OF_TURN if end in source or end == fixed.get("eos_token")]

    def text_of(messages: list[Message], prompt: bool, tools: list[dict] | None) -> str:
        return run(messages=messages, tools=tools, add_generation_prompt=prompt, **fixed)

    def pieces(messages: list[Message], prompt: bool, tools: list[dict] | None) -> Iterator[Piece]:
        text = text_of(messages, prompt, tools)
        if GENERATION_START in text:
            yield from _tagged(text)
        else:
            yield from _differences(lambda m, p: text_of(m, p, tools), text, messages, ends)

    return ChatTemplate(name, pieces, tuple(ends), thinks="reasoning_content" in source)


def _token_texts(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {
        f"{role}_token": tokenizer.token_bytes(index).decode()
        for role, index in ids.items()
        if index is not None
    }


def _tagged(text: str) -> Iterator[Piece]:
    for part in re.split(f"({GENERATION_START}[^{GENERATION_END}]*{GENERATION_END})", text):
        yield part.strip(GENERATION_START + GENERATION_END), part.startswith(GENERATION_START)


def _differences(
    text_of: Callable[[list[Message], bool], str],
    text: str,
    messages: list[Message],
    ends: list[str],
) -> Iterator[Piece]:
    """Cuts `text` at the answers, each found between the rendering before it and after it."""
    at = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(messages[:index], True), text_of(messages[: index + 1], False)
        if not (text.startswith(after) and after.startswith(before)):
            yield text[at:], None  # it rewrites earlier turns, as many reasoning models' do
            return
        answer = after[len(before) :]
        stops = [answer.rfind(end) + len(end) for end in ends if end in answer]
        stop = len(before) + max(stops, default=len(answer))
        yield text[at : len(before)], False
        yield text[len(before) : stop], True
        at = stop
    yield text[at:], False


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Joins neighbours alike in `trained`, so that cuts of the template never cut tokens."""
    kept, state = "", False
    for text, trained in pieces:
        if trained != state and text:
            if kept:
                yield kept, state
            kept, state = "", trained
        kept += text
    if kept:
        yield kept, state


def _encode_piece(tokenizer: Tokenizer, text: str, before: list[int]) -> list[int]:
    check_text(text)
    ids: list[int] = []
    after_special = bool(before) and tokenizer.is_special(before[-1])
    at_start = not before
    for part in tokenizer.split(text):
        if isinstance(part, int):
            ids.append(part)
        else:
            prefix = at_start or (after_special and tokenizer.engine.prefix_after_special)
            ids += tokenizer.engine.encode(part.replace(_BREAK, ""), prefix=prefix)
        after_special, at_start = isinstance(part, int), False
    return ids


@functools.lru_cache(maxsize=8)
def _protector(tokenizer: Tokenizer) -> Callable[[Any], Any]:
    """Returns a function that breaks up every marker in the texts of a JSON-like value."""
    names = sorted((n for n in tokenizer.special_tokens if len(n) > 1), key=len, reverse=True)
    markers = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def protect(value: Any) -> Any:
        if isinstance(value, str):
            return markers.sub(lambda found: _BREAK.join(found[0]) + _BREAK, value)
        if isinstance(value, dict):
            return {protect(key): protect(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [protect(each) for each in value]
        return value

    return protect


def _clean_messages(messages: list[Message], thinks: bool) -> list[Message]:
    """Checks messages and brings content to text: None is "", text parts are joined."""
    if not messages:
        raise UserError("A chat needs at least one message.")
    cleaned = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"Message {index} has role {role!r}; legal are {', '.join(ROLES)}.")
        role = "system" if role == "developer" else role
        message = _clean({**message, "role": role, "content": _text(message, index)})
        thought = _THOUGHT.match(message["content"]) if thinks and role == "assistant" else None
        if thought:
            message |= {"reasoning_content": thought[1], "content": thought[2]}
        cleaned.append(message)
    return cleaned


def _text(message: Message, index: int) -> str:
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise UserError(f"Message {index} has parts that are not text; this model reads text.")
        return "".join(part["text"] for part in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise UserError(f"Message {index} has content of type {type(content).__name__}; text is legal.")


def _clean(value: Any) -> Any:
    """Drops the three noncharacters that this module uses as its own marks."""
    if isinstance(value, str):
        return value.translate(_RESERVED)
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    return value
