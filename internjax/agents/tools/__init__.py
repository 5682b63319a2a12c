"""The tools that come with the agents, by name."""

from collections.abc import Callable, Iterable

from internjax.agents.tool import Tool
from internjax.agents.tools.calculator import make_calculator
from internjax.agents.tools.python import make_python
from internjax.errors import UserError

TOOLS: dict[str, Callable[[], Tool]] = {"calculator": make_calculator, "python": make_python}


def make_tools(names: Iterable[str]) -> list[Tool]:
    """Makes the named tools.

    Raises:
        UserError: an unknown name.
        Missing: the Python tool where no sandbox works.
    """
    names = list(names)
    for name in names:
        if name not in TOOLS:
            raise UserError(f"There is no tool {name!r}; the tools are {', '.join(TOOLS)}.")
    return [TOOLS[name]() for name in names]
