"""The command line: words become overrides, and what a user gets wrong is answered in one line."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import internjax
from internjax import cli, configs, experiments
from internjax.errors import GateFailed, UserError
from internjax.usage import describe, docstring, read_groups, read_keys

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, EXPERIMENTS = Path(configs.__file__).parent, Path(experiments.__file__).parent

PROBE = '''
"""Shows what it was given.

More words about it.
"""

import os
from dataclasses import dataclass, field

import hydra

from internjax.errors import GateFailed, UserError
from internjax.experiments.config import build


@dataclass(frozen=True)
class Optim:
    lr: float
    steps: int


@dataclass(frozen=True)
class Limits:
    seconds: float = 1.0
    workers: int = 2


@dataclass(frozen=True)
class Probe:
    model: str
    optim: Optim
    fail: str = ""
    limit: dict[str, int] = field(default_factory=dict)
    inner: Limits = field(default_factory=Limits)


@hydra.main(config_path="../configs", config_name="probe", version_base=None)
def main(raw):
    cfg = build(Probe, raw)
    if cfg.fail == "gate":
        raise GateFailed("identity 40 % is\\nbelow 90 %")
    if cfg.fail == "keys":
        raise KeyboardInterrupt
    if cfg.fail == "bug":
        raise RuntimeError("a bug")
    if cfg.fail == "pipe":
        raise BrokenPipeError
    print(cfg)
'''

PROBE_YAML = """
defaults:
  - optim: sgd  # the optimizer
  - _self_

