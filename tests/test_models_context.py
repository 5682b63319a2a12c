"""Law: attention of rows cut over devices is that of whole rows, at their memory and their work."""

from dataclasses import replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from internjax.collectives import Parallel
from internjax.data.batch import Batch
from internjax.data.pack import pack
from internjax.errors import UserError
from internjax.kernels import block_attention
from internjax.kernels.attention import attention, causal_mask
from internjax.mesh import MeshConfig, make_mesh
from internjax.models.context import attend_on
from internjax.models.decoder import init_params, run_layers
from internjax.train.place import balanced_order, placement
from tests.test_laws_sharding import TOLERANCE, assert_close, parts_and_grads, tiny

ROW = P(None, "context")


def packed(rows: int, length: int, vocab: int = 64) -> Batch:
    """Real packing of documents from a few tokens to half a row, with padding at the end."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, length // 2, 20 * rows)
    samples = [(rng.integers(0, vocab, n).tolist(), rng.integers(0, 2, n).tolist()) for n in sizes]
    found = [row for row in pack(samples, length) if (row.segment_ids == 0).any()][:rows]
    return jax.tree.map(lambda *xs: np.stack(xs), *found)


def cut_attention(ways: int, mode: str):
    """Returns `(q, k, v, g, positions, segment_ids) -> (out, gradients)` over a ring of devices."""
    mesh = make_mesh(MeshConfig(context=ways))
    par = Parallel(context="context", context_mode=mode)

    def local(q, k, v, g, positions, segment_ids):
        out, pull = jax.vjp(attend_on(positions, segment_ids, par), q, k, v)
        return out, pull(g)

    run = jax.shard_map(local, mesh=mesh, in_specs=ROW, out_specs=ROW, check_vma=False)
    return mesh, jax.jit(run)


@cache
def whole(dtype: str):
    """Packed rows, random q, k, v and a gradient, and what one device makes of them."""
    rng = np.random.default_rng(1)
    batch = packed(2, 48)
    draw = lambda heads: rng.normal(size=(2, 48, heads, 4)).astype(dtype)  # noqa: E731
    q, k, v, g = draw(16), draw(8), draw(8), draw(16)
    g = g * (batch.segment_ids > 0)[..., None, None].astype(dtype)  # nothing hangs on padding
    mask = causal_mask(jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), *map(jnp.asarray, (q, k, v)))
    return (q, k, v, g, batch.positions, batch.segment_ids), (out, pull(jnp.asarray(g)))


@pytest.mark.parametrize(
    ("mode", "ways", "dtype"),
    [*product(("ring", "ulysses"), (2, 4, 8), ("float64",)), ("ring", 4, "float32")],
)
def test_attention_of_cut_rows_is_that_of_whole_rows(mode: str, ways: int, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        given, want = whole(dtype)
        order = balanced_order(48, ways)
        mesh, run = cut_attention(ways, mode)
        put = lambda x: jax.device_put(x[:, order], NamedSharding(mesh, ROW))  # noqa: E731
        with jax.set_mesh(mesh):
            got = run(*map(put, given))
        real = (given[-1] > 0)[..., None, None]
        back = lambda x: np.asarray(x)[:, np.argsort(order)] * real  # noqa: E731
        want = jax.tree.map(lambda x: np.asarray(x) * real, want)
        assert_close(jax.tree.map(back, got), want, TOLERANCE[dtype], f"{mode} {ways}")


def test_blocks_of_keys_that_do_not_divide_a_piece_change_nothing(monkeypatch):
    """48 positions on 2 devices: pieces of 12 keys in blocks of 5."""
    monkeypatch.setattr(block_attention, "BLOCK", 5)
    test_attention_of_cut_rows_is_that_of_whole_rows("ring", 2, "float64")


MESHES = {
    "ring-8": (MeshConfig(context=8), 1),
    "ulysses-4": (MeshConfig(context=4, context_mode="ulysses"), 1),
    "ring-data-tensor": (MeshConfig(data=2, tensor=2, context=2), 1),
    "ulysses-data-tensor": (MeshConfig(data=2, tensor=2, context=2, context_mode="ulysses"), 1),
    "ring-zero3": (MeshConfig(data=2, context=4, zero=3), 2),
    "ring-pipe-zero1": (MeshConfig(data=2, pipe=2, context=2, zero=1), 2),
    "ulysses-pipe-zero1": (
        MeshConfig(data=2, pipe=2, context=2, zero=1, context_mode="ulysses"),
        2,
    ),
}
DEEP = ("ulysses-data-tensor", "ulysses-pipe-zero1")
CASES = [
    *(pytest.param("float64", name, marks=[pytest.mark.slow] * (name in DEEP)) for name in MESHES),
    ("float32", "ring-data-tensor"),
]


@cache
def one_device(dtype: str):
    cfg = replace(tiny(dtype, tied=True), num_layers=2)
    params = init_params(cfg, jax.random.key(0), jnp.dtype(dtype))
    data = vars(packed(8, 16))
    return cfg, params, data, parts_and_grads(params, data, cfg)


@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_a_model_on_cut_rows_equals_a_single_device(dtype: str, name: str):
    with jax.enable_x64(dtype == "float64"):
        cfg, params, data, want = one_device(dtype)
        mesh, micro = MESHES[name]
        with placement(mesh) as place:
            got = parts_and_grads(params, data, cfg, place, micro=micro)
        assert_close(got, want, TOLERANCE[dtype], name)


def matmuls(jaxpr) -> int:
    """Counts the matrix products that a device runs; a branch would make the count a guess."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name not in ("cond", "while"), eqn
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [matmuls(p) for p in eqn.params.values() if hasattr(p, "eqns")]
        total += times * sum(inner) + (eqn.primitive.name == "dot_general")
    return total


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_every_device_works_on_as_many_pieces_and_on_no_more_than_are_seen(ways: int):
    pieces, pairs = 2 * ways, 2 * ways + 1
    assert ways * pairs == pieces * (pieces + 1) // 2  # all pairs with the key not behind
    _, run = cut_attention(ways, "ring")
    heads, row = jnp.zeros((1, 16 * ways, 2, 4)), jnp.zeros((1, 16 * ways), jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(context=ways))):
        put = lambda x: jax.reshard(x, ROW)  # noqa: E731
        jaxpr = jax.make_jaxpr(run)(*[put(heads)] * 4, *[put(row)] * 2)
    # A pair costs 2 products (scores, mix) forward and 5 backward (scores, and one a gradient).
    assert matmuls(jaxpr.jaxpr) == 7 * pairs


