"""Tools: a function with a name, a description and a JSON schema of its arguments.

The schema comes from type hints and docstring, so the function is its own documentation; it is what
the model is shown, what its calls are decoded under, and what they are checked against.
"""

import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from internjax.errors import Missing, UserError


class ToolError(ValueError):
    """Something the model did wrong and can repair: its text goes back to the model.

    Any other exception of a tool is a defect of the tool and ends the run.
    """


@dataclass(frozen=True)
class Example:
    """One right use of a tool, shown to models that learn from examples.

    Attributes:
        question: what was asked.
        arguments: of the call that answers it.
        result: what the tool returns for them (a test holds this true).
        answer: what to say then.
        thought: why this tool, where a policy lets the model think; "" says nothing but its name.
    """

    question: str
    arguments: dict[str, Any]
    result: str
    answer: str
    thought: str = ""


@dataclass(frozen=True)
class Tool:
    """What an agent may call.

    Attributes:
        name: letters, digits, underscore and dash, as OpenAI's API asks.
        description: one or two sentences for the model.
        parameters: JSON schema of an object.
        call: takes the arguments as a dict, returns text; raises `ToolError`.
        examples: see `Example`.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any]], str]
    examples: tuple[Example, ...] = ()

    def as_openai(self) -> dict[str, Any]:
        """The tool in the form of OpenAI's `tools` parameter."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


def tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    constraints: dict[str, dict[str, Any]] | None = None,
    examples: tuple[Example, ...] = (),
) -> Tool:
    """Makes a tool of a function with type hints and a docstring.

    Args:
        function: every parameter annotated; what it returns is shown to the model with `str`.
        name: default: the function's.
        description: default: the docstring's first paragraph.
        constraints: of a parameter, in pydantic's words, e.g. {"text": {"pattern": "^[a-z]+$"}};
            the same can be said in an annotation, Annotated[str, Field(pattern=...)].
        examples: for models that learn from examples.

    Raises:
        UserError: a parameter without annotation, `*args` or `**kwargs`, or no description.
    """
    try:
        from pydantic import ValidationError
    except ModuleNotFoundError as error:
        raise Missing("Tools need pydantic: pip install 'internjax[agents]'") from error

    name = name or function.__name__
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise UserError(f"Tool name {name!r}: use 1 to 64 letters, digits, '_' or '-'.")
    text = inspect.getdoc(function) or ""
    description = description or " ".join(text.split("\n\n")[0].split())
    if not description:
        raise UserError(f"Tool {name}: the function needs a docstring that tells what it does.")
    model = _arguments_model(name, function, text, constraints or {})

    def call(arguments: dict[str, Any]) -> str:
        try:
            checked = model.model_validate(arguments)
        except ValidationError as error:
            problems = (f"{_path(e['loc'])}: {e['msg']}" for e in error.errors(include_url=False))
            raise ToolError(f"Wrong arguments for {name}: {'; '.join(problems)}.") from error
        return str(function(**{key: getattr(checked, key) for key in model.model_fields}))

    schema = _without_titles(model.model_json_schema())
    return Tool(name, description, schema, call, examples)


def toolbox(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        UserError: two tools of the same name, or none at all.
    """
    box: dict[str, Tool] = {}
    for each in tools:
        if each.name in box:
            raise UserError(f"Two tools are named {each.name!r}: rename one with tool(name=...).")
        box[each.name] = each
    if not box:
        raise UserError("An agent needs at least one tool.")
    return box


def use(box: dict[str, Tool], name: str, arguments: str) -> str:
    """Carries out a call as a model wrote it.

    Args:
        arguments: JSON text.

    Raises:
        ToolError: no such tool, no JSON, wrong arguments, or the tool's own complaint.
    """
    if name not in box:
        raise ToolError(f"There is no tool {name!r}; the tools are {', '.join(box)}.")
    try:
        given = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ToolError(f"The arguments for {name} are not JSON ({error}).") from error
    if not isinstance(given, dict):
        raise ToolError(f"The arguments for {name} must be a JSON object.")
    return box[name].call(given)


def _arguments_model(name: str, function: Callable[..., Any], text: str, constraints: dict):
    """A pydantic model with one field a parameter; unknown arguments are refused."""
    from pydantic import ConfigDict, Field, create_model

    hints = typing.get_type_hints(function, include_extras=True)
    said = _parameter_docs(text)
    fields = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(f"Tool {name}: *{parameter.name} has no schema; name each parameter.")
        if parameter.name not in hints:
            raise UserError(f"Tool {name}: parameter {parameter.name!r} needs a type annotation.")
        default = ... if parameter.default is parameter.empty else parameter.default
        limits = constraints.get(parameter.name, {})
        described = Field(default, description=said.get(parameter.name), **limits)
        fields[parameter.name] = (hints[parameter.name], described)
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _parameter_docs(text: str) -> dict[str, str]:
    """The `name: words` entries below "Args:" in a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    if not section:
        return {}
    body = inspect.cleandoc("\n" + section[1])
    entries = re.findall(r"^(\w+):\s*((?:.*)(?:\n[ \t]+.*)*)", body, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def _without_titles(schema: Any) -> Any:
    """Drops pydantic's titles, which repeat names and cost a small model's attention."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return {
        k: {n: _without_titles(s) for n, s in v.items()}
        if k in ("properties", "$defs")
        else _without_titles(v)
        for k, v in kept.items()
    }


def _path(location: tuple) -> str:
    return ".".join(map(str, location)) or "arguments"
