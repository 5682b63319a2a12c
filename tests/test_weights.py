"""Every kind of weight computes what its plain array computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import quantize_array
from internjax.weights import (
    Fp8Weight,
    LoraWeight,
    QuantWeight,
    dequantize,
    einsum,
    num_weights,
    plain,
    take,
)

D, N, H, R = 8, 4, 6, 3
SPECS = {  # spec -> shape of x, input and output dims of the weight
    "BTD,DNH->BTNH": ((2, 5, D), (D,), (N, H)),
    "BTNH,NHD->BTD": ((2, 5, N, H), (N, H), (D,)),
    "BTD,DF->BTF": ((2, 5, D), (D,), (10,)),
}


def drawn(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_is_the_merged_weight(spec: str, quantized: bool):
    shape, ins, outs = SPECS[spec]
    x, base = drawn(0, *shape), drawn(1, *ins, *outs)
    if quantized:
        base = quantize_array(base, len(ins), 4)
    w = LoraWeight(base, drawn(2, *ins, R), drawn(3, R, *outs), 0.7)
    merged = plain(base, jnp.float64) + 0.7 * np.tensordot(w.a, w.b, 1)
    want = np.einsum(spec, x, merged)
    np.testing.assert_allclose(einsum(spec, x, w), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plain(w, jnp.float64), merged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_integers_are_the_expanded_weight(spec: str):
    shape, ins, outs = SPECS[spec]
    x, w = drawn(0, *shape), quantize_array(drawn(1, *ins, *outs), len(ins), 4)
    expanded = np.asarray(dequantize(w, jnp.float64))
    assert expanded.shape == ins + outs
    np.testing.assert_allclose(einsum(spec, x, w), np.einsum(spec, x, expanded), rtol=0, atol=1e-12)
    assert num_weights(w) == np.prod(ins + outs)


def test_nibbles_groups_and_zeros_by_hand():
    """Two groups of two inputs, one output, written out from the format."""
    w = QuantWeight(
        values=jnp.array([[0x3 | 0xF << 4], [0x0 | 0x8 << 4]], jnp.uint8),
        scales=jnp.array([[0.5], [2.0]]),
        zeros=jnp.array([[3.0], [7.5]]),
        in_shape=(4,),
        out_shape=(1,),
    )
    np.testing.assert_array_equal(dequantize(w, jnp.float64)[:, 0], [0, 6, -15, 1])


def test_an_adapter_that_was_just_made_changes_nothing():
    x, base = drawn(0, 2, 5, D), drawn(1, D, 10)
    w = LoraWeight(base, drawn(2, D, R), jnp.zeros((R, 10)), 2.0)
    np.testing.assert_array_equal(einsum("BTD,DF->BTF", x, w), einsum("BTD,DF->BTF", x, base))


def test_rows_are_looked_up_in_the_asked_dtype():
    table, ids = drawn(0, 7, 3), jnp.array([[6, 0]], jnp.int32)
    got = take(table, ids, jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got[0, 0], table[6].astype(jnp.float32))


def test_fp8_products_are_within_their_rounding_and_train():
    x, w, g = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate(((64, 32), (32, 48), (64, 48)))
    )
    exact, pull = jax.vjp(lambda x, w: x @ w, x, w)
    got, pull8 = jax.vjp(lambda x, w: einsum("TD,DF->TF", x, Fp8Weight(w)), x, w)
    # e4m3 keeps 3 bits after the point, e5m2 keeps 2: they round by 2^-4 and 2^-3 at most.
    assert np.linalg.norm(got - exact) < 2**-4 * np.linalg.norm(exact)
    for a, b in zip(pull8(g), pull(g), strict=True):
        assert 0 < np.linalg.norm(a - b) < 2**-3 * np.linalg.norm(b)
    assert np.all(np.asarray(einsum("TD,DF->TF", jnp.zeros_like(x), Fp8Weight(w))) == 0)
