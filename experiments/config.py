"""From a plain mapping (what Hydra composed) to nested frozen dataclasses: `build`.

A config is a frozen dataclass beside the code it configures, so there is no second schema here:
its type hints are the schema. Knows no particular experiment.
"""

import dataclasses
import difflib
import enum
import functools
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from internjax.errors import UserError

MISSING = "???"  # OmegaConf's mark of a key that has no default


def build[T](cls: type[T], raw: Any, path: str = "") -> T:
    """Makes a `cls` of a mapping; lists become tuples, so the result can be hashed.

    Args:
      raw: a mapping, or what Hydra composed.
      cls: a dataclass; fields may be scalars, other dataclasses, tuples, dicts, Literal, Enum,
        Path, and unions of these.
      path: dotted path of `raw` inside the whole config, for messages.

    Raises:
      UserError: an unknown key (with the nearest legal one), a missing key, a wrong type.
    """
    if isinstance(raw, DictConfig):
        raw = OmegaConf.to_container(raw, resolve=True)
    if not isinstance(raw, Mapping):
        raise UserError(f"{path or 'the config'}={raw!r} is not a group of keys: {_keys(cls)}.")
    hints = _hints(cls)
    for key in raw:
        if key not in hints:
            raise UserError(_unknown(_join(path, key), legal_paths(cls, path)))
    values = {key: _value(hints[key], value, _join(path, key)) for key, value in raw.items()}
    for field in dataclasses.fields(cls):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if field.name in hints and field.name not in values and not has_default:
            raise UserError(_missing(_join(path, field.name), hints[field.name]))
    try:
        return cls(**values)
    except ValueError as error:  # a record's own check does not know where it stands
        kind = type(error) if isinstance(error, UserError) else UserError
        raise kind(_placed(path, str(error), hints)) from error


def _placed(path: str, message: str, fields: Iterable[str]) -> str:
    """Names the place in a record's own message: `port=-1: ...` becomes `serve.port=-1: ...`."""
    if not path:
        return message
    begins_with_key = any(message.startswith((f"{name}=", f"{name}.")) for name in fields)
    return f"{path}.{message}" if begins_with_key else f"{path}: {message}"


def part[T](cls: type[T], cfg: T) -> T:
    """Returns the part of `cfg` that belongs to `cls`, one of its parents.

    A verb's keys are those of the library's config and its own in one row; the library gets its
    own only.
    """
    return cls(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls)})


def nearest(word: str, legal: Iterable[str]) -> str | None:
    """Returns the legal dotted path most like `word`; the last part of a path counts by itself."""

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, word.lower(), path.lower()).ratio()
        last = difflib.SequenceMatcher(
            None, word.rpartition(".")[2].lower(), path.rpartition(".")[2].lower()
        ).ratio()
        return max(whole, 0.95 * last) + 0.01 * whole

    best = max(legal, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def legal_paths(cls: type, path: str = "") -> list[str]:
    """Lists the dotted path of every key below a config dataclass."""
    paths = []
    for key, hint in _hints(cls).items():
        paths.append(_join(path, key))
        for option in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(option):
                paths += legal_paths(option, _join(path, key))
    return paths


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _keys(cls: type) -> str:
    return "its keys are " + ", ".join(_hints(cls))


def _unknown(path: str, legal: list[str]) -> str:
    guess = nearest(path, legal)
    if guess:
        return f"no key {path}: did you mean {guess}?"
    siblings = [p for p in legal if p.rpartition(".")[0] == path.rpartition(".")[0]]
    return f"no key {path}: the keys here are {', '.join(siblings)}."


def _missing(path: str, hint: Any) -> str:
    return f"{path} has no default: give it as {path}=VALUE ({_name(hint)})."


def _value(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as `hint` wants it, or raises with the path, what came and what is legal."""
    if value == MISSING:
        raise UserError(_missing(path, hint))
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _frozen(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if origin in (Union, types.UnionType):
        return _union(hint, args, value, path)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise _wrong(path, value, hint)
    if origin in (tuple, list):
        return _sequence(hint, origin, args, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, value, hint)
        return {k: _value(args[1], v, _join(path, str(k))) for k, v in value.items()}
    return _scalar(hint, value, path)


def _union(hint: Any, args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [option for option in args if option is not type(None)]
    if len(options) == 1:  # Optional[X]: X's own message says more than "is not X or null"
        return _value(options[0], value, path)
    for option in sorted(options, key=lambda option: not _is_exactly(option, value)):
        try:
            return _value(option, value, path)
        except UserError:
            continue
    raise _wrong(path, value, hint)


def _is_exactly(option: Any, value: Any) -> bool:
    return type(value) is option


def _sequence(hint: Any, origin: type, args: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise _wrong(path, value, hint)
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(path, value, hint)
        return tuple(_value(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    return tuple(_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # YAML reads 1e4 as a float
    if hint is int and isinstance(value, bool):
        raise _wrong(path, value, hint)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        by_name = {member.name: member for member in hint} | {m.value: m for m in hint}
        if isinstance(value, hint) or value in by_name:
            return value if isinstance(value, hint) else by_name[value]
        raise _wrong(path, value, hint)
    if hint in (dict, tuple, list):
        hint_type = Mapping if hint is dict else (list, tuple)
        if isinstance(value, hint_type):
            return _frozen(value)
        raise _wrong(path, value, hint)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _wrong(path, value, hint)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _wrong(path: str, value: Any, hint: Any) -> UserError:
    given = "null" if value is None else repr(value)
    quotes = "" if hint is not str or value is None else f" Quote it: {path}='\"{value}\"'."
    return UserError(f"{path}={given} is not {_name(hint)}.{quotes}")


def _name(hint: Any) -> str:
    """Says a type in the words of a person who writes YAML."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    words |= {Path: "a path", type(None): "null", Any: "anything"}
    if hint in words:
        return words[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values"
    if origin in (tuple, list):
        return f"a list, each {_name(args[0])}"
    if origin is dict or hint is dict:
        return "a group of keys"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(member.name for member in hint)
    return _keys(hint) if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))
