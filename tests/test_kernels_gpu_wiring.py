"""What a model takes by itself on a Hopper GPU: traced as for one, which needs none."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import quantize_array
from internjax.errors import UserError
from internjax.experiments.kernel_steps import STEPS, Step, float_copies, weight_sizes
from internjax.kernels.platform import readable
from internjax.models import cache_blocks, rope
from internjax.models.cache import attend_layer, init_cache, rotate_and_write
from internjax.models.moe import block_product, expert_product
from internjax.plan.kernels import launches
from internjax.serve.engine import EngineConfig
from internjax.weights import LoraWeight, einsum, num_weights, plain, turned
from tests.interpreting import interpreter
from tests.targets import H100, on


def drawn(seed: int, *shape: int, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def traced(step: Step):
    fn, args = step.build()
    return jax.make_jaxpr(lambda *args: fn(*args))(*args).jaxpr, args


def calls(jaxpr) -> dict[str, int]:
    return dict(Counter(name for name, _ in launches(jaxpr)))


@pytest.mark.parametrize("name", STEPS)
def test_a_decoding_step_takes_the_kernels_and_no_float_copy_of_its_weights(name: str):
    with on(H100):
        jaxpr, args = traced(STEPS[name])
    assert calls(jaxpr) == STEPS[name].calls
    assert weight_sizes(args) and not list(float_copies(jaxpr, weight_sizes(args)))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "cpu"])
def test_elsewhere_it_takes_none(kind: str):
    """And what looks for copies finds those that XLA's way makes: the test of the test."""
    step = replace(STEPS["decoding step, int4"], prepared=False)
    with on(kind):
        jaxpr, args = traced(step)
    assert calls(jaxpr) == {} and list(float_copies(jaxpr, weight_sizes(args)))
    with on(H100), readable():
        assert calls(traced(step)[0]) == {}


def test_a_turned_weight_is_the_same_weight():
    stack = quantize_array(drawn(0, 3, 4, 16, 6, dtype=jnp.float32), 2, 32, lead=1)
    other = turned(stack)
    assert other.values.shape == (3, 6, 64) and turned(other) is other
    assert num_weights(other) == num_weights(stack) == 3 * 64 * 6
    want = plain(stack, jnp.float32)
    np.testing.assert_allclose(plain(other, jnp.float32), want, rtol=0, atol=1e-6)
    one, x = jax.tree.map(lambda leaf: leaf[1], other), drawn(1, 2, 5, 4, 16, dtype=jnp.float32)
    lora = LoraWeight(one, drawn(2, 4, 16, 3), drawn(3, 3, 6), 0.5)
    got = einsum("BTNH,NHD->BTD", x, lora)  # on a CPU: expanded, as any other
    want = einsum("BTNH,NHD->BTD", x, plain(lora, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


def test_gradients_pass_the_kernel():
    w, x = quantize_array(drawn(0, 256, 128), 1, 64), drawn(1, 1, 100, 256)
    with on(H100):
        pull = jax.make_jaxpr(lambda x: jax.vjp(lambda x: einsum("BTD,DF->BTF", x, w), x)[1](
            jnp.ones((1, 100, 128), jnp.bfloat16)))(x)  # fmt: skip
        wide = jax.make_jaxpr(lambda x: einsum("BTD,DF->BTF", x, w, widened=True))(x)
    assert "quant_matmul_int4_bfloat16_many" in calls(pull.jaxpr)
    assert calls(wide.jaxpr) == {}  # the kernel rounds its sums
    assert wide.out_avals[0].dtype == jnp.float32


def test_experts_take_the_kernel_and_elsewhere_the_loop():
    rows, w = drawn(0, 3, 8, 128), drawn(1, 2, 128, 64, dtype=jnp.float32)
    owner, used = jnp.array([0, 1, 1]), jnp.array(2)
    with on(H100):
        jaxpr = jax.make_jaxpr(lambda *args: expert_product(*args))(rows, w, owner, used)
    assert calls(jaxpr.jaxpr) == {"grouped_matmul_few": 1}
    want = block_product(rows, w.astype(rows.dtype), owner, used)
    np.testing.assert_array_equal(expert_product(rows, w, owner, used), want)


def test_a_cache_of_rows_is_rotated_written_and_read_as_blocks():
    """Two rows, one at the edge of a block; a third is full and writes nothing."""
    cfg = replace(STEPS["decoding step, int4"].cfg, num_layers=1, num_heads=2, num_kv_heads=1)
    empty = init_cache(cfg, 3, 128, "bfloat16")
    cache = empty.replace(k=(drawn(0, 3, 128, 1, 64),), v=(drawn(1, 3, 128, 1, 64),))
    qkv = tuple(drawn(i, 3, 1, heads, 64) for i, heads in ((2, 2), (3, 1), (4, 1)))
    start = jnp.array([64, 5, 128], jnp.int32)
    freq = jnp.asarray(rope.inv_freq(cfg), jnp.float32)
    angle = rope.angles(start[:, None], freq, jnp.float32)
    q, want = rotate_and_write(cache, 0, *qkv, angle, 1.5, start)
    mixed = attend_layer(q, want, 0, start)
    with interpreter() as interpret:
        rows = cache.k[0], cache.v[0]
        places = jnp.array([[64], [128 + 5], [-1]], jnp.int32)
        got_q, *got = cache_blocks.rotate_and_write(
            *qkv, angle, 1.5, *rows, places, interpret=interpret
        )
        got_mixed = cache_blocks.attend(q, want.k[0], want.v[0], start, interpret=interpret)
        # Rows 0 and 1 again, their blocks in another order: 0, 1, 2, 3 of 64 at 3, 0, 5, 1.
        order, table = jnp.array([3, 0, 5, 1]), jnp.array([[3, 0], [5, 1], [0, 0]])
        small = [jnp.zeros((6, 64, 1, 64), x.dtype) for x in rows]
        small = [
            x.at[order].set(y[0][:2].reshape(4, 64, 1, 64))
            for x, y in zip(small, (want.k, want.v), strict=True)
        ]
        tabled = cache_blocks.attend(q, *small, start, None, table, interpret=interpret)
        got_q, got, got_mixed, tabled = jax.tree.map(np.asarray, (got_q, got, got_mixed, tabled))
    np.testing.assert_array_equal(tabled[:2], got_mixed[:2])
    close = {"rtol": 2**-7, "atol": 2**-7}  # roundings of bfloat16
    wide = lambda x: np.asarray(x, np.float32)  # noqa: E731
    np.testing.assert_allclose(wide(got_q), wide(q), **close)
    for mine, theirs in zip(got, (want.k[0], want.v[0]), strict=True):
        np.testing.assert_allclose(wide(mine), wide(theirs), **close)
    np.testing.assert_allclose(wide(got_mixed)[:2], wide(mixed)[:2], **close)


def test_weights_are_turned_for_a_hopper_gpu_only():
    with pytest.raises(UserError, match="weights=turn is for the GPU kernels: its code is for"):
        EngineConfig(weights="turn")
    with on(H100):
        assert EngineConfig(weights="turn").weights == "turn"
