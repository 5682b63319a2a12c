"""Blocks of rows times their experts' weights: the interpreted Hopper kernel and plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import quantize_array
from internjax.kernels.gpu.grouped_matmul import grouped_matmul, reference
from internjax.kernels.gpu.quant_matmul import from_int4, to_fp8, to_int8
from internjax.models.moe import block_product
from tests.interpreting import interpreter


def drawn(seed: int, *shape: int, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def int4(w):
    packed = quantize_array(w, 1, 64, lead=1)
    return from_int4(packed.values, packed.scales, packed.zeros)


KINDS = {"plain": lambda w: w, "int4": int4, "int8": to_int8, "fp8": lambda w: to_fp8(w, block=128)}


def run(kind: str, M: int, R: int, I: int, O: int, used: int):
    """Interpreted and plain results, the latter of rows in float32 where they are not rounded."""
    rows, w = drawn(0, M, R, I), KINDS[kind](drawn(1, 3, I, O))
    owner, used = jnp.arange(M, dtype=jnp.int32) % 3, jnp.asarray(used, jnp.int32)
    with interpreter() as interpret:
        got = grouped_matmul(rows, w, owner, used, implementation="pallas", interpret=interpret)
        got = np.asarray(got, np.float32)
    exact = rows if kind in ("fp8", "plain") else rows.astype(jnp.float32)
    return got, np.asarray(reference(exact, w, owner, used), np.float32)


def near(got, want) -> None:
    """One rounding of the result; with many rows, one of each expanded weight besides."""
    assert np.abs(got - want).max() <= 2**-6 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("M", "R", "I", "O", "used"),
    [
        (1, 8, 128, 64, 1),
        (3, 8, 128, 64, 2),
        (4, 16, 256, 192, 0),
        (2, 128, 256, 128, 2),
        (3, 256, 128, 256, 1),
    ],
)
def test_blocks_of_every_kind(kind: str, M: int, R: int, I: int, O: int, used: int):
    if kind == "fp8" and O % 128:
        pytest.skip("blocks of 128 outputs")
    got, want = run(kind, M, R, I, O, used)
    near(got, want)
    assert not got[used:].any()


def test_plain_blocks_and_their_gradients_are_those_of_the_model():
    rows, w, g = drawn(0, 3, 8, 64), drawn(1, 2, 64, 64), drawn(2, 3, 8, 64)
    owner, used = jnp.array([0, 1, 1], jnp.int32), jnp.asarray(2, jnp.int32)
    with interpreter() as interpret:

        def ours(rows, w):
            return grouped_matmul(
                rows, w, owner, used, implementation="pallas", interpret=interpret
            )

        got, pull = jax.vjp(ours, rows, w)
        found = jax.tree.map(lambda x: np.asarray(x, np.float32), (got, *pull(g)))
    wide = [x.astype(jnp.float32) for x in (rows, w, g)]
    want, pull = jax.vjp(lambda rows, w: block_product(rows, w, owner, used), *wide[:2])
    for mine, theirs in zip(found, (want, *pull(wide[2])), strict=True):
        near(mine, np.asarray(theirs))
    assert not found[0][2].any() and not found[1][2].any()


def test_what_is_not_served_is_named():
    rows, w = drawn(0, 2, 8, 64), drawn(1, 2, 64, 64)
    owner, used = jnp.zeros(2, jnp.int32), jnp.asarray(2, jnp.int32)

    def call(rows, w, **more):
        return grouped_matmul(rows, w, owner, used, implementation="pallas", **more)

    with pytest.raises(ValueError, match="blocks of 7 rows; legal are"):
        call(rows[:, :7], w, interpret=True)
    with pytest.raises(ValueError, match="64 inputs and 48 outputs; legal are multiples of 64"):
        call(rows, w[:, :, :48], interpret=True)
    with pytest.raises(ValueError, match="rows of float32"):
        call(rows.astype(jnp.float32), w, interpret=True)
    with pytest.raises(ValueError, match="sm_90"):
        call(rows, w)
    with pytest.raises(ValueError, match=r"rows \(2, 8, 32\), 64 inputs"):
        call(rows[:, :, :32], to_int8(w))
    got = grouped_matmul(rows, w, owner, used)  # None falls to what runs here
    np.testing.assert_array_equal(got, reference(rows, w, owner, used))
