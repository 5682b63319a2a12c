"""Law: a mesh changes nothing. Loss and every gradient leaf on 8 devices equal one device's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.mesh import MeshConfig, make_mesh
from internjax.models.config import ModelConfig
from internjax.models.decoder import init_params
from internjax.models.remat import Remat
from internjax.train.losses import LossConfig, Stages
from internjax.train.place import ONE_DEVICE, Placement, placement

MESHES = {
    "data": MeshConfig(data=8, zero=0),
    "zero1": MeshConfig(data=8, zero=1),
    "zero2": MeshConfig(data=8, zero=2),
    "zero3": MeshConfig(data=8, zero=3),
    "hybrid1": MeshConfig(data=8, zero=1, zero_group=2),
    "hybrid3": MeshConfig(data=8, zero=3, zero_group=4),
    "tensor": MeshConfig(tensor=4),
    "data-tensor": MeshConfig(data=2, tensor=4, zero=0),
    "zero3-tensor": MeshConfig(data=4, tensor=2, zero=3),
}
# Pipelines: the mesh and the micro-batches that pass.
PIPELINES = {
    "pipe": (MeshConfig(pipe=4), 4),
    "gpipe": (MeshConfig(pipe=4, schedule="gpipe"), 8),
    "interleaved": (MeshConfig(pipe=2, chunks=2), 4),
    "data-tensor-pipe": (MeshConfig(data=2, tensor=2, pipe=2), 2),
    "pipe-zero1": (MeshConfig(data=2, pipe=4, zero=1), 4),
    "interleaved-zero2": (MeshConfig(data=2, pipe=2, chunks=2, zero=2), 4),
    "pipe-zero3-tensor": (MeshConfig(data=2, pipe=2, tensor=2, zero=3), 4),
}
# float64: only the order of sums differs, so anything above rounding is a wrong collective.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def tiny(dtype: str, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        family="llama",
        num_layers=3,
        d_model=32,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        d_ff=64,
        vocab_size=64,
        max_context=64,
        norm_eps=1e-5,
        tie_embeddings=tied,
        qkv_bias=not tied,
        output_bias=not tied,
        qk_norm=tied,
        dtype=dtype,
    )


def batch(vocab: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    segments = np.ones((8, 16), np.int32)
    segments[:, 9:] = 2
    return {
        "tokens": jnp.asarray(rng.integers(0, vocab, (8, 16)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, vocab, (8, 16)), jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(np.tile(np.r_[0:9, 0:7], (8, 1)), jnp.int32),
        "loss_mask": jnp.asarray(rng.integers(0, 2, (8, 16)), jnp.float32),
    }


def parts_and_grads(
    params, data, cfg: ModelConfig, place: Placement = ONE_DEVICE, *, micro=1, remat=Remat()
):
    """The summed loss and its gradients, with everything in it that adds up over devices."""
    extra = LossConfig(smoothing=0.1, z_loss=1e-3, chunk=4)
    stages = Stages(cfg, extra, remat, place.par)
    place.check(cfg, 8, 16, micro)
    gradients = jax.jit(place.gradients(stages, micro_batches=micro))
    parts, grads = gradients(place.params(params, cfg), place.batch(Batch(**data)), None)
    return parts, place.joined(grads)


def assert_close(got, want, bound: float, name: str) -> None:
    """Every part and every gradient leaf, norm-wise."""

    def close(path, a, b):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / (np.linalg.norm(b) or 1)
        assert error <= bound, (name, jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(close, got, want)


CASES = [
    ("float64", "tied", tuple(MESHES)),
    ("float64", "untied", ("zero1", "zero3-tensor")),
    ("float32", "tied", ("data", "zero1", "zero3", "tensor", "zero3-tensor")),
]


@pytest.mark.parametrize(("dtype", "head", "meshes"), CASES)
def test_sharded_equals_single_device(dtype: str, head: str, meshes: tuple[str, ...]):
    with jax.enable_x64(dtype == "float64"):
        cfg = tiny(dtype, tied=head == "tied")
        params = init_params(cfg, jax.random.key(0), jnp.dtype(dtype))
        data = batch(cfg.vocab_size)
        want = parts_and_grads(params, data, cfg)
        for name in meshes:
            with placement(MESHES[name]) as place:
                got = parts_and_grads(params, data, cfg, place)
            assert_close(got, want, TOLERANCE[dtype], name)


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, "tied") for name in PIPELINES), ("data-tensor-pipe", "untied")],
)
def test_a_pipeline_equals_a_single_device(name: str, head: str):
    with jax.enable_x64(True):
        cfg = replace(tiny("float64", tied=head == "tied"), num_layers=4)
        params = init_params(cfg, jax.random.key(0), jnp.float64)
        data = batch(cfg.vocab_size)
        want = parts_and_grads(params, data, cfg)
        mesh, micro = PIPELINES[name]
        with placement(mesh) as place:
            got = parts_and_grads(params, data, cfg, place, micro=micro)
            assert_close(got, want, TOLERANCE["float64"], name)
            parts = place.parts(Stages(cfg, LossConfig(0.1, 1e-3), par=place.par))
            told = jax.jit(parts)(place.params(params, cfg), place.batch(Batch(**data)), None)
        assert_close(told, want[0], TOLERANCE["float64"], name)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("remat", [Remat(), Remat("full"), Remat("dots", fraction=0.34)], ids=str)
def test_micro_batches_and_recomputing_change_nothing_on_a_mesh(zero: int, remat: Remat):
    with jax.enable_x64(True):
        cfg = tiny("float64", tied=True)
        params = init_params(cfg, jax.random.key(0), jnp.float64)
        data = batch(cfg.vocab_size)
        want = parts_and_grads(params, data, cfg)
        with placement(MeshConfig(data=4, tensor=2, zero=zero, zero_group=2)) as place:
            got = parts_and_grads(params, data, cfg, place, micro=2, remat=remat)
        assert_close(got, want, 1e-12, f"zero {zero}")


def test_a_mesh_that_does_not_divide_is_refused_with_the_numbers():
    cfg = tiny("float32", tied=True)
    with (
        placement(MeshConfig(tensor=8)) as place,
        pytest.raises(UserError, match=r"kv_heads has 4 entries, which mesh tensor=8"),
    ):
        place.check(cfg, 8, 16, 1)
    with placement(MeshConfig(data=4, tensor=2)) as place:
        with pytest.raises(UserError, match=r"batch_size=6 is not a multiple of micro_batches=1"):
            place.check(cfg, 6, 16, 1)
        with pytest.raises(UserError, match=r"length=15 is not a multiple of 2"):
            place.check(cfg, 8, 15, 1)
    with pytest.raises(UserError, match=r"needs 16 devices, 8 are there"):
        make_mesh(MeshConfig(data=16))
    with pytest.raises(UserError, match=r"mesh.zero_group=3 does not cut mesh.data=8"):
        MeshConfig(data=8, zero_group=3)
