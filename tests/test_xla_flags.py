"""Importing the package names the flags of XLA that help here, unless the user named them."""

import os
import subprocess
import sys

import jax
import pytest

from internjax import xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type=dot,individual_dot,eltwise,reduce"


@pytest.fixture
def no_backend(monkeypatch):
    monkeypatch.setattr(xla_flags, "backend_is_up", lambda modules: False)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, FLAG),
        ("--xla_cpu_ftz=true", f"--xla_cpu_ftz=true {FLAG}"),
        ("--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
        # another flag whose name begins alike is not the same flag
        ("--xla_cpu_experimental_ynn=1", f"--xla_cpu_experimental_ynn=1 {FLAG}"),
    ],
)
def test_what_the_user_named_stays(no_backend, given, want):
    environ = {} if given is None else {"XLA_FLAGS": given}
    xla_flags.recommend(xla_flags.AMX_FLAGS, environ)
    assert environ == {"XLA_FLAGS": want}
    xla_flags.recommend(xla_flags.AMX_FLAGS, environ)
    assert environ == {"XLA_FLAGS": want}


def test_nothing_is_set_where_nothing_helps():
    environ = {}
    xla_flags.recommend({}, environ)
    assert environ == {}


@pytest.mark.parametrize(("features", "amx"), [("fma amx_int8", True), ("fma avx512_vnni", False)])
def test_amx_is_read_from_the_first_cpu(tmp_path, monkeypatch, features, amx):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {features}\n\nprocessor : 1\n")
    assert xla_flags.has_amx(tmp_path / "cpuinfo") == amx
    monkeypatch.setattr(xla_flags, "KNOWN_IN", ("",))
    assert (xla_flags.fitting(tmp_path / "cpuinfo") == xla_flags.AMX_FLAGS) == amx
    monkeypatch.setattr(xla_flags, "KNOWN_IN", ("0.0.",))  # XLA may not know the flag
    assert xla_flags.fitting(tmp_path / "cpuinfo") == {}


def test_no_cpuinfo_is_no_amx(tmp_path):
    assert not xla_flags.has_amx(tmp_path / "absent")


def test_a_started_backend_is_one_warning():
    jax.devices()
    environ = {"XLA_FLAGS": "--xla_cpu_ftz=true"}
    with pytest.warns(UserWarning, match=f"too late for {FLAG}") as seen:
        xla_flags.recommend(xla_flags.AMX_FLAGS, environ)
    assert len(seen) == 1
    assert environ == {"XLA_FLAGS": "--xla_cpu_ftz=true"}


def test_xla_takes_the_flags():
    """In a process of its own, which XLA would end at a flag or a value that it does not know."""
    code = """
from internjax import xla_flags
xla_flags.recommend(xla_flags.AMX_FLAGS)
import jax.numpy as jnp
x = jnp.ones((4, 32), jnp.bfloat16)
print(float((x @ jnp.ones((32, 8), jnp.int8).astype(x.dtype)).sum()))
"""
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1024.0"), done.stderr
