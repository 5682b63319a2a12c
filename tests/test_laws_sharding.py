"""Law: a mesh changes nothing. Loss and every gradient leaf on 8 devices equal one device's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.mesh import MeshConfig, ShardingRules, make_mesh
from internjax.models.config import ModelConfig
from internjax.models.decoder import init_params, param_table
from internjax.models.params import param_shardings
from internjax.train.losses import next_token_loss

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=4),
    "data-fsdp": MeshConfig(data=2, fsdp=4),
    "data-tensor": MeshConfig(data=2, tensor=4),
    "fsdp-tensor": MeshConfig(fsdp=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
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


def loss_and_grads(params, data, cfg, rules=None):
    loss = lambda p: next_token_loss(p, Batch(**data), cfg, rules=rules)[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)


CASES = [
    ("float64", "tied", tuple(MESHES)),
    ("float64", "untied", ("all",)),
    ("float32", "tied", ("data", "fsdp", "tensor", "all")),
]


@pytest.mark.parametrize(("dtype", "head", "meshes"), CASES)
def test_sharded_equals_single_device(dtype: str, head: str, meshes: tuple[str, ...]):
    with jax.enable_x64(dtype == "float64"):
        cfg = tiny(dtype, tied=head == "tied")
        params = init_params(cfg, jax.random.key(0), jnp.dtype(dtype))
        data = batch(cfg.vocab_size)
        loss, grads = loss_and_grads(params, data, cfg)
        rules = ShardingRules()
        for name in meshes:
            mesh = make_mesh(MESHES[name])
            with jax.set_mesh(mesh):
                sharded = jax.device_put(params, param_shardings(param_table(cfg), mesh, rules))
                spec = NamedSharding(mesh, rules.spec("batch", "length"))
                got_loss, got = loss_and_grads(sharded, jax.device_put(data, spec), cfg, rules)
            bound = TOLERANCE[dtype]
            assert abs(float(got_loss) - float(loss)) <= bound * abs(float(loss)), name

            def close(path, a, b, name=name, bound=bound):
                error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)
                assert error <= bound, (name, jax.tree_util.keystr(path), error)

            jax.tree_util.tree_map_with_path(close, got, grads)


def test_a_mesh_that_does_not_divide_is_refused_with_the_numbers():
    cfg = tiny("float32", tied=True)
    with pytest.raises(UserError, match=r"kv_heads has 4 entries, which mesh tensor=8"):
        param_shardings(param_table(cfg), make_mesh(MeshConfig(tensor=8)), ShardingRules())
    with pytest.raises(UserError, match=r"needs 16 devices, 8 are there"):
        make_mesh(MeshConfig(data=16))
