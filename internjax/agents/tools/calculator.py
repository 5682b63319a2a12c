"""A calculator: arithmetic only, exact where numbers are exact, bounded in size and time.

It walks the syntax tree itself and knows numbers, operators and a handful of functions; there is no
name, attribute, index or string in its language, so there is nothing to escape through.
"""

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction

from internjax.agents.tool import Example, Tool, ToolError, tool

Number = int | float | Fraction

MAX_CHARS = 500
MAX_BITS = 4096
"""Of any exact number on the way, about 1,200 digits: it bounds the time of every operation."""

_BINARY: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, tuple[Callable, range]] = {
    "abs": (abs, range(1, 2)),
    "round": (round, range(1, 3)),
    "floor": (math.floor, range(1, 2)),
    "ceil": (math.ceil, range(1, 2)),
    "sqrt": (lambda x: _root(x), range(1, 2)),
    "min": (min, range(1, 100)),
    "max": (max, range(1, 100)),
    "gcd": (math.gcd, range(1, 100)),
    "log": (math.log, range(1, 3)),
    "exp": (math.exp, range(1, 2)),
}


def evaluate(expression: str) -> Number:
    """Evaluates arithmetic: + - * / // % **, parentheses and a few functions.

    Integers stay exact and divide into fractions; a decimal point makes a float.

    Raises:
        ToolError: not arithmetic, not defined (division by zero) or too large.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"The expression has {len(expression)} characters; at most {MAX_CHARS}.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError(f"{expression!r} is not an arithmetic expression.") from error
    try:
        return _value(tree.body)
    except ZeroDivisionError as error:
        raise ToolError(f"{expression!r} divides by zero.") from error
    except OverflowError as error:
        raise ToolError(f"{expression!r} is too large.") from error
    except RecursionError as error:
        raise ToolError(f"{expression!r} is nested too deeply.") from error


def show(number: Number) -> str:
    """A number as people write it: 3, 0.5, 0.3333333333."""
    if isinstance(number, Fraction):
        if number.denominator == 1:
            return str(number.numerator)
        try:
            return f"{float(number):.10g}"
        except OverflowError:
            return str(number)
    if isinstance(number, float) and math.isfinite(number):
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.10g}"
    return str(number)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _bounded(_divide(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_apply(name, [_value(arg) for arg in args]))
        case ast.Call(func=ast.Name(id=name)):
            raise ToolError(f"There is no function {name!r}; known: {', '.join(_FUNCTIONS)}.")
        case ast.Name(id=name):
            raise ToolError(f"{name!r} is not a number; write numbers instead of names.")
    raise ToolError(f"{ast.unparse(node)!r} is not arithmetic: use numbers, + - * / // % ** ( ).")


def _bounded(number: Number) -> Number:
    if isinstance(number, float) and not math.isfinite(number):
        raise ToolError("The result is too large or not defined.")
    parts = (number.numerator, number.denominator) if not isinstance(number, float) else ()
    if any(part.bit_length() > MAX_BITS for part in parts):
        raise ToolError(f"The number is too large: more than {MAX_BITS} bits.")
    return number


def _divide(a: Number, b: Number) -> Number:
    """Exact for exact operands: 7 / 2 * 2 is 7."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    exact = Fraction(a, b)
    return exact.numerator if exact.denominator == 1 else exact


def _power(a: Number, b: Number) -> Number:
    """a ** b; the size of an exact result is bounded before it is computed."""
    exact = not isinstance(a, float) and not isinstance(b, float) and b.denominator == 1
    if not exact:
        if a < 0:
            raise ToolError(
                "The power of a negative number with a fractional exponent is not real."
            )
        return float(a) ** float(b)
    bits = max(part.bit_length() for part in (a.numerator, a.denominator))
    if bits > 1 and abs(b) * (bits - 1) > MAX_BITS:
        raise ToolError(f"The power is too large: more than {MAX_BITS} bits.")
    return Fraction(a) ** int(b) if b < 0 else a ** int(b)


def _root(x: Number) -> Number:
    """Square root; exact for perfect squares."""
    if isinstance(x, int) and x >= 0 and math.isqrt(x) ** 2 == x:
        return math.isqrt(x)
    return math.sqrt(x)


def _apply(name: str, args: list[Number]) -> Number:
    function, counts = _FUNCTIONS[name]
    if len(args) not in counts:
        raise ToolError(
            f"{name} takes {counts.start} to {counts.stop - 1} numbers, not {len(args)}."
        )
    try:
        return function(*args)
    except (ValueError, TypeError) as error:
        raise ToolError(f"{name}: {error}.") from error


_NUMBER = r"[a-z(-]*[0-9]{1,15}(\.[0-9]{1,10})?"
PATTERN = rf"^{_NUMBER}(\)* ?(\*\*|//|[-+*/%,]) ?{_NUMBER}){{0,15}}\)*$"
"""Numbers joined by operators, brackets and functions. Short, because it stands in the prompt;
what it lets through and is still no arithmetic gets an answer that says so."""


def _sum(question: str, expression: str, result: str) -> Example:
    thought = "These are numbers, so I calculate."
    return Example(
        question, {"expression": expression}, result, f"The answer is {result}.", thought
    )


EXAMPLES = (
    _sum("What is 12 + 30?", "12 + 30", "42"),
    _sum("Add 105, 7 and 9.", "105 + 7 + 9", "121"),
    _sum("What is the sum of 61 and 8?", "61 + 8", "69"),
    _sum("Calculate 1500 + 27.", "1500 + 27", "1527"),
)


def calculate(expression: str) -> str:
    """Calculates an arithmetic expression and returns the number.

    Args:
        expression: numbers, + - * / // % **, brackets, sqrt, abs, round
    """
    return show(evaluate(expression))


def make_calculator() -> Tool:
    """The calculator as a tool."""
    constraints = {"expression": {"pattern": PATTERN}}
    return tool(calculate, name="calculator", constraints=constraints, examples=EXAMPLES)
