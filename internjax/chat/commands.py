"""The words that begin with a slash: what each does to the session of a terminal chat."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from internjax.agents.tools import TOOLS, make_tools
from internjax.chat.source import Params, Source
from internjax.chat.talk import Talk, load_talk, save_talk
from internjax.errors import UserError


@dataclass
class Session:
    """What commands work on.

    Fields:
      say: tells the user one line.
      again: a question that is to be asked once more.
      over: the user has left.
    """

    source: Source
    talk: Talk
    say: Callable[[str], None]
    again: str | None = None
    over: bool = False


@dataclass(frozen=True)
class Command:
    """One command: what may stand behind its name, what it is for, what it does."""

    takes: str
    about: str
    do: Callable[[Session, str], None]


def obey(session: Session, line: str) -> None:
    """Carries out a line such as "/system Answer briefly."

    Raises:
      UserError: no such command, or what the command says against it.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise UserError(f"no command {name}: /help lists them (a space before / asks it as text).")
    COMMANDS[name].do(session, rest.strip())


def _clear(session: Session, rest: str) -> None:
    _nothing(rest)
    session.talk = replace(session.talk, turns=())
    session.say("forgotten.")


def _save(session: Session, rest: str) -> None:
    path = _path(rest)
    save_talk(session.talk, path)
    session.say(f"{path}: {len(session.talk.turns)} messages.")


def _load(session: Session, rest: str) -> None:
    path = _path(rest)
    system, turns = load_talk(path)
    session.talk = replace(session.talk, system=system, turns=turns)
    session.say(f"{path}: {len(turns)} messages.")


def _system(session: Session, rest: str) -> None:
    if rest:
        session.talk = replace(session.talk, system="" if rest == "none" else rest)
    session.say(session.talk.system or "none of ours: the model's own.")


def _tools(session: Session, rest: str) -> None:
    names = rest.replace(",", " ").split()
    if names:
        tools = () if names == ["off"] else tuple(TOOLS) if names == ["on"] else tuple(names)
        make_tools(tools)  # an unknown name, or no sandbox: said now
        if tools:
            session.source.endpoint()
        session.talk = replace(session.talk, tools=tools)
    used = ", ".join(session.talk.tools) or "off"
    session.say(f"{used}. There are {', '.join(TOOLS)}; /tools on, off, or names.")


def _adapters(session: Session, rest: str) -> None:
    if rest:
        session.talk = replace(session.talk, model=session.source.choose(rest))
    for name in session.source.models():
        session.say(f"{'*' if name == session.talk.model else ' '} {name}")


def _params(session: Session, rest: str) -> None:
    if rest:
        given = dict(_assignment(word) for word in rest.split())
        session.talk = replace(session.talk, params=replace(session.talk.params, **given))
    drawn = session.talk.params
    shown = (f"{f.name}={_shown(getattr(drawn, f.name))}" for f in fields(Params))
    session.say(" ".join(shown))


def _retry(session: Session, rest: str) -> None:
    _nothing(rest)
    session.talk, session.again = session.talk.undone()


def _help(session: Session, rest: str) -> None:
    for name, command in COMMANDS.items():
        session.say(f"{f'{name} {command.takes}':<24}{command.about}")
    session.say('a line that ends in \\ goes on in the next; so does all between two lines of """')


def _exit(session: Session, rest: str) -> None:
    session.over = True


COMMANDS = {
    "/clear": Command("", "forgets what was said", _clear),
    "/save": Command("FILE", "keeps the chat as JSON", _save),
    "/load": Command("FILE", "goes on with a kept chat", _load),
    "/system": Command("[TEXT|none]", "shows or sets the system text", _system),
    "/tools": Command("[on|off|NAMES]", "tools that answers may use", _tools),
    "/adapters": Command("[NAME]", "models of the server, or a LoRA folder", _adapters),
    "/params": Command("[KEY=VALUE ...]", "shows or sets how answers are drawn", _params),
    "/retry": Command("", "asks the last question again", _retry),
    "/help": Command("", "shows this", _help),
    "/exit": Command("", "ends, like Ctrl-D", _exit),
}


def _assignment(word: str) -> tuple[str, float | int | None]:
    """Reads "top_p=0.9" or "seed=none".

    Raises:
      UserError: no such key, or no number.
    """
    key, _, text = word.partition("=")
    kinds = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
    if key not in kinds:
        raise UserError(f"{word}: give KEY=VALUE, with a key of {', '.join(kinds)}.")
    if text == "none" and key in ("max_tokens", "seed"):
        return key, None
    try:
        return key, kinds[key](text)
    except ValueError as error:
        raise UserError(f"{word}: {key} takes a number.") from error


def _shown(value: float | int | None) -> str:
    return "none" if value is None else str(value)


def _path(rest: str) -> Path:
    if not rest:
        raise UserError("give the name of a file behind the command.")
    return Path(rest).expanduser()


def _nothing(rest: str) -> None:
    if rest:
        raise UserError(f"{rest!r}: nothing stands behind this command.")