def test_memory_is_that_of_a_devices_own_keys():
    """With equal parts of the rows a longer ring takes no more: no device keeps others' keys."""

    def temp(ways: int) -> int:
        mesh, run = cut_attention(ways, "ring")
        place = NamedSharding(mesh, ROW)
        shape = lambda *s, dtype: jax.ShapeDtypeStruct(s, dtype, sharding=place)  # noqa: E731
        heads = shape(1, 64 * ways, 4, 128, dtype=jnp.float32)
        row = shape(1, 64 * ways, dtype=jnp.int32)
        with jax.set_mesh(mesh):
            compiled = run.lower(heads, heads, heads, heads, row, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    keys = 2 * 64 * 4 * 128 * 4  # bytes of a device's keys and values
    # Four more devices: the places of their tokens are known, their keys would be 4 times `keys`.
    assert temp(8) - temp(4) < 0.25 * keys


def test_what_cannot_be_cut_is_refused_with_the_numbers():
    cfg = tiny("float32", tied=True)  # 8 heads, 4 KV heads
    ulysses = MeshConfig(tensor=2, context=4, context_mode="ulysses")
    with (
        placement(ulysses) as place,
        pytest.raises(UserError, match=r"4 KV heads .* mesh.context=4 .* mesh.tensor=2"),
    ):
        place.check(cfg, 8, 16, 1)
    with placement(replace(ulysses, context_mode="ring")) as place:
        place.check(cfg, 8, 16, 1)
    x, alone = jnp.zeros((1, 8, cfg.d_model)), Parallel(context="context")
    with pytest.raises(ValueError, match="positions"):
        run_layers({}, x, cfg, par=alone)
