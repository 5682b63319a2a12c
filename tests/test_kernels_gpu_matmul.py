"""Quantized matrix products of the Hopper kernels, interpreted on the CPU, against plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import quantize_array
from internjax.kernels.gpu.quant_matmul import (
    Matrix,
    expand,
    from_int4,
    quant_matmul,
    tiles_of,
    to_fp8,
    to_int8,
)
from internjax.kernels.int4_layouts import from_awq, from_gptq, from_q4_1, pack_rows
from internjax.models.gguf_blocks import decode, encode
from internjax.weights import QuantWeight, dequantize
from tests.interpreting import interpreter


def drawn(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def int4(w, group: int) -> Matrix:
    packed = quantize_array(w, 1, group)
    return from_int4(packed.values, packed.scales, packed.zeros)


MAKE = {
    "int4 128": lambda w: int4(w, 128),
    "int4 64": lambda w: int4(w, 64),
    "int4 32": lambda w: int4(w, 32),
    "int4 whole": lambda w: int4(w, len(w)),
    "int8": to_int8,
    "fp8": to_fp8,
    "fp8 blocks": lambda w: to_fp8(w, block=128),
}


def check(kind: str, M: int, I: int, O: int, activations: str | None = None) -> None:
    """Interprets the kernel with races on; compares it with the reference."""
    x, w = drawn(0, M, I, dtype=jnp.bfloat16), MAKE[kind](drawn(1, I, O))
    with interpreter() as interpret:
        got = quant_matmul(
            x, w, activations=activations, implementation="pallas", interpret=interpret
        )
        got = np.asarray(got, np.float32)
    assert got.shape == (M, O)
    rounds = activations == "int8" or kind.startswith("fp8")
    # Where x is not rounded, compare with the product of the numbers themselves in float32.
    exact = x if rounds else x.astype(jnp.float32)
    want = quant_matmul(exact, w, activations=activations, implementation="xla")
    error = np.abs(got - np.asarray(want, np.float32)).max(axis=1)
    size = np.sqrt((np.asarray(want, np.float32) ** 2).mean(axis=1))
    # One rounding of the result (2^-9 of up to 4 times the mean size), and with many tokens one
    # of each weight, which adds up as noise; sums themselves are float32.
    assert (error < 4 * 2**-8 * size).all(), error / size


def test_products_with_many_tokens_are_the_reference():
    check("int4 32", 70, 128, 128)


def test_one_group_of_the_whole_depth_that_blocks_share():
    w = MAKE["int4 whole"](jnp.ones((1024, 64)))
    assert len(w.scales) == 1 and tiles_of(3, w, "bfloat16").splits == 4
    check("int4 whole", 3, 1024, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize(
    ("M", "I", "O"),
    [(1, 128, 64), (3, 128, 128), (9, 1024, 64), (33, 512, 192), (64, 256, 64), (130, 256, 256)],
)
def test_products_of_every_kind_and_tile(kind: str, activations: str | None, M, I, O):
    if activations == "int8" and kind != "int8":
        pytest.skip("weights of 8 bits only")
    if kind == "fp8 blocks" and O % 128:
        pytest.skip("blocks of 128 outputs")
    check(kind, M, I, O, activations)


def test_a_row_that_is_not_finite_spoils_no_other_and_gradients_pass_the_expanded_weights():
    x, w = drawn(0, 3, 128, dtype=jnp.bfloat16), int4(drawn(1, 128, 64), 128)
    x = x.at[1, 5].set(jnp.nan)
    with interpreter() as interpret:
        run = lambda x: quant_matmul(x, w, implementation="pallas", interpret=interpret)  # noqa: E731
        y, pull = jax.vjp(run, x)
        y = np.asarray(y, np.float32)
    plain = expand(w, jnp.float32)
    assert np.isnan(y[1]).all()
    for row in (0, 2):
        want = x[row].astype(jnp.float32) @ plain
        assert np.abs(y[row] - want).max() < 2**-7 * np.abs(want).max()  # one rounding
    g = drawn(2, 3, 64, dtype=jnp.bfloat16)
    want = g.astype(jnp.float32) @ plain.T
    error = np.linalg.norm(np.asarray(pull(g)[0], np.float32) - want) / np.linalg.norm(want)
    assert error < 2**-7  # bfloat16 weights, one rounding of the sum


def test_turned_round_int4_is_the_same_weight():
    w = quantize_array(drawn(0, 2, 64, 32), 1, 32, lead=1)
    turned = from_int4(w.values, w.scales, w.zeros)
    assert turned.values.shape == (2, 32, 64) and turned.values.dtype == jnp.int4
    np.testing.assert_allclose(
        expand(turned, jnp.float32), dequantize(w, jnp.float32), rtol=0, atol=1e-6
    )


def test_no_tokens_are_no_tokens():
    w = to_int8(drawn(0, 128, 64))
    with interpreter() as interpret:
        got = quant_matmul(
            jnp.zeros((0, 128), jnp.bfloat16), w, implementation="pallas", interpret=interpret
        )
    assert got.shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "w", "said"),
    [
        ((2, 128, jnp.float32), (128, 64), "float32; legal is bfloat16"),
        ((2, 96, jnp.bfloat16), (96, 64), "96 inputs and 64 outputs; legal are multiples of 128"),
        ((2, 128, jnp.bfloat16), (128, 72), "128 inputs and 72 outputs"),
    ],
)
def test_what_is_not_served_is_named(x, w, said: str):
    *shape, dtype = x
    matrix = Matrix(jnp.zeros(w[::-1], jnp.int8), jnp.ones((1, w[1])))
    with pytest.raises(ValueError, match=said):
        quant_matmul(jnp.zeros(shape, dtype), matrix, implementation="pallas", interpret=True)


def test_choices_that_cannot_be():
    x, w = drawn(0, 2, 128, dtype=jnp.bfloat16), int4(drawn(1, 128, 64), 16)
    with pytest.raises(ValueError, match=r"groups of 16 inputs; legal are \(32, 64, 128\)"):
        quant_matmul(x, w, implementation="pallas", interpret=True)
    with pytest.raises(ValueError, match="sm_90"):
        quant_matmul(x, to_int8(drawn(1, 128, 64)), implementation="pallas")
    with pytest.raises(ValueError, match="activations='int8' with int4"):
        quant_matmul(x, w, activations="int8")
    with pytest.raises(ValueError, match=r"block=64; legal are None and 128"):
        to_fp8(drawn(1, 128, 64), block=64)
    with pytest.raises(ValueError, match=r"x \(2, 64\)"):
        quant_matmul(x[:, :64], w)
    assert quant_matmul(x, w).shape == (2, 64)  # None falls to what runs here


def words(nibbles) -> np.int32:
    """Eight nibbles, the lowest first, as one int32."""
    return np.array(sum(int(n) << 4 * k for k, n in enumerate(nibbles)), np.uint32).astype(np.int32)


def test_awq_words_by_hand():
    """Nibble 1 of a word is output 2, nibble 4 is output 1 (0, 2, 4, 6, 1, 3, 5, 7)."""
    q = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]], np.uint8)
    stored = np.array([[words([0, 2, 4, 6, 1, 3, 5, 7])], [words([8, 10, 12, 14, 9, 11, 13, 15])]])
    zeros = np.array([[words([1, 3, 5, 7, 2, 4, 6, 8])]])
    got = from_awq(stored, zeros, np.full((1, 8), 0.5, np.float16))
    assert got.values.tobytes() == pack_rows(q).tobytes()
    assert got.values.tolist() == [[0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]]
    assert got.zeros.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_gptq_words_by_hand():
    """A word is eight inputs of one output; zeros are stored less one, 15 standing for 0."""
    q = np.arange(64).reshape(8, 8).T % 16  # [I = 8, O = 8]: outputs hold 0..7, 8..15, 0..7, ...
    stored = np.array([[words(column) for column in q.T]])
    zeros = np.array([[words([7, 15, 0, 0, 0, 0, 0, 0])]])
    scales = np.ones((1, 8), np.float16)
    got = from_gptq(stored, zeros, scales)
    want = [[0x10, 0x98], [0x32, 0xBA], [0x54, 0xDC], [0x76, 0xFE]]
    assert got.values[:, :2].tolist() == want
    assert got.zeros.tolist() == [[8, 0, 1, 1, 1, 1, 1, 1]]
    later = from_gptq(stored, zeros, scales, np.zeros(8, np.int32), zeros_less_one=False)
    assert later.zeros.tolist() == [[7, 15, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="desc_act=False"):
        twice = np.vstack([stored] * 2), np.vstack([zeros] * 2), np.vstack([scales] * 2)
        from_gptq(*twice, np.arange(16) % 2)


def test_q4_1_bytes_by_hand_and_as_the_gguf_reader_says():
    block = np.array([0.5, -1.5], np.float16).view(np.uint8).tolist() + list(range(16))
    got = from_q4_1(np.array([block], np.uint8))
    assert got.scales.tolist() == [[0.5]] and got.zeros.tolist() == [[3.0]]
    # Bytes 0..15: weights 0..15 are their low nibbles 0..15, weights 16..31 their high ones, 0.
    pairs = [(2 * i) | (2 * i + 1) << 4 for i in range(8)] + [0] * 8
    assert got.values[:, 0].tolist() == pairs
    w = np.array(drawn(3, 6, 64))
    w[2, 32:] = 0.75  # a constant block
    raw = encode("Q4_1", w)
    ours = QuantWeight(*map(jnp.asarray, from_q4_1(raw.reshape(6, -1))), (64,), (6,))
    want = decode("Q4_1", raw, w.shape).T
    np.testing.assert_allclose(dequantize(ours, jnp.float32), want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a row has 30 bytes"):
        from_q4_1(np.zeros((1, 30), np.uint8))
