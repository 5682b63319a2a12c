"""Checkpoints: what comes back is what was saved, and only whole ones are ever seen."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from internjax.checkpoint import Checkpoints
from internjax.errors import UserError
from internjax.mesh import MeshConfig, make_mesh


def tree(seed: int = 0):
    w = jax.random.normal(jax.random.key(seed), (8, 6))
    return {"w": w, "half": w.astype(jnp.bfloat16), "step": jnp.int32(seed), "n": (w[0], w[1])}


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def test_the_newest_comes_back_and_old_ones_go(tmp_path: Path):
    settings = {"lr": 0.1, "lora": {"targets": ("wq", "wo")}}  # JSON brings a tuple back as a list
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {**settings, "step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        step, got = checkpoints.restore(tree(), expect=settings)
    assert step == 3
    assert_same(got, tree(3))


def test_the_state_may_be_donated_while_it_is_written(tmp_path: Path):
    """The loop overwrites its state in the next update; the checkpoint must hold the old one."""
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((256, 1024))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 5):
            state = bump(state)
            checkpoints.save(step, {"x": state}, {})
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 5):
            got = checkpoints._manager.restore(step)["tree"]["x"]
            np.testing.assert_array_equal(got, np.full((256, 1024), step))


def test_changed_settings_are_named(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(), {"lr": 0.1, "rank": 8})
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"step 1 .*\(rank: was 8, is 16\)"),
    ):
        checkpoints.restore(tree(), expect={"lr": 0.1, "rank": 16})


def test_without_a_checkpoint_restoring_says_so(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no whole checkp"):
        checkpoints.restore(tree(), expect={})


def test_a_write_that_died_is_never_seen_and_goes(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
    # What kill -9 leaves: the folder under its temporary name, some of its files there.
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(1, tree(7), {})
    with Checkpoints(tmp_path) as checkpoints:
        step, got = checkpoints.restore(tree(), expect={})
    assert step == 1
    assert_same(got, tree(7))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_checkpoint_moves_to_another_mesh(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
    mesh = make_mesh(MeshConfig(data=4))
    like = jax.device_put(tree(), NamedSharding(mesh, P()))
    like["w"] = jax.device_put(like["w"], NamedSharding(mesh, P("fsdp")))
    with Checkpoints(tmp_path) as checkpoints:
        _, got = checkpoints.restore(like, expect={})
    assert got["w"].sharding == like["w"].sharding
    assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, tree(1)))


FULL = """
import resource, signal, sys
import jax
from pathlib import Path
from internjax.checkpoint import Checkpoints
from internjax.errors import UserError

folder = Path(sys.argv[1])
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (4,))}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}, {})
except UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing_half_written(tmp_path: Path):
    run = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert "cannot be written: File too large; whole ones there: 1." in done.stdout
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
