"""`internjax VERB [SUBVERB] [POSITIONAL...] [key=value...]`: one table from words to experiments.

No logic of its own: words become Hydra overrides of `experiments/<module>.py`, and an error that
the user can mend becomes one line. `python experiments/<module>.py key=value` ends here too.
"""

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internjax.errors import GateFailed, UserError
from internjax.interrupts import keep_interrupts
from internjax.version import __version__

EXPERIMENTS, CONFIGS = "internjax.experiments", "internjax.configs"


@dataclass(frozen=True)
class Verb:
    """One line of the table: which experiment runs, and which keys bare words are short for."""

    module: str
    words: tuple[str, ...] = ()  # keys that positional arguments fill, in order
    many: str = ""  # a key that takes all positional arguments that are left, joined by a space


# A subverb reaches its experiment as the key `action`.
VERBS: dict[tuple[str, str], Verb] = {
    ("chain", ""): Verb("chain"),
    ("data", "run"): Verb("data", ("input", "out")),
    ("data", "check"): Verb("data", ("input",)),
    ("data", "tokenizer"): Verb("tokens", ("input", "out")),
    ("data", "shards"): Verb("tokens", ("input", "out")),
    ("data", "import"): Verb("tokens", ("input", "out")),
    ("data", "export"): Verb("tokens", ("input", "out")),
    ("pretrain", ""): Verb("pretrain", ("model",)),
    ("tune", ""): Verb("tune", ("model",)),
    ("evaluate", ""): Verb("evaluate", ("model",)),
    ("quantize", ""): Verb("quantize", ("model",)),
    ("serve", ""): Verb("serve", ("model",)),
    ("keys", "new"): Verb("keys", ("name",)),
    ("keys", "ls"): Verb("keys"),
    ("keys", "remove"): Verb("keys", ("name",)),
    ("chat", ""): Verb("chat", ("model",), many="prompt"),
    ("agent", ""): Verb("agent", ("model",), many="question"),
    ("ui", ""): Verb("ui", many="url"),
    ("plan", "run"): Verb("plan"),
    ("plan", "search"): Verb("plan"),
    ("plan", "tune"): Verb("plan"),
    ("bench", "decode"): Verb("bench", ("model",)),
    ("bench", "serve"): Verb("bench", ("model",)),
    ("bench", "kernels"): Verb("bench"),
    ("convert", ""): Verb("convert", ("src", "dst")),
    ("catalog", "ls"): Verb("catalog", ("name", "prefix")),
    ("catalog", "search"): Verb("catalog", many="query"),
    ("catalog", "info"): Verb("catalog", ("name",)),
    ("catalog", "get"): Verb("catalog", ("name", "prefix")),
}
DEFAULT_ACTION = {"data": "run", "catalog": "ls", "plan": "run", "keys": "ls"}

# The disk or its rights, not this program: full, over quota, read-only, no right. A missing file
# is not among them: code that opens what it did not check is a bug, and shows its traceback.
_MACHINE_SAYS_NO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

# What keeps Hydra's own program (sweeps) from leaving log files beside the user's files.
QUIET = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.sweep.dir=runs/sweep/${now:%Y-%m-%d_%H-%M-%S}",
)
HYDRA_FLAGS_WITH_VALUE = {"--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"}
HYDRA_FLAGS = HYDRA_FLAGS_WITH_VALUE | {"--multirun", "-m", "--resolve", "--hydra-help"}
_OVERRIDE = re.compile(r"^(~[\w./@:-]+(=.*)?|\+{0,2}[A-Za-z_][\w./@:-]*=.*)$", re.S)


def main() -> None:
    """The `internjax` command."""
    keep_interrupts()
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code: 0, 1 gate, 2 user error, 130 Ctrl-C."""
    try:
        _dispatch(list(argv))
        sys.stdout.flush()
        return 0
    except UserError as error:
        _say(f"error: {_one_line(error)}")
        return 1 if isinstance(error, GateFailed) else 2
    except KeyboardInterrupt:
        _say("stopped: interrupted from the keyboard; finished artefacts are kept.")
        return 130
    except (BrokenPipeError, SystemExit) as error:
        rich = isinstance(error.__context__, BrokenPipeError)  # it turns one into an exit with 1
        if isinstance(error, SystemExit) and not rich:
            raise
        # The reader (`| head`) has gone; what Python flushes while it ends must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _MACHINE_SAYS_NO:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _say(f"error: {place}{error.strerror}. Finished artefacts are kept.")
        return 2


def parse(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Splits a command line into an experiment's name, its overrides and Hydra's own flags."""
    verb, *rest = argv
    _check_verb(verb)
    actions = [action for v, action in VERBS if v == verb and action]
    words, overrides, flags = _sort(rest)
    action = ""
    if actions:
        action, words = _take_action(verb, actions, words)
        overrides.insert(0, f"action={action}")
    line = VERBS[verb, action]
    for flag in flags:
        _check_flag(line.module, flag)
    for key in line.words:
        if words:
            overrides.append(f"{key}={_quote(words.pop(0))}")
    if words and line.many:
        overrides.append(f"{line.many}={_quote(' '.join(words))}")
    elif words:
        takes = " ".join(key.upper() for key in line.words) or "no bare argument"
        raise UserError(
            f"{words[0]!r} is one argument too many: internjax {f'{verb} {action}'.strip()} takes "
            f"{takes}; everything else is key=value."
        )
    return line.module, overrides, flags


