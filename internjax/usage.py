"""What `--help` prints, read from the commented YAML roots in configs/.

A root's keys carry their meaning and unit in comments: after the value, or on the lines above.
Reading these lines keeps one text for the file and for the help. Knows no Hydra and no verb.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w\-/]+):(?: +(?P<rest>.*))?$")


@dataclass(frozen=True)
class Key:
    """One key of a config: its dotted path, default as written ("" for a group), and meaning."""

    path: str
    default: str
    note: str


def read_keys(text: str) -> list[Key]:
    """Lists the keys of a commented YAML text in order; the `defaults` list is left out."""
    keys: list[Key] = []
    stack: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped.lstrip("# "))
            continue
        match = _KEY.match(line)
        if not match:
            if not stripped:
                above = []
            continue
        indent = len(match["indent"])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = ".".join([key for _, key in stack] + [match["key"]])
        default, beside = _split_comment(match["rest"] or "")
        note = " ".join([*above, beside]).strip()
        stack.append((indent, match["key"]))
        above = []
        if not path.startswith(("defaults", "hydra")):
            keys.append(Key(path, default, note))
    return keys


def read_groups(text: str) -> dict[str, str]:
    """Returns the groups that a root's `defaults` list chooses from, each with its choice."""
    block = re.search(r"^defaults:\n((?:\s+-.*\n|\s*#.*\n|\s*\n)+)", text + "\n", re.M)
    lines = block[1].splitlines() if block else []
    pairs = [re.match(r"\s*-\s*(?:optional\s+)?([\w/@.]+):\s*([\w.\-]+)", line) for line in lines]
    return {pair[1]: pair[2] for pair in pairs if pair}


def docstring(path: Path) -> str:
    """Returns a file's module docstring without importing the file."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def describe(configs: Path, root: str) -> str:
    """Formats every key of a root and of the groups it chooses from."""
    text = (configs / f"{root}.yaml").read_text(encoding="utf-8")
    blocks = [_table(read_keys(text))]
    for group, choice in read_groups(text).items():
        folder, _, package = group.partition("@")
        options = sorted(p.stem for p in (configs / folder).glob("*.yaml"))
        head = f"{group}={choice}   (one of {', '.join(options)})"
        chosen = configs / folder / f"{choice}.yaml"
        inside = read_keys(chosen.read_text(encoding="utf-8")) if chosen.is_file() else []
        prefix = package or folder.replace("/", ".")
        blocks.append(head + "\n" + _table([_under(prefix, key) for key in inside]))
    return "\n\n".join(block for block in blocks if block.strip())


def _split_comment(rest: str) -> tuple[str, str]:
    """Splits `value  # note`; a # inside quotes or inside a word belongs to the value."""
    quote = ""
    for i, char in enumerate(rest):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#" and (i == 0 or rest[i - 1] == " "):
            return rest[:i].strip(), rest[i:].lstrip("# ").strip()
    return rest.strip(), ""


def _under(prefix: str, key: Key) -> Key:
    return Key(f"{prefix}.{key.path}", key.default, key.note)


def _table(keys: list[Key]) -> str:
    shown = [key for key in keys if key.default or key.note]
    width = min(44, max((len(_setting(key)) for key in shown), default=0))
    return "\n".join(f"  {_setting(key):<{width}}  {key.note}".rstrip() for key in shown)


def _setting(key: Key) -> str:
    return f"{key.path}={key.default}" if key.default else f"{key.path}:"
