"""The CPU kernels over weights of floats: their numbers, one order of sums, and clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.kernels.cpu import library, tiles as layout
from internjax.kernels.cpu.float_matmul import DTYPES, float_matmuls

built = pytest.mark.skipif(library.library() is None, reason="no C++ compiler at install")
PATHS = library.runnable()
PIECE = 256  # inputs whose products are summed before they are added to the others


def drawn(rng, dtype: str, rows: int, inputs: int, columns: int):
    """Activations of very different sizes, and a weight `[inputs, columns]` with subnormals."""
    x = rng.normal(size=(rows, inputs)) * np.exp(rng.normal(0, 3, (rows, 1)))
    w = np.asarray(rng.normal(size=(inputs, columns)), jnp.dtype(dtype))
    w[0] = np.finfo(np.float16).smallest_subnormal * 3 if dtype == "float16" else 1e-39
    return x.astype(np.float32), w


def summed(x, w):
    """The order of sums, in numpy, which fuses no product with a sum."""
    out = np.zeros((len(x), w.shape[1]), np.float32)
    for start in range(0, len(w), PIECE):
        piece = np.zeros_like(out)
        for k in range(start, min(start + PIECE, len(w))):
            piece = piece + x[:, k, None] * w[None, k].astype(np.float32)
        out = out + piece
    return out


def check_all_paths(seed, dtype, rows, inputs, columns):
    """Every path, in a stack of layers, has the bits of the sums above."""
    x, w = drawn(np.random.default_rng(seed), dtype, rows, inputs, columns)
    one = jnp.asarray(layout.strips(w.T))
    stack = jnp.stack([jnp.full_like(one, jnp.nan), one])
    want = summed(x, w)
    for path in PATHS:
        (got,) = float_matmuls((jnp.asarray(x),), (stack,), 1, columns=(columns,), path=path)
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=path)


@built
@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "columns"),
    [
        ("float32", 1, 300, 70),
        ("float32", 23, 64, 41),
        ("bfloat16", 1, 5, 1),
        ("bfloat16", 16, 513, 128),
        ("float16", 7, 64, 33),
        ("float16", 15, 257, 16),
    ],
)
def test_every_path_has_the_bits_of_one_order(dtype, rows, inputs, columns):
    check_all_paths(0, dtype, rows, inputs, columns)


@built
@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_path_has_the_bits_of_one_order_anywhere(data):
    sizes = [data.draw(st.integers(1, most)) for most in (40, 600, 150)]
    seed = data.draw(st.integers(0, 2**32 - 1))
    check_all_paths(seed, data.draw(st.sampled_from(DTYPES)), *sizes)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_threads_change_no_bit(dtype):
    x, w = drawn(np.random.default_rng(1), dtype, 64, 700, 200)
    stack, rows = jnp.asarray(layout.strips(w.T))[None], jnp.asarray(x)
    run = lambda x: np.asarray(float_matmuls((x,), (stack,), 0, columns=(200,))[0])  # noqa: E731
    whole = run(rows)
    try:
        for threads in (1, 3, 8):
            library.set_threads(threads)
            for first, last in ((0, 1), (5, 8), (9, 64)):
                np.testing.assert_array_equal(run(rows[first:last]), whole[first:last])
    finally:
        library.set_threads(0)
    # A term passes through its product, at most 256 sums of its piece and those of three pieces.
    x, w = x.astype(np.float64), w.astype(np.float64)
    bound = (PIECE + 4) * 2.0**-24 * (np.abs(x) @ np.abs(w))
    assert np.all(np.abs(whole - x @ w) <= bound)


@built
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_several_weights_at_once_are_one_after_the_other(implementation):
    """With the same activations and with their own, of any dtype and size."""
    rng, sizes = np.random.default_rng(2), ((40, 16), (40, 200), (40, 33))
    pairs = [drawn(rng, dtype, 3, *s) for dtype, s in zip(DTYPES, sizes, strict=True)]
    pairs.append(drawn(rng, "float32", 5, 7, 20))
    xs = [jnp.asarray(x) for x, _ in pairs]
    stacks = [jnp.asarray(layout.strips(w.T))[None] for _, w in pairs]
    columns = [w.shape[1] for _, w in pairs]
    run = lambda xs, ws, n: float_matmuls(xs, ws, 0, columns=n, implementation=implementation)  # noqa: E731
    alone = [run(xs[:1], [w], [n])[0] for w, n in zip(stacks[:3], columns[:3], strict=True)]
    for got, want in zip(run(xs[:1], stacks[:3], columns[:3]), alone, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, x, w, n in zip(run(xs, stacks, columns), xs, stacks, columns, strict=True):
        np.testing.assert_array_equal(got, run([x], [w], [n])[0])
    np.testing.assert_allclose(alone[0], pairs[0][0] @ pairs[0][1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_keep_every_number(dtype):
    _, w = drawn(np.random.default_rng(3), dtype, 1, 24, 35)
    strips = jnp.asarray(layout.strips(w.T))
    assert strips.dtype == dtype and strips.shape == (3, 24, 16)
    got = np.asarray(layout.columns_side_by_side(strips))
    np.testing.assert_array_equal(got[:, :35].view(np.uint8), w.view(np.uint8))
    ids = jnp.asarray([[34, 0], [17, 16]])
    rows = np.asarray(jax.jit(layout.columns_of_strips)(strips, ids))
    np.testing.assert_array_equal(rows.view(np.uint8), w.T[np.asarray(ids)].view(np.uint8))


@built
def test_no_layer_is_copied_out_of_the_stack():
    stack = jnp.zeros((3, 32, 256, 16), jnp.bfloat16)

    def three(x, stack, layer):
        for i in (0, 1, layer):
            (x,) = float_matmuls((x,), (stack,), i, columns=(512,))
            x = x[:, :256]
        return x

    args = jnp.ones((2, 256)), stack, jnp.int32(2)
    used = jax.jit(three).lower(*args).compile().memory_analysis()
    assert used.temp_size_in_bytes < stack.nbytes // 3 // 4


@built
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_itself_only(bad):
    x, w = drawn(np.random.default_rng(4), "bfloat16", 9, 64, 48)
    stack = jnp.asarray(layout.strips(w.T))[None]
    clean = np.asarray(float_matmuls((jnp.asarray(x),), (stack,), 0, columns=(48,))[0])
    x[4, 40] = bad
    for path in PATHS:
        (got,) = float_matmuls((jnp.asarray(x),), (stack,), 0, columns=(48,), path=path)
        assert not np.isfinite(np.asarray(got)[4]).any()
        np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(clean, 4, 0))


STRIPS = jnp.zeros((2, 3, 64, 16), jnp.bfloat16)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"xs": (jnp.ones((2, 63)),)}, "x has 63 inputs, the weight 64"),
        ({"xs": (jnp.ones(64),)}, "legal are floats"),
        ({"xs": (jnp.ones((2, 64)),) * 2}, "2 activations for 1 weights"),
        ({"weights": (STRIPS[0],)}, "legal are float32, bfloat16, float16"),
        ({"weights": (STRIPS.astype(jnp.int8),)}, "legal are float32, bfloat16, float16"),
        ({"weights": (STRIPS[..., :8],)}, "legal are float32, bfloat16, float16"),
        ({"columns": (49,)}, "columns=49 in 3 strips"),
        ({"columns": (32,)}, "columns=32 in 3 strips"),
        ({"implementation": "pallas"}, "legal are None, 'cpu', 'xla'"),
        ({"path": "sse"}, "this CPU runs"),
    ],
)
def test_what_products_refuse(given, complaint):
    args = {"xs": (jnp.ones((2, 64)),), "weights": (STRIPS,), "layer": 0, "columns": (40,)} | given
    with pytest.raises(ValueError, match=complaint):
        float_matmuls.__wrapped__(**args)  # without the annotations' own check


@built
def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(Exception, match="do not fit"):
        float_matmuls((jnp.ones((1, 64)),), (STRIPS,), jnp.int32(2), columns=(40,))