def _check_verb(verb: str) -> None:
    verbs = _verbs()
    if verb not in verbs:
        raise UserError(_miss("verb", verb, "internjax ", verbs))


def _check_flag(module: str, flag: str) -> None:
    """Refuses `--port=8000`, which other programs would take, with the key that is meant."""
    name, _, value = flag.partition("=")
    if name in HYDRA_FLAGS or not name.startswith("-"):  # the latter: what such a flag is given
        return
    from internjax.experiments.config import nearest

    word = name.lstrip("-").replace("-", "_")
    guess = nearest(word, _legal_keys(module, [])) if word else None
    hint = f"did you mean {guess}={value or 'VALUE'}? " if guess else ""
    raise UserError(f"no option {name}: {hint}Everything is key=value, without dashes.")


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return
    if argv[0] in ("--version", "version"):
        print(f"internjax {__version__}")
        return
    if "--help" in argv or "-h" in argv:
        _check_verb(argv[0])
        print(_help(argv[0]))
        return
    module, overrides, flags = parse(argv)
    _launch(module, overrides, flags)


def _launch(module: str, overrides: list[str], flags: list[str]) -> None:
    """Starts an experiment; what Hydra refuses becomes one line with advice.

    One run is composed here and handed to `main`, so that errors arrive whole and nothing is
    written beside the user's files; Hydra's own flags (`-m`, `--cfg job`...) get its full program.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not (_folder(EXPERIMENTS) / f"{module}.py").is_file():
        raise UserError(f"`internjax {module}` is not in this version: see `internjax --help`.")
    experiment = importlib.import_module(f"{EXPERIMENTS}.{module}")
    overrides = [_open(module, _readable(override)) for override in overrides]
    try:
        if flags:
            os.environ["HYDRA_FULL_ERROR"] = "1"
            sys.argv = [f"internjax {module}", *flags, *QUIET, *overrides]
            experiment.main()
        else:
            with initialize_config_module(CONFIGS, version_base=None):
                raw = compose(config_name=module, overrides=overrides)
            experiment.main(raw)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(module, overrides, error)) from error


def _explain(module: str, overrides: list[str], error: Exception) -> str:
    """Says which override Hydra refused and which legal one is nearest, with its full path."""
    from internjax.experiments.config import nearest

    text = str(error)
    refused = re.search(r"Could not override '([^']+)'", text)
    if refused:
        legal = _legal_keys(module, overrides)
        guess = nearest(refused[1], legal)
        if guess:
            return f"no key {refused[1]}: did you mean {guess}?"
        top = [key for key in legal if "." not in key]
        return f"no key {refused[1]}: `internjax {module}` has {', '.join(top)}."
    absent = re.search(r"Could not find '([^']+)'.*?Available options in '[^']+':(.*)", text, re.S)
    if absent:
        group, _, option = absent[1].rpartition("/")
        options = re.findall(r"^\s+(\S+)$", absent[2], re.M)
        guess = nearest(option, options)
        hint = f"did you mean {group}={guess}? " if guess else ""
        return f"no option {group}={option}: {hint}The options are {', '.join(options)}."
    return _one_line(error)


def _legal_keys(module: str, overrides: list[str]) -> list[str]:
    """Lists the dotted keys of a root, with the groups chosen in `overrides` where they exist."""
    from hydra import compose, initialize_config_module
    from omegaconf import DictConfig, OmegaConf

    configs = _folder(CONFIGS)
    groups = [o for o in overrides if (configs / o.partition("=")[0].partition("@")[0]).is_dir()]
    with initialize_config_module(CONFIGS, version_base=None):
        config = compose(config_name=module, overrides=groups)

    def walk(node: DictConfig, prefix: str) -> list[str]:
        paths = []
        for key in node:
            paths.append(f"{prefix}{key}")
            if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
                paths += walk(node[key] or OmegaConf.create(), f"{prefix}{key}.")
        return paths

    return walk(config, "")


def _verbs() -> list[str]:
    return list(dict.fromkeys(verb for verb, _ in VERBS))


def _sort(rest: list[str]) -> tuple[list[str], list[str], list[str]]:
    words, overrides, flags = [], [], []
    rest = list(rest)
    while rest:
        item = rest.pop(0)
        if item.startswith("-") and item != "-":
            flags.append(item)
            if item in HYDRA_FLAGS_WITH_VALUE and rest:
                flags.append(rest.pop(0))
        else:
            (overrides if _OVERRIDE.match(item) else words).append(item)
    return words, overrides, flags


def _take_action(verb: str, actions: list[str], words: list[str]) -> tuple[str, list[str]]:
    if words and words[0] in actions:
        return words[0], words[1:]
    if words:
        raise UserError(_miss("subverb", words[0], f"internjax {verb} ", actions))
    if verb not in DEFAULT_ACTION:
        raise UserError(f"internjax {verb} needs a subverb: {', '.join(actions)}.")
    return DEFAULT_ACTION[verb], words


def _miss(kind: str, given: str, prefix: str, legal: list[str]) -> str:
    from internjax.experiments.config import nearest

    guess = nearest(given, legal)
    hint = f"did you mean `{prefix}{guess}`? " if guess else ""
    return f"no {kind} {given!r}: {hint}Legal here: {', '.join(legal)}."


def _readable(override: str) -> str:
    """Quotes a value that Hydra's grammar has no place for (Chinese, `a=b`, `it's`): it is text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        key, _, value = override.partition("=")
        return f"{key}={_quote(value)}"
    return override


def _open(module: str, override: str) -> str:
    """Lets Hydra add what a root need not spell out: members of a mapping, keys of a group.

    Hydra takes such keys for misspelt; `build`, which sees the types, knows whether they are.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from internjax.usage import read_keys

    root = _folder(CONFIGS) / f"{module}.yaml"
    if override[0] in "+~" or not root.is_file():
        return override
    parsed = OverridesParser.create().parse_override(override)
    parts = parsed.key_or_group.split(".")
    above = {".".join(parts[:end]) for end in range(1, len(parts))}
    written = {key.path for key in read_keys(root.read_text(encoding="utf-8"))}
    new = parsed.key_or_group not in written and above & written
    return f"++{override}" if new or isinstance(parsed.value(), dict) else override


def _quote(word: str) -> str:
    """Quotes a bare word for Hydra's grammar, where spaces, commas and brackets mean something."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), word) + "'"


def _overview() -> str:
    from internjax.usage import docstring

    lines = ["internjax VERB [SUBVERB] [ARGUMENT...] [key=value...]", ""]
    for verb in _verbs():
        rows = [(action, line) for (v, action), line in VERBS.items() if v == verb]
        path = _folder(EXPERIMENTS) / f"{rows[0][1].module}.py"
        summary = docstring(path).splitlines()[0] if path.is_file() else "(not in this version)"
        actions = "|".join(action for action, _ in rows if action)
        name = f"  {verb} {actions}".rstrip()
        lines.append(f"{name:<30}{summary}" if len(name) < 30 else f"{name}\n{'':<30}{summary}")
    lines += ["", "internjax VERB --help shows a verb's keys, their defaults and units."]
    return "\n".join(lines)


def _help(verb: str) -> str:
    rows = [(action, row) for (v, action), row in VERBS.items() if v == verb]
    modules = dict.fromkeys(row.module for _, row in rows)
    return "\n\n".join(_help_of(verb, rows, module) for module in modules)


def _help_of(verb: str, rows: list[tuple[str, Verb]], module: str) -> str:
    """What one experiment of a verb is for, how it is called, and its keys."""
    from internjax.usage import describe, docstring

    configs, path = _folder(CONFIGS), _folder(EXPERIMENTS) / f"{module}.py"
    usage = []
    for action, row in rows:
        words = [*row.words, *([f"{row.many}..."] if row.many else [])]
        parts = ["internjax", verb, action, *(f"[{word.upper()}]" for word in words)]
        if row.module == module:
            usage.append("  " + " ".join(part for part in [*parts, "[key=value...]"] if part))
    text = docstring(path) if path.is_file() else "(not in this version)"
    keys = describe(configs, module) if (configs / f"{module}.yaml").is_file() else ""
    return "\n".join([text, "", "Usage:", *usage, "", "Keys, as key=default:", keys])


def _folder(package: str) -> Path:
    return Path(importlib.import_module(package).__file__).parent


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