# published name or path,
# as `load` takes it
model: smollm2-135m-instruct
fail: ""  # how to fail: "#gate" is not a comment
limit: {piqa: 50}  # samples a task
inner: {seconds: 1.5}  # not every key of a group must be written here
"""


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """A verb of its own, laid out as this repository's: experiments/probe.py and configs/."""
    files = {
        "__init__.py": "",
        "experiments/__init__.py": "",
        "experiments/probe.py": PROBE.lstrip(),
        "configs/__init__.py": "",
        "configs/probe.yaml": PROBE_YAML,
        "configs/optim/sgd.yaml": "lr: 1e-3  # peak\nsteps: 10  # updates\n",
        "configs/optim/adamw.yaml": "lr: 2.0\nsteps: 20\n",
    }
    for name, text in files.items():
        path = tmp_path / "probehouse" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "EXPERIMENTS", "probehouse.experiments")
    monkeypatch.setattr(cli, "CONFIGS", "probehouse.configs")
    monkeypatch.setitem(cli.VERBS, ("probe", ""), cli.Verb("probe", ("model",)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["internjax"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "probehouse"]:
        del sys.modules[name]


def test_runs_with_defaults_and_overrides(probe, capsys):
    assert cli.run(["probe", "optim.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "model='smollm2-135m-instruct'" in out
    assert "optim=Optim(lr=0.001, steps=3)" in out


@pytest.mark.parametrize(
    "word", ["internlm-7b", "my model", "a,b", "it's", "(x) [y]", "7", "null", "a\\"]
)
def test_a_bare_word_arrives_as_it_was_typed(probe, capsys, word):
    assert cli.run(["probe", word]) == 0
    assert f"model={word!r}," in capsys.readouterr().out


@pytest.mark.parametrize("text", ["小书", "a=b", "it's", "the chess club", "what? (now)", "[1"])
def test_a_value_outside_the_grammar_is_text(probe, capsys, text):
    assert cli.run(["probe", f"model={text}"]) == 0
    assert f"model={text!r}," in capsys.readouterr().out


def test_a_group_is_chosen_by_name(probe, capsys):
    assert cli.run(["probe", "optim=adamw"]) == 0
    assert "Optim(lr=2.0, steps=20)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("limit={maths: 2}", "limit={'piqa': 50, 'maths': 2}"),
        ("limit.maths=2", "limit={'piqa': 50, 'maths': 2}"),
        ("limit.piqa=2", "limit={'piqa': 2}"),
        ("inner.workers=7", "inner=Limits(seconds=1.5, workers=7)"),
        ("inner={workers: 7}", "inner=Limits(seconds=1.5, workers=7)"),
    ],
)
def test_a_mapping_takes_new_members_and_a_group_its_unwritten_keys(probe, capsys, given, shown):
    assert cli.run(["probe", given]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["probee"], "no verb 'probee': did you mean `internjax probe`?"),
        (["probe", "optim.lrr=1"], "no key optim.lrr: did you mean optim.lr?"),
        (["probe", "optm.lr=1"], "no key optm.lr: did you mean optim.lr?"),
        (["probe", "lr=1"], "no key lr: did you mean optim.lr?"),
        (["probe", "mdoel=x"], "no key mdoel: did you mean model?"),
        (["probe", "zzzzzz=x"], "no key zzzzzz: `internjax probe` has"),
        (["probe", "+optim.lrr=1"], "no key optim.lrr: did you mean optim.lr?"),
        (["probe", "inner.wrokers=1"], "no key inner.wrokers: did you mean inner.workers?"),
        (["probe", "inner={wrokers: 1}"], "no key inner.wrokers: did you mean inner.workers?"),
        (["probe", "limit.maths=many"], "limit.maths='many' is not a whole number."),
        (["probe", "optim=adam"], "no option optim=adam: did you mean optim=adamw?"),
        (["probe", "optim.lr=fast"], "optim.lr='fast' is not a number."),
        (["probe", "optim.steps=[1"], "optim.steps='[1' is not a whole number."),
        (["probe", "a", "b"], "'b' is one argument too many: internjax probe takes MODEL"),
        (["catalog", "gett"], "no subverb 'gett': did you mean `internjax catalog get`?"),
        (["bench"], "internjax bench needs a subverb: decode, serve, kernels."),
        (["bench", "decod"], "did you mean `internjax bench decode`?"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_2(probe, capsys, argv, message):
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_exit_codes(probe, capsys):
    assert cli.run(["probe", "fail=gate"]) == 1
    assert capsys.readouterr().err == "error: identity 40 % is below 90 %\n"
    assert cli.run(["probe", "fail=keys"]) == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(["probe", "fail=bug"])


def test_a_run_leaves_nothing_behind_and_a_sweep_works(probe, capsys):
    assert cli.run(["probe"]) == 0
    assert list(Path.cwd().iterdir()) == []
    assert cli.run(["probe", "-m", "optim.steps=1,2"]) == 0
    out = capsys.readouterr().out
    assert "steps=1)" in out
    assert "steps=2)" in out
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]


def test_positional_and_remaining_words():
    assert cli.parse(["convert", "a b", "c"])[1] == ["src='a b'", "dst='c'"]
    assert cli.parse(["chat", "m", "what", "is", "it?"])[1] == ["model='m'", "prompt='what is it?'"]
    assert cli.parse(["data", "x=1"])[1] == ["action=run", "x=1"]
    assert cli.parse(["data", "check", "dir"])[1] == ["action=check", "input='dir'"]
    assert cli.parse(["serve", "/a=b/c", "~x", "+y=1", "-m"])[1:] == (
        ["~x", "+y=1", "model='/a=b/c'"],
        ["-m"],
    )
    with pytest.raises(UserError, match="SRC DST"):
        cli.parse(["convert", "a", "b", "c"])
    assert issubclass(GateFailed, UserError)


@pytest.mark.parametrize("words", [["--port=8000"], ["--port", "8000"]])
def test_a_dashed_option_is_told_its_key(words, capsys):
    assert cli.run(["serve", "tiny", *words]) == 2
    assert "no option --port: did you mean serve.port=" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"internjax {internjax.__version__}\n"


def test_an_interrupt_that_python_could_only_report_comes_again():
    """A garbage collector's callback (JAX has one) swallows Ctrl-C: the server used to start."""
    code = """if True:
        import gc, time
        from internjax.interrupts import keep_interrupts
        def swallow(phase, info):
            gc.callbacks.clear()
            raise KeyboardInterrupt
        keep_interrupts()
        gc.callbacks.append(swallow)
        gc.collect()
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            print("stopped")
        """
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


def test_an_interrupt_waits_for_the_import_under_way(tmp_path):
    """JAX's extensions turn one into an ImportError, or abort."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.3)\n"
    )
    code = """if True:
        import time
        from internjax.interrupts import keep_interrupts
        keep_interrupts()
        import slow
        print("imported")
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            print("stopped")
        """
    done = python("-c", f"import sys; sys.path.append({str(tmp_path)!r})\n{code}")
    assert (done.stdout, done.stderr) == ("imported\nstopped\n", "")


def test_help_shows_docstring_keys_and_groups(probe, capsys):
    assert cli.run(["probe", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Shows what it was given.\n\nMore words about it.")
    assert "internjax probe [MODEL] [key=value...]" in text
    assert "model=smollm2-135m-instruct  published name or path, as `load` takes it" in text
    assert 'how to fail: "#gate" is not a comment' in text
    assert "optim=sgd   (one of adamw, sgd)" in text
    assert "optim.lr=1e-3" in text


def test_help_of_the_whole_names_every_verb(capsys):
    for argv in ([], ["--help"]):
        assert cli.run(argv) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {verb}" in text for verb, _ in cli.VERBS)


@pytest.mark.parametrize("root", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_every_root_explains_every_key(root):
    """The comments are the help: a key says what it means, or the group it stands in does."""
    keys = read_keys((CONFIGS / f"{root}.yaml").read_text(encoding="utf-8"))
    groups = {key.path for key in keys if key.note and not key.default}
    mute = [key.path for key in keys if key.default and not key.note]
    assert [path for path in mute if path.rpartition(".")[0] not in groups] == []
    assert describe(CONFIGS, root)


@pytest.mark.parametrize("module", sorted({line.module for line in cli.VERBS.values()}))
def test_every_verb_has_its_experiment_and_root(module):
    path = EXPERIMENTS / f"{module}.py"
    if not path.is_file():
        pytest.skip(f"{module} is not in this version")
    assert docstring(path)
    assert (CONFIGS / f"{module}.yaml").is_file()
    source = path.read_text(encoding="utf-8")
    assert f'config_name="{module}"' in source
    verb = next(verb for (verb, _), row in cli.VERBS.items() if row.module == module)
    assert f'run(["{verb}", *sys.argv[1:]])' in source  # a script is the verb's own program


def test_reads_comments_as_they_are_written():
    text = textwrap.dedent("""
        defaults:
          - data: fineweb
          - optional arch: tiny
          - _self_
        # one
        # two
        a: "x # y"  # three
        b:
          c: [1, 2]   # list
          d: p#q
        e: ???  # needed
        """)
    keys = {key.path: (key.default, key.note) for key in read_keys(text)}
    assert keys == {
        "a": ('"x # y"', "one two three"),
        "b": ("", ""),
        "b.c": ("[1, 2]", "list"),
        "b.d": ("p#q", ""),
        "e": ("???", "needed"),
    }
    assert read_groups(text) == {"data": "fineweb", "arch": "tiny"}


def python(*argv: str, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=env, timeout=60, **options
    )


def test_importing_the_package_is_light():
    """Under half a second (measured: 0.01 s): nothing heavy may be imported with it."""
    heavy = ("jax", "numpy", "hydra", "flax", "rich", "tokenizers")
    code = f"import internjax, internjax.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = python("-c", code)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_script_and_the_verb_are_one_program(tmp_path):
    script = python(str(EXPERIMENTS / "catalog.py"), "kindd=model", cwd=tmp_path)
    verb = python("-m", "internjax.cli", "catalog", "kindd=model", cwd=tmp_path)
    assert (script.returncode, script.stderr) == (verb.returncode, verb.stderr)
    assert verb.returncode == 2
    assert "did you mean kind?" in verb.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["--help", "catalog ls"])
def test_a_closed_pipe_is_quiet_and_no_failed_gate(line):
    command = f"{sys.executable} -m internjax.cli {line} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)
