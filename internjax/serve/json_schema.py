"""Which JSON schemas an answer can be held to; everything else is refused with its place.

A keyword is enforced, or says nothing about validity, or the schema is refused: a schema that is
half obeyed looks like one that is obeyed. Places are JSON pointers, "#/properties/tags/uniqueItems"
(RFC 6901). The keywords are those of JSON Schema 2020-12, with the older `definitions`,
`additionalItems` and lists under `items`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from internjax.errors import UserError

ENFORCED = frozenset((
    "type", "enum", "const",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "format",
    "items", "prefixItems", "additionalItems", "minItems", "maxItems",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "anyOf", "oneOf", "allOf",
    "$ref", "$defs", "definitions", "$anchor", "$id", "$schema",
))  # fmt: skip
ANNOTATIONS = frozenset((
    "title", "description", "default", "example", "examples", "deprecated", "readOnly",
    "writeOnly", "$comment", "discriminator",
))  # fmt: skip
"""Keywords that decide nothing about validity; extensions beginning with "x-" are none either."""

_NEUTRAL = {"uniqueItems": False, "nullable": False, "minContains": 0}
"""Keywords that cannot be enforced, with the value at which there is nothing to enforce."""
_HINTS = {
    "nullable": 'write "type": [..., "null"] instead',
    "x-guidance": "it would change how the schema is enforced",
}
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")
MAX_DEPTH = 64
"""Schemas within schemas that are followed."""


def checked_schema(schema: Any, place: str, problem: Callable[[dict], str]) -> dict:
    """Returns a schema without what says nothing; raises `UserError` with the place of a trouble.

    Args:
      place: what stands before the pointer in messages, such as "json_schema ".
      problem: compiles a schema; returns what is wrong with it, or "".
    """
    _check(schema, place + "#", 0)
    clean = _clean(schema)
    wrong = problem(clean)
    if wrong:
        raise UserError(f"{place}{_locate(clean, wrong, problem)}: {wrong}")
    return clean


def _check(schema: Any, place: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UserError(f"{place}: schemas are nested deeper than {MAX_DEPTH}.")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{place}: a schema is an object or a boolean, not {schema!r:.60}.")
    for key, value in schema.items():
        extension = key.startswith("x-") and key not in _HINTS
        if key in ENFORCED or key in ANNOTATIONS or extension:
            continue
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        hint = f" ({_HINTS[key]})" if key in _HINTS else ""
        raise UserError(f"{place}/{_escape(key)}: this keyword cannot be enforced{hint}.")
    if "format" in schema and not _may_be_string(schema.get("type")):
        raise UserError(
            f"{place}/format: formats are enforced for strings, and this is {schema['type']!r}; "
            "give minimum and maximum for numbers."
        )
    for pointer, inner in _children(schema):
        _check(inner, place + pointer, depth + 1)


def _may_be_string(kinds: Any) -> bool:
    return kinds is None or "string" in ([kinds] if isinstance(kinds, str) else kinds)


def _children(schema: dict) -> Iterator[tuple[str, Any]]:
    """Yields the schemas directly inside one, with their pointers from it."""
    for key in _OF_SCHEMAS:
        if isinstance(schema.get(key), dict):
            for name, inner in schema[key].items():
                yield f"/{key}/{_escape(name)}", inner
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for index, inner in enumerate(schema[key]):
                yield f"/{key}/{index}", inner
    for key in _SINGLE:
        if isinstance(schema.get(key), (dict, bool)):
            yield f"/{key}", schema[key]


def _clean(schema: Any) -> Any:
    """Drops annotations and neutral keywords; a boolean at the root becomes an object."""

    def inside(key: str, value: Any) -> Any:
        if key in _OF_SCHEMAS and isinstance(value, dict):
            return {name: walk(inner) for name, inner in value.items()}
        if key in _LISTS and isinstance(value, list):
            return [walk(inner) for inner in value]
        return walk(value) if key in _SINGLE else value

    def walk(inner: Any) -> Any:
        if not isinstance(inner, dict):
            return inner
        return {key: inside(key, value) for key, value in inner.items() if key in ENFORCED}

    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    return walk(schema)


def _locate(schema: dict, wrong: str, problem: Callable[[dict], str]) -> str:
    """Returns the pointer of the innermost schema that has the same trouble by itself."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def descend(inner: dict, pointer: str) -> str:
        for step, child in _children(inner):
            # References are written from the root: the definitions come along.
            if isinstance(child, dict) and problem({**shared, **child}) == wrong:
                return descend(child, pointer + step)
        return pointer

    return descend(schema, "#")


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
