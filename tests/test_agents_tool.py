"""Tools: schema from hints and docstring, checked arguments, errors for the model as text."""

import enum
import json
from fractions import Fraction
from typing import Annotated, Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import Field

from internjax.agents.tool import ToolError, tool, toolbox, use
from internjax.agents.tools import make_tools
from internjax.agents.tools.calculator import MAX_BITS, evaluate, show
from internjax.agents.tools.python import make_python
from internjax.errors import Missing, UserError


def weather(city: str, days: Annotated[int, Field(ge=1, le=7)] = 1, unit: Literal["C", "F"] = "C"):
    """Forecasts the weather.

    A second paragraph is for people.

    Args:
        city: name of a city, in
            any language
        days: how far ahead
    """
    return f"{city}: 20 {unit} for {days} days"


def test_schema_comes_from_hints_and_docstring():
    made = tool(weather)
    assert made.name == "weather"
    assert made.description == "Forecasts the weather."
    properties = made.parameters["properties"]
    assert made.parameters["required"] == ["city"]
    assert made.parameters["additionalProperties"] is False
    assert properties["city"] == {
        "type": "string",
        "description": "name of a city, in any language",
    }
    assert properties["days"]["minimum"] == 1
    assert properties["unit"]["enum"] == ["C", "F"]
    assert "title" not in json.dumps(made.parameters)


def test_a_parameter_named_title_stays():
    def book(title: str):
        """Finds a book."""

    assert tool(book).parameters["properties"] == {"title": {"type": "string"}}


def test_nested_types_are_checked():
    class Size(enum.Enum):
        SMALL = "s"
        LARGE = "l"

    def order(sizes: list[Size], note: str | None = None):
        """Orders."""
        return [size.name for size in sizes]

    made = tool(order)
    assert made.call({"sizes": ["s", "l"]}) == "['SMALL', 'LARGE']"
    with pytest.raises(ToolError, match=r"sizes\.1"):
        made.call({"sizes": ["s", "xl"]})


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("{}", "city"),
        ('{"city": "Bern", "days": 9}', "days"),
        ('{"city": "Bern", "colour": "red"}', "colour"),
        ('{"city": 3}', "city"),
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
    ],
)
def test_wrong_arguments_are_told_to_the_model(arguments, said):
    with pytest.raises(ToolError, match=said):
        use(toolbox([tool(weather)]), "weather", arguments)


def test_unknown_tool_is_told_with_the_known_ones():
    with pytest.raises(ToolError, match="weather"):
        use(toolbox([tool(weather)]), "wether", "{}")


def test_a_defect_of_the_tool_is_no_tool_error():
    def broken(x: int):
        """Breaks."""
        return {}[x]

    with pytest.raises(KeyError):
        use(toolbox([tool(broken)]), "broken", '{"x": 1}')


def test_functions_without_schema_are_refused():
    def bare(x):
        """Does."""

    def undocumented(x: int):
        return x

    def many(*xs: int):
        """Does."""

    for function in (bare, undocumented, many):
        with pytest.raises(UserError, match=function.__name__):
            tool(function)
    with pytest.raises(UserError, match="letters"):
        tool(weather, name="two words")
    with pytest.raises(UserError, match="Two tools"):
        toolbox([tool(weather), tool(weather)])
    with pytest.raises(UserError, match="at least one"):
        toolbox([])
    with pytest.raises(UserError, match="calculator, python"):
        make_tools(["calculater"])


CALCULATED = {
    "1 + 2 * 3": "7",
    "(1 + 2) * 3": "9",
    "7 / 2": "3.5",
    "7 / 2 * 2": "7",
    "1 / 3": "0.3333333333",
    "1 / 3 * 3": "1",
    "7 // 2 + 7 % 4": "6",
    "-2 ** 2": "-4",
    "2 ** -2": "0.25",
    "2 ** 0.5": "1.414213562",
    "0.1 + 0.2": "0.3",
    "sqrt(16) + abs(-4)": "8",
    "sqrt(2)": "1.414213562",
    "round(2.567, 2)": "2.57",
    "max(3, 9, 4) - min(3, 9)": "6",
    "10 ** 20": "1" + "0" * 20,
    " 12 + 30 ": "42",
}


@pytest.mark.parametrize("expression", CALCULATED)
def test_calculator(expression):
    assert show(evaluate(expression)) == CALCULATED[expression]


@pytest.mark.parametrize(
    "expression, said",
    [
        ("1 / 0", "zero"),
        ("7 % 0", "zero"),
        ("9 ** 9 ** 9", "too large"),
        ("10 ** 400 * 1.5", "too large"),
        ("1e308 * 10", "too large"),
        ("(-8) ** 0.5", "real"),
        ("sqrt(-1)", "sqrt"),
        ("1 +", "not an arithmetic"),
        ("007 + 1", "not an arithmetic"),
        ("x + 1", "not a number"),
        ("open('/etc/passwd')", "no function"),
        ("().__class__", "not arithmetic"),
        ("[1][0]", "not arithmetic"),
        ("'a' * 3", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("1 if 1 else 2", "not arithmetic"),
        ("lambda: 1", "not arithmetic"),
        ("(x := 3)", "not arithmetic"),
        ("abs(1, 2)", "abs takes"),
        ("round(1.5, 0.5)", "round"),
        ("1,234 + 1", "not arithmetic"),
        ("1" * 600, "characters"),
        ("(" * 240 + "1" + ")" * 240, "not an arithmetic"),
    ],
)
def test_calculator_refuses_with_a_reason(expression, said):
    with pytest.raises(ToolError, match=said):
        evaluate(expression)


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=6), st.randoms())
def test_exact_numbers_stay_exact(numbers, rng):
    text, value = f"({numbers[0]})", Fraction(numbers[0])
    for number in numbers[1:]:
        sign = rng.choice("+-*/")
        if sign == "/" and number == 0:
            continue
        text = f"({text} {sign} ({number}))"
        value = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a / b,
        }[sign](value, number)
    assert evaluate(text) == value


@given(st.text(alphabet="0123456789+-*/%(). ,esqrtabmx", max_size=60))
def test_calculator_answers_or_refuses_whatever_it_is_given(expression):
    try:
        number = evaluate(expression)
    except ToolError:
        return
    assert isinstance(number, float) or abs(number.numerator).bit_length() <= MAX_BITS
    assert show(number)


def test_examples_of_the_tools_are_true():
    tools = make_tools(["calculator"])
    tools += [make_python()] if _sandboxed() else []
    for made in tools:
        assert made.examples
        for example in made.examples:
            assert made.call(example.arguments) == example.result
            assert example.result in example.answer


def _sandboxed() -> bool:
    try:
        make_python()
    except Missing:
        return False
    return True


@pytest.mark.skipif(not _sandboxed(), reason="no sandbox works here")
def test_python_tool_runs_in_the_sandbox_and_says_which():
    made = make_python()
    assert made.description.count("bubblewrap") + made.description.count("monty") == 1
    assert made.call({"code": "print(6 * 7)"}) == "42"
    assert made.call({"code": "6 * 7"}) == "42"
    assert "print" in made.call({"code": "x = 1"})
    with pytest.raises(ToolError, match=r"(?s)before.*ZeroDivisionError"):
        made.call({"code": "print('before')\n1 / 0"})
