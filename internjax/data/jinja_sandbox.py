"""Runs a checkpoint's own chat template: Jinja from a stranger, so attributes are closed, values
cannot be changed, and steps, sizes and output are bounded. Knows nothing of tokens.

What templates may use is what Hugging Face `transformers` gives them: `raise_exception`,
`strftime_now`, `tojson`, `break`/`continue` and `{% generation %}` around what the model writes.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from internjax.errors import UserError

MAX_SOURCE = 1 << 18
MAX_STEPS = 1 << 18  # loop turns and calls of one rendering; long chats take some thousands
MAX_LETTERS = 1 << 24  # of any one value and of the output
MAX_WIDTH = 1 << 17  # any number handed to a function: the range() and padding of real templates

# The brackets around what `{% generation %}` encloses: noncharacters of Unicode, which `data.chat`
# keeps out of messages.
GENERATION_START, GENERATION_END = "\ufdee", "\ufdef"

_FILTERS = (
    "capitalize count d default dictsort first float int items join last length list lower map max "
    "min reject rejectattr replace reverse round safe select selectattr sort string sum title trim "
    "unique upper indent tojson"
)

# What a template can raise: its own complaints, and Python's about the values it touches.
_FAILURES = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)
_FAILURES += (RecursionError,)

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


def compile_template(source: str) -> Callable[..., str]:
    """Compiles a template once; the function takes its variables by name and returns the text.

    Raises:
        UserError: here, when it is not valid Jinja; from the function, when it calls
            `raise_exception`, breaks a bound, or fails on these messages.
    """
    if len(source) > MAX_SOURCE:
        raise UserError(f"The chat template has {len(source)} letters; at most {MAX_SOURCE} run.")
    environment = _Sandbox()
    try:
        template = environment.from_string(_with_counted_loops(environment, source))
    except (TemplateError, RecursionError) as error:
        raise UserError(f"The checkpoint's chat template is not valid Jinja: {error}") from error

    def render(**variables: Any) -> str:
        token = _steps_left.set([MAX_STEPS])
        try:
            return _bounded_join(template.generate(variables))
        except _FAILURES as error:
            raise UserError(f"The checkpoint's chat template failed: {error}") from error
        finally:
            _steps_left.reset(token)

    return render


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` puts its content between the two brackets."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclose")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on steps, widths and sizes."""

    concat = staticmethod(lambda parts: _bounded_join(parts))  # of {% set %} blocks and macros
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        loop_controls = "jinja2.ext.loopcontrols"
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loop_controls],
            finalize=_small,
        )
        self.filters = {name: self.filters[name] for name in _FILTERS.split()}
        for name in ("indent", "join", "replace", "string"):
            self.filters[name] = _sized(self.filters[name])
        self.filters["tojson"] = _sized(_to_json)
        self.filters["counted"] = _counted
        self.filters["concatenated"] = _concatenated
        self.globals = {
            "range": range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"operator {operator!r} is closed to templates")
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            raise SecurityError("text cannot be multiplied")
        return _small(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(1)
        owner = getattr(function, "__self__", None)
        return _sized(super().call, owner)(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable | None:
        wrapped = super().wrap_str_format(value)
        # A pattern alone, or a width taken from an argument, can pad to any length.
        if wrapped is not None and re.search(r"\d{4}|:[^}]*\{", value.__self__):
            raise SecurityError("this pattern of str.format is closed to templates")
        return wrapped


def _with_counted_loops(environment: _Sandbox, source: str) -> nodes.Template:
    """Parses; every loop then pays a step for each turn, and `~` looks at the size it makes."""
    tree = _Bounds().visit(environment.parse(source))
    tree.set_environment(environment)
    return tree


class _Bounds(NodeTransformer):
    def visit_For(self, loop: nodes.For) -> nodes.For:
        self.generic_visit(loop)
        if loop.recursive:
            raise TemplateError("recursive loops are closed to templates")
        loop.iter = _filter(loop.iter, "counted")
        return loop

    def visit_Concat(self, concat: nodes.Concat) -> nodes.Filter:
        self.generic_visit(concat)
        return _filter(nodes.List(concat.nodes, lineno=concat.lineno), "concatenated")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(values: Iterable[Any]) -> list[Any]:
    items = list(values)
    _spend(len(items))
    return items


def _spend(steps: int) -> None:
    left = _steps_left.get()
    left[0] -= steps
    if left[0] < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")


def _concatenated(values: list[Any]) -> str:
    return _bounded_join(str(_small(value)) for value in values)


def _sized(function: Callable, owner: Any = None) -> Callable:
    """Refuses arguments that could make a huge value, and a huge value itself."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        values = [_small(value) for value in (owner, *args, *kwargs.values())]
        if any(_is_number(value) and abs(value) > MAX_WIDTH for value in values):
            raise SecurityError(f"a number above {MAX_WIDTH} in a call")
        # The worst a text method does is to put one text between all letters of another.
        texts = sorted((len(value) for value in values if isinstance(value, str)), reverse=True)
        items = max((len(value) for value in values if isinstance(value, list)), default=1)
        if len(texts) > 1 and texts[0] * texts[1] > MAX_LETTERS:
            raise SecurityError("texts too long for a call")
        if texts and texts[0] * items > MAX_LETTERS:
            raise SecurityError("a text too long to stand between the items of a list")
        return _small(function(*args, **kwargs))

    return checked


def _small(value: Any) -> Any:
    """Returns the value when written out it would have at most MAX_LETTERS letters."""
    if _letters(value) > MAX_LETTERS:
        raise SecurityError(f"a value longer than {MAX_LETTERS}")
    if isinstance(value, int) and abs(value) >> 64:
        raise SecurityError("a number of more than 64 bits")
    return value


def _letters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        _spend(1 + len(value) // 16)
        return sum(map(_letters, value))
    return 8


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _bounded_join(parts: Iterable[str]) -> str:
    kept, letters = [], 0
    for part in parts:
        letters += len(part)
        if letters > MAX_LETTERS:
            raise SecurityError(f"its output is longer than {MAX_LETTERS} letters")
        kept.append(part)
    return "".join(kept)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape `<` and `&` for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("tojson indents by at most 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
