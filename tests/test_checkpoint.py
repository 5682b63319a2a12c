"""Checkpoints: what comes back is what was saved, and only whole ones are ever seen."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from internjax.checkpoint import Checkpoints, changes
from internjax.errors import Corrupt, Missing, UserError
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
            checkpoints.save(step, tree(step), settings)
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


def test_every_so_many_steps_one_stays_for_good(tmp_path: Path):
    with Checkpoints(tmp_path, keep=1, keep_every=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, {"x": jnp.int32(step)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "8"]


def test_changed_settings_are_named_key_by_key_and_refused_unless_allowed(tmp_path: Path):
    old = {"lr": 0.1, "optim": {"b1": 0.9, "name": "lion", "no_decay": ("a",)}, "gone": 1}
    new = {"lr": 0.1, "optim": {"b1": 0.8, "name": "lion", "no_decay": ("a",)}, "new": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), old)
    with Checkpoints(tmp_path) as checkpoints:
        said = r"\(gone: was 1, is absent; new: was absent, is None; optim.b1: was 0.9, is 0.8\)"
        with pytest.raises(UserError, match=f"step 1 .*{said}.*run.allow_changes=true"):
            checkpoints.restore(tree(), expect=new)
        step, got = checkpoints.restore(tree(), expect=new, allow_changes=True)
        assert_same(got, tree(1))
        assert changes(checkpoints.settings(step), old) == []


def test_without_a_checkpoint_restoring_says_so(tmp_path: Path):
    missing = pytest.raises(Missing, match="no whole checkpoint is there")
    with Checkpoints(tmp_path) as checkpoints, missing:
        checkpoints.restore(tree(), expect={})


@pytest.mark.parametrize(
    ("like", "complaint"),
    [
        ({"w": jnp.zeros((8, 6))}, "half is in it and not here; n/0 is in it"),
        (tree() | {"x": jnp.zeros(2)}, r"another model or optimizer \(x is not in it\)"),
        (tree() | {"w": jnp.zeros((6, 8))}, r"w is \[8, 6\] in it, \[6, 8\] here"),
        (tree() | {"w": jnp.zeros((16, 3))}, r"w is \[8, 6\] in it, \[16, 3\] here"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path, like, complaint: str):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(), {})
        checkpoints._manager.wait_until_finished()
        with pytest.raises(UserError, match=complaint):
            checkpoints.restore(like, expect={})


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda f: shortened(max((f / "tree").rglob("d/*"))), r"has \d+ bytes of \d+"),
        (lambda f: max((f / "tree").rglob("d/*")).unlink(), "is missing"),
        (lambda f: (f / "notes" / "metadata").write_text("x" * 12), "is damaged: .*char 0"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_names_the_file(tmp_path: Path, harm, complaint):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(), {"lr": 0.15})  # the settings' file has twelve bytes
    harm(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(Corrupt, match=complaint):
        checkpoints.restore(tree(), expect={"lr": 0.15})


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


def laid(leaf, mesh, *spec):
    return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))


def test_a_checkpoint_moves_to_another_mesh_and_back(tmp_path: Path):
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, tree(1), {})
    mesh = make_mesh(MeshConfig(tensor=4))
    like = jax.device_put(tree(), NamedSharding(mesh, P()))
    like["w"] = laid(like["w"], mesh, "tensor")
    with Checkpoints(tmp_path / "a") as checkpoints:
        _, got = checkpoints.restore(like, expect={})
    assert got["w"].sharding == like["w"].sharding
    assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, tree(1)))
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(1, got, {})
    two = laid(tree()["w"], make_mesh(MeshConfig(tensor=2)), None, "tensor")
    with Checkpoints(tmp_path / "b") as checkpoints:
        _, back = checkpoints.restore(tree() | {"w": two}, expect={})
    assert back["w"].sharding == two.sharding
    assert_same(jax.tree.map(np.asarray, back), jax.tree.map(np.asarray, tree(1)))


@pytest.mark.parametrize("spec", [(), ("tensor",), (None, "tensor"), (None, None, "tensor")])
def test_stacked_layers_come_back_in_chunks_and_chunks_as_a_stack(tmp_path: Path, spec):
    """A pipeline wants [C, L / C, ...] where one device saved [L, ...]: the same numbers."""
    stacked = jnp.arange(8.0 * 6).reshape(8, 6)
    mesh = make_mesh(MeshConfig(tensor=2))
    chunks = laid(jnp.zeros((4, 2, 6), jnp.bfloat16), mesh, *spec)  # and in another dtype
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, {"w": stacked}, {})
        checkpoints._manager.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"w": chunks})
        _, got = checkpoints.restore(shapes, expect={})
    assert got["w"].sharding == chunks.sharding and got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got["w"]).reshape(8, 6), np.asarray(stacked))
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(1, got, {})
        checkpoints._manager.wait_until_finished()
        _, back = checkpoints.restore({"w": laid(stacked, mesh, *spec[1:])}, expect={})
    np.testing.assert_array_equal(np.asarray(back["w"]), np.asarray(stacked))


def test_the_parameters_alone_come_out_of_a_checkpoint(tmp_path: Path):
    state = {"params": {"a": jnp.arange(6.0)}, "opt_state": (jnp.ones(3),), "step": jnp.int32(7)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [7]
        assert checkpoints.stored(7)["params/a"] == jax.ShapeDtypeStruct((6,), jnp.float32)
        params = checkpoints.restore_part("params", {"a": jnp.zeros(6, jnp.bfloat16)}, step=7)
    assert params["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["a"], np.float32), np.arange(6.0))


def test_an_address_is_handed_on_as_it_is():
    """There is no such bucket here: it is TensorStore or Orbax that says so, not a local path."""
    with pytest.raises(Exception, match=r"(?i)gs|bucket|gcs"):
        Checkpoints("gs://no-such-bucket-of-internjax/run")
    assert not Path("gs:").exists()


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
