"""The compiling process and what is kept of it; the verb without its environment."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from internjax.cli import run
from internjax.errors import Missing
from internjax.plan import compile as plan_compile
from internjax.plan.compile import ask, compile_step, kept, plan_python
from internjax.plan.hlo import read
from internjax.plan.topology import gpu_named

CHILD = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["n"] == 2:
        sys.stderr.write("warning: something\\nLLVM FATAL: size mismatch\\nbye\\n")
        sys.stderr.flush()
        os.abort()
    print(json.dumps({"twice": 2 * request["n"], "flags": os.environ.get("XLA_FLAGS")}), flush=True)
"""


def test_a_request_that_kills_the_process_is_answered_with_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "plan_test_child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    requests = [{"n": n} for n in (1, 2, 3, 4)]
    found = list(ask("plan_test_child", requests, python=Path(sys.executable)))
    assert [answer.get("twice") for answer in found] == [2, None, 6, 8]
    assert found[1]["error"] == "LLVM FATAL: size mismatch"
    assert found[0]["flags"] is None  # eight fake devices of these tests are not its business


def build(mesh):
    shape = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    weight = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    return (lambda w, x: w - jnp.dot(x, w, out_sharding=P("data")).sum(0)[None]), (weight, shape)


def test_a_step_is_compiled_once_and_kept(tmp_path):
    """On the CPU's devices: compiling for GPUs needs another environment (see plan_goldens)."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:4])
    first = compile_step(build, mesh, gpu_named("h100"), cache=tmp_path)
    again = compile_step(build, mesh, gpu_named("h100"), cache=tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert again == replace(first, cached=True) == replace(kept(tmp_path, first.key), cached=True)
    assert first.memory["peak"] > 0 and "metadata" not in first.text
    program = read(first.text, {"data": 4})
    assert program.flops == 2 * 4 * 32 * 8
    assert ("all-reduce", "data") in program.collectives()
    other = compile_step(build, mesh, gpu_named("a100-80"), cache=tmp_path)
    assert other.key != first.key  # another target is another program


def test_without_its_environment_the_verb_says_what_to_make(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_compile, "_has_plugin", lambda: False)
    missing = str(tmp_path / "none")
    with pytest.raises(Missing, match="make plan-env"):
        plan_python(missing)
    assert run(["plan", "run", "arch=internlm2-7b", f"env={missing}"]) == 2
    assert "make plan-env" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["arch=internlm2-7b", "gpus=12"], "gpus=12 does not fill nodes of 8"),
        (["arch=internlm2-7b", "gpu=v100"], "legal names are a100-40"),
        (["arch=internlm2-7b", "optimizer=sgd"], "optimizer=sgd: legal are adamw"),
        ([], "arch is missing"),
        (["arch=internlm2-7b", "constants.overlap=3"], "overlap=3"),
    ],
)
def test_bad_input_is_refused_at_once(words, complaint, capsys):
    assert run(["plan", "run", *words]) == 2
    assert complaint in capsys.readouterr().err
