"""The chat in the terminal: reads lines, prints answers as they grow.

On a pipe it asks line by line, prints answers and nothing else, and ends at the first error.
"""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from internjax.agents.loop import Row
from internjax.agents.tools import make_tools
from internjax.chat.acting import act
from internjax.chat.commands import COMMANDS, Session, obey
from internjax.chat.source import End, Source, Text
from internjax.chat.talk import Talk
from internjax.data.tokenizer import check_text
from internjax.errors import UserError

try:
    import readline  # edits lines and remembers them; not every Python is built with it
except ModuleNotFoundError:
    readline = None

QUOTES = '"""'
ROW_STYLES = {"thought": "italic", "call": "cyan", "result": "green", "error": "red"}


def converse(
    source: Source, talk: Talk, console: Console, *, policy: str, history: Path | None
) -> None:
    """Talks until the end of input or /exit.

    Args:
      history: file of the lines that were typed, read and written at a terminal; None keeps none.

    Raises:
      UserError: on a pipe, what was wrong with a question or command.
    """
    typed = by_hand(console)
    session = Session(source, talk, lambda line: _say(console, line))
    remembered = _remembering(history, session.say) if typed else contextlib.nullcontext()
    if typed:
        _say(console, f"{talk.model}. /help shows what there is, Ctrl-C stops an answer.")
    with remembered:
        while not session.over:
            asked = _read(console, typed)
            if asked is None:
                return
            try:
                _turn(session, asked, console, policy)
            except UserError as error:  # too long, for example: the chat so far stays
                if not typed:
                    raise
                console.print(f"error: {error}", style="red", markup=False)


def by_hand(console: Console) -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and console.is_terminal


def _turn(session: Session, asked: str, console: Console, policy: str) -> None:
    """Obeys a command or asks a question; what /retry leaves is asked at once."""
    before = session.talk
    if asked.startswith("/"):
        obey(session, asked)
        if session.again is None:
            return
        asked, session.again = session.again, None
    asked = asked.strip()
    if not asked:
        return
    text = answer(session.source, session.talk, asked, console, policy=policy)
    session.talk = before if text is None else session.talk.answered(asked, text)


def answer(
    source: Source, talk: Talk, question: str, console: Console, *, policy: str
) -> str | None:
    """Prints an answer as it grows; returns it.

    At a terminal Ctrl-C keeps what has come so far, None if nothing has; elsewhere it goes on.
    """
    check_text(question)  # a server's client would fail on it
    messages, text = talk.asking(question), ""
    if talk.tools:
        tools = make_tools(talk.tools)
        events = act(source, talk.model, messages, talk.params, tools, policy=policy)
    else:
        events = source.answer(talk.model, messages, talk.params)
    stopped = False
    with contextlib.closing(events):
        try:
            for event in events:
                if isinstance(event, Text):
                    text += event.text
                    console.print(_plain(event.text, console), end="", markup=False, soft_wrap=True)
                elif isinstance(event, Row):
                    _print_row(console, event)
                else:
                    _print_end(console, event, text)
        except KeyboardInterrupt:
            if not by_hand(console):
                raise
            stopped = True
    if stopped:
        console.print("\n[dim]stopped.[/]\n")
    return text if text or not stopped else None


def _print_row(console: Console, row: Row) -> None:
    """A step of an agent; only people want it, so a pipe gets the answer alone."""
    if not console.is_terminal:
        return
    name, style = f"{row.kind} {row.name}".strip(), ROW_STYLES[row.kind]
    text = escape(_plain(row.text, console))
    console.print(f"[bold]{name:>18}[/]  [{style}]{text}[/]")


def _print_end(console: Console, end: End, text: str) -> None:
    console.print()
    if console.is_terminal:
        console.print(f"[dim]{end}[/]\n")


def _plain(text: str, console: Console) -> str:
    """Drops control characters: a model's words must not steer the terminal."""
    if not console.is_terminal:
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _say(console: Console, line: str) -> None:
    """To people: not among the answers on a pipe."""
    if by_hand(console):
        console.print(f"[dim]{escape(line)}[/]", highlight=False)
    else:
        print(line, file=sys.stderr, flush=True)


def _read(console: Console, typed: bool) -> str | None:
    """Returns the next question, over several lines where it says so; None at the end of input.

    A line that ends in a backslash goes on in the next; three quotes open what three quotes close.
    Ctrl-C drops what was begun.
    """
    if sys.stdin is None:  # closed by whoever started us: nobody asks
        return None
    colour = typed and console.color_system is not None and not console.no_color
    try:
        return _join(_lines(typed, colour))
    except EOFError:
        if typed:
            console.print()
        return None
    except KeyboardInterrupt:
        if not typed:
            raise
        console.print()
        _say(console, "Ctrl-D or /exit ends.")
        return ""


def _join(lines: Iterator[str]) -> str:
    text = next(lines)
    if text.lstrip().startswith(QUOTES):
        text = text.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            if (more := next(lines, None)) is None:
                break
            text += "\n" + more
        return " " + text.rstrip().removesuffix(QUOTES).strip("\n")  # quoted: never a command
    while text.endswith("\\"):
        text = text[:-1] + "\n" + next(lines, "")
    return text


def _lines(typed: bool, colour: bool) -> Iterator[str]:
    """Yields the lines of one question; raises EOFError where there is none.

    The colours stand between the marks by which readline knows what takes no room.
    """
    on, off = ("\001\033[1;36m\002", "\001\033[0m\002") if colour else ("", "")
    first, more = (f"{on}you>{off} ", f"{on}...>{off} ") if typed else ("", "")
    yield input(first)
    with contextlib.suppress(EOFError):
        while True:
            yield input(more)


@contextlib.contextmanager
def _remembering(history: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Completes commands with Tab; keeps typed lines in a file that only the user can read."""
    if readline is None:
        yield
        return
    readline.set_completer(lambda text, n: [*(c for c in COMMANDS if c.startswith(text)), None][n])
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    if history is None:
        yield
        return
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_RDWR, 0o600))
        readline.read_history_file(history)
    except OSError as error:  # a read-only home, in a container: no reason not to talk
        say(f"your lines are not kept: {history}: {error.strerror}.")
        yield
        return
    readline.set_history_length(1000)
    try:
        yield
    finally:
        readline.write_history_file(history)
