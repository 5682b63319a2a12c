"""The CPU kernels: one arithmetic on every path, nothing copied, and clear refusals."""

import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.kernels.cpu import library, tiles as layout
from internjax.kernels.cpu.attention import paged_attention, reference
from internjax.kernels.cpu.matmul import emulated, quant_matmul, quant_matmuls
from internjax.kernels.cpu.rope_write import rope_write
from internjax.models.cache import KVCache, attend_layer, quantize_rows, rotate_and_write

built = pytest.mark.skipif(library.library() is None, reason="no C++ compiler at install")
PATHS = library.runnable()
expand = jax.jit(layout.dequantize, static_argnums=(1, 2))
look_up = jax.jit(layout.columns_of, static_argnums=(2, 3))


def drawn_weight(rng, bits: int, inputs: int, columns: int, group: int):
    """Returns tiles and the numbers that they stand for, `[inputs, columns]`."""
    scales = rng.uniform(0.5, 2, (columns, inputs // group)).astype(np.float16)
    if bits == 4:
        values = rng.integers(0, 16, (columns, inputs), np.uint8)
        offsets = rng.normal(0, 8, scales.shape).astype(np.float16)
        tiles = layout.pack(values, scales, offsets)
    else:
        values = rng.integers(-128, 128, (columns, inputs)).astype(np.int8)
        offsets = np.zeros_like(scales)
        tiles = layout.pack(values, scales)
    wide = lambda x: np.repeat(x.astype(np.float32), group, axis=1)  # noqa: E731
    return tiles, (values * wide(scales) + wide(offsets)).T


def drawn_rows(rng, rows: int, inputs: int):
    """Activations of very different sizes, with a group of zeros."""
    x = rng.normal(size=(rows, inputs)) * np.exp(rng.normal(0, 3, (rows, 1)))
    x[rng.integers(rows), : min(inputs, 128)] = 0
    return x.astype(np.float32)


def check_all_paths(seed, bits, group, groups, columns, rows, activations):
    """Every path, in a stack of layers, has the bits of the emulation."""
    rng = np.random.default_rng(seed)
    tiles, _ = drawn_weight(rng, bits, group * groups, columns, group)
    stack = jnp.stack([jnp.full_like(tiles, 255), jnp.asarray(tiles)])
    x = jnp.asarray(drawn_rows(rng, rows, group * groups))
    shape = {"bits": bits, "columns": columns, "activations": activations}
    want = np.asarray(emulated(x, jnp.asarray(tiles), **shape))
    for path in PATHS:
        got = np.asarray(quant_matmul(x, stack, jnp.int32(1), path=path, **shape))
        np.testing.assert_array_equal(got, want, err_msg=path)


@built
@pytest.mark.parametrize(
    ("bits", "group", "groups", "columns", "rows", "activations"),
    [
        (4, 32, 3, 40, 1, "int8"),
        (4, 32, 2, 16, 7, "int8"),
        (4, 128, 2, 33, 13, "int8"),
        (8, 32, 3, 47, 5, "int8"),
        (8, 64, 1, 16, 64, "int8"),
        (4, 32, 2, 20, 3, "f32"),
        (8, 16, 2, 16, 2, "bf16"),
    ],
)
def test_every_path_has_the_bits_of_the_emulation(bits, group, groups, columns, rows, activations):
    check_all_paths(0, bits, group, groups, columns, rows, activations)


@built
@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_path_has_the_bits_of_the_emulation_anywhere(data):
    draw = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    sizes = [data.draw(st.integers(1, most)) for most in (5, 70, 64)]
    seed = data.draw(st.integers(0, 2**32 - 1))
    check_all_paths(seed, draw(4, 8), draw(16, 32, 64, 128), *sizes, draw("int8", "bf16", "f32"))


@built
def test_rows_and_threads_change_no_bit():
    rng = np.random.default_rng(1)
    tiles, weight = drawn_weight(rng, 4, 96, 200, 32)
    stack, x = jnp.asarray(tiles[None]), jnp.asarray(drawn_rows(rng, 64, 96))
    shape = {"bits": 4, "columns": 200}
    whole = np.asarray(quant_matmul(x, stack, 0, **shape))
    try:
        for threads in (1, 3, 8):
            library.set_threads(threads)
            assert library.threads() == threads
            for first, last in ((0, 1), (5, 8), (9, 64)):
                part = quant_matmul(x[first:last], stack, 0, **shape)
                np.testing.assert_array_equal(part, whole[first:last])
    finally:
        library.set_threads(0)
    # What rounding to int8 costs: half a step of 1/127 of a group's largest activation.
    bound = np.abs(x).max(axis=1, keepdims=True) / 254 * np.abs(weight).sum(axis=0)
    assert np.all(np.abs(whole - x @ weight) <= bound * 1.001)


@built
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_several_weights_at_once_are_one_after_the_other(implementation):
    """Also where a thread's share of the columns ends inside of a weight."""
    rng = np.random.default_rng(6)
    x, columns = jnp.asarray(drawn_rows(rng, 3, 64)), (16, 200, 33)
    stacks = [jnp.asarray(drawn_weight(rng, 8, 64, n, 32)[0][None]) for n in columns]
    shape = {"bits": 8, "implementation": implementation}
    together = quant_matmuls(x, stacks, 0, columns=columns, **shape)
    for got, tiles, n in zip(together, stacks, columns, strict=True):
        np.testing.assert_array_equal(got, quant_matmul(x, tiles, 0, columns=n, **shape))
    other = drawn_weight(rng, 8, 64, 16, 64)[0][None]
    with pytest.raises(ValueError, match="groups of one size"):
        quant_matmuls(x, [stacks[0], jnp.asarray(other)], 0, columns=(16, 16), **shape)


@built
def test_packing_keeps_every_number():
    for bits in (4, 8):
        tiles, weight = drawn_weight(np.random.default_rng(2), bits, 64, 35, 32)
        got = expand(jnp.asarray(tiles), bits, jnp.float32)
        np.testing.assert_allclose(got[:, :35], weight, rtol=1e-6, atol=1e-5)
        ids = jnp.asarray([[34, 0], [17, 16]])
        rows = look_up(jnp.asarray(tiles), ids, bits, jnp.float32)
        np.testing.assert_array_equal(rows, got.T[ids])


@built
def test_no_layer_is_copied_out_of_the_stack():
    """Temporary memory of three products with one stack stays below the bytes of a layer."""
    tiles = jnp.zeros((3, 32, 8, layout.tile_bytes(4, 32)), jnp.uint8)

    def three(x, tiles, layer):
        for i in (0, 1, layer):
            x = quant_matmul(x, tiles, i, bits=4, columns=512)[:, :256]
        return x

    args = jnp.ones((2, 256)), tiles, jnp.int32(2)
    used = jax.jit(three).lower(*args).compile().memory_analysis()
    assert used.temp_size_in_bytes < tiles.nbytes // 3 // 4
    copied = jax.jit(lambda x, t, i: three(x, t[jnp.array([2, 0, 1])], i))
    assert copied.lower(*args).compile().memory_analysis().temp_size_in_bytes >= tiles.nbytes


@built
@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_itself_only(bad, activations):
    rng = np.random.default_rng(3)
    tiles, _ = drawn_weight(rng, 4, 64, 48, 32)
    x = drawn_rows(rng, 9, 64)
    shape = {"bits": 4, "columns": 48, "activations": activations}
    clean = np.array(quant_matmul(jnp.asarray(x), jnp.asarray(tiles[None]), 0, **shape))
    x[4, 40] = bad
    for path in PATHS:
        got = quant_matmul(jnp.asarray(x), jnp.asarray(tiles[None]), 0, path=path, **shape)
        got = np.asarray(got)
        assert not np.isfinite(got[4]).any()
        np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(clean, 4, 0))


TILES = jnp.zeros((2, 3, 2, layout.tile_bytes(4, 32)), jnp.uint8)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"x": jnp.ones((2, 63))}, "x has 63 inputs, the weight 2 groups of 32"),
        ({"x": jnp.ones((2, 64), jnp.int32)}, "legal are floats"),
        ({"x": jnp.ones(64)}, "legal are floats"),
        ({"tiles": TILES[0]}, "legal are uint8"),
        ({"tiles": TILES[..., :-8]}, "no 4-bit tiles|groups of"),
        ({"tiles": TILES.astype(jnp.int32)}, "legal are uint8"),
        ({"bits": 5}, "5 bits; the CPU kernels serve 4 and 8"),
        ({"columns": 49}, "columns=49 in 3 blocks"),
        ({"columns": 32}, "columns=32 in 3 blocks"),
        ({"activations": "int4"}, "legal are int8, bf16, f32"),
        ({"implementation": "pallas"}, "legal are None, 'cpu', 'xla'"),
        ({"path": "sse"}, "this CPU runs"),
    ],
)
def test_what_products_refuse(given, complaint):
    args = {"x": jnp.ones((2, 64)), "tiles": TILES, "layer": 0, "bits": 4, "columns": 40} | given
    args["weights"], args["columns"] = (args.pop("tiles"),), (args["columns"],)
    with pytest.raises(ValueError, match=complaint):
        quant_matmuls.__wrapped__(**args)  # without the annotations' own check


def test_what_packing_refuses():
    values = np.zeros((3, 48), np.uint8)
    with pytest.raises(ValueError, match="groups of 24 inputs"):
        layout.pack(values, np.ones((3, 2), np.float32), np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="beyond float16"):
        layout.pack(values, np.full((3, 3), 1e6, np.float32), np.ones((3, 3), np.float32))


@built
def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(Exception, match="do not fit"):
        quant_matmul(jnp.ones((1, 64)), TILES, jnp.int32(2), bits=4, columns=40)


POOLS = {  # batch, queries, heads, KV heads, head size, block length, blocks a sequence
    "one query": (3, 1, 9, 3, 64, 16, 40),
    "a few": (2, 4, 4, 4, 16, 32, 3),
    "rows as blocks": (1, 8, 4, 2, 80, 600, 1),
    "a piece of a prompt": (2, 50, 2, 1, 32, 300, 1),
}


def drawn_pool(dtype: str, shape: str):
    rng = np.random.default_rng(4)
    B, T, N, K, H, length, count = POOLS[shape]
    pool = B * count + 1
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    (k, v), scales = (normal(pool, length, K, H) for _ in "kv"), {}
    if dtype == "int8":
        (k, k_scale), (v, v_scale) = (jax.jit(quantize_rows)(x) for x in (k, v))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    table = rng.permutation(pool)[: B * count].reshape(B, count).astype(np.int32)
    lengths = rng.integers(T, count * length, B)
    lengths[-1] = count * length
    k, v = (x if scales else x.astype(dtype) for x in (k, v))
    return normal(B, T, N, H), k, v, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), scales


@built
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", "one query"),
        ("bfloat16", "a few"),
        ("int8", "rows as blocks"),
        ("float32", "a piece of a prompt"),
        pytest.param("int8", "a few", marks=pytest.mark.slow),
    ],
)
def test_attention_is_the_reference_and_the_same_on_every_path(dtype, shape):
    *args, scales = drawn_pool(dtype, shape)
    want = np.asarray(jax.jit(reference)(*args, **scales))
    first = np.asarray(paged_attention(*args, **scales))
    np.testing.assert_allclose(first, want, rtol=0, atol=2e-6)
    for path in PATHS[1:]:
        np.testing.assert_array_equal(paged_attention(*args, **scales, path=path), first)
    try:
        library.set_threads(3)
        np.testing.assert_array_equal(paged_attention(*args, **scales), first)
    finally:
        library.set_threads(0)


@built
def test_empty_sequences_and_stale_blocks_are_harmless():
    """A slot without keys gives 0; NaN behind a sequence's end and in other blocks stays there."""
    q, k, v, table, lengths, _ = drawn_pool("float32", "one query")
    lengths = lengths.at[0].set(0).at[1].set(17)
    want = np.asarray(paged_attention(q, k, v, table, lengths))
    assert not want[0].any() and np.isfinite(want).all()
    k, v = (x.at[table[1, 1], 1:].set(jnp.nan).at[table[1, 2]].set(jnp.nan) for x in (k, v))
    table = table.at[0].set(-1)
    for implementation in ("cpu", "xla"):
        got = paged_attention(q, k, v, table, lengths, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=implementation)
    poisoned = paged_attention(q.at[2, 0, 3, 0].set(jnp.nan), k, v, table, lengths)
    bad = ~np.isfinite(np.asarray(poisoned)).all(axis=-1)
    assert bad[2, 0].tolist() == [n == 3 for n in range(9)] and not bad[:2].any()
    with pytest.raises(Exception, match="the table names block -1"):
        jax.block_until_ready(paged_attention(q, k, v, table, lengths.at[0].set(1)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": jnp.ones((3, 129, 9, 64))}, r"129 queries a sequence; legal are 1..128"),
        ({"q": jnp.ones((3, 1, 9, 40)), "k": jnp.ones((2, 4, 3, 40))}, "multiples of 16"),
        ({"q": jnp.ones((3, 1, 9, 64), jnp.float16)}, "legal are float32, bfloat16"),
        ({"q": jnp.ones((3, 1, 8, 64))}, "q has 8 heads of 64, the pool 3 of 64"),
        ({"k": jnp.ones((2, 4, 3, 64), jnp.float16)}, "legal are two like"),
        ({"table": jnp.ones((2, 1), jnp.int32)}, r"for 3 sequences; legal are \[3, blocks\]"),
        ({"k": jnp.ones((2, 4, 3, 64), jnp.int8)}, "go with an int8 pool"),
        ({"k_scale": jnp.ones((2, 4, 3))}, "go with an int8 pool"),
    ],
)
def test_what_attention_refuses(change, complaint):
    args = {"q": jnp.ones((3, 1, 9, 64)), "k": jnp.ones((2, 4, 3, 64))} | change
    args = {"table": jnp.ones((3, 1), jnp.int32), "lengths": jnp.ones(3, jnp.int32)} | args
    with pytest.raises(ValueError, match=complaint):
        paged_attention.__wrapped__(**args, v=args["k"])


def test_without_the_kernels_it_is_said_once(tmp_path, caplog, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "_native.so").write_bytes(b"of another machine")
    with caplog.at_level(logging.WARNING):
        for folder in (tmp_path, tmp_path, tmp_path / "broken"):
            assert library.library(folder) is None
    assert [("not built" in m, "install a C++17 compiler" in m) for m in caplog.messages] == [
        (True, True),
        (False, True),
    ]
    monkeypatch.setattr(library, "library", lambda: None)
    tiles, weight = drawn_weight(np.random.default_rng(5), 8, 32, 16, 32)
    args = jnp.ones((1, 32)), jnp.asarray(tiles[None]), 0
    got = quant_matmul(*args, bits=8, columns=16)
    np.testing.assert_allclose(got[0], weight.sum(axis=0), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="not built"):
        quant_matmul(*args, bits=8, columns=16, implementation="cpu")
    with pytest.raises(ValueError, match="not built"):
        library.set_threads(1)


@built
@pytest.mark.parametrize(
    ("path", "outcome"), [("portable", "portable 3"), ("sse", "this CPU runs")]
)
def test_the_environment_forces_path_and_threads(path, outcome):
    program = (
        "from internjax.kernels.cpu import library as l\n"
        "print(l.library().internjax_cpu_path(b'').decode(), l.threads())"
    )
    forced = {"INTERNJAX_CPU_PATH": path, "INTERNJAX_CPU_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | forced, capture_output=True, text=True
    )
    assert outcome in done.stdout + done.stderr


def drawn_cache(dtype: str, B: int, C: int, K: int, H: int):
    """One layer of a cache, full of numbers."""
    rng = np.random.default_rng(7)
    k, v = (jnp.asarray(rng.normal(size=(B, C, K, H)), jnp.float32) for _ in "kv")
    if dtype != "int8":
        return KVCache((k.astype(dtype),), (v.astype(dtype),), (), ())
    (k, k_scale), (v, v_scale) = (jax.jit(quantize_rows)(x) for x in (k, v))
    return KVCache((k,), (v,), (k_scale,), (v_scale,))


@built
@pytest.mark.parametrize(("dtype", "T"), [("float32", 1), ("bfloat16", 9), ("int8", 3)])
def test_writing_by_the_kernel_is_writing_by_xla(dtype, T, monkeypatch):
    """Rotated queries and the whole cache; a row at the end of the cache drops what is beyond."""
    rng = np.random.default_rng(8)
    B, N, K, H, C = 3, 4, 2, 12, 11
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    given = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H), normal(B, T, H // 2)
    start, cache = jnp.asarray([0, 2, C - 1]), drawn_cache(dtype, B, C, K, H)
    run = jax.jit(lambda cache, *args: rotate_and_write(cache, 0, *args, 1.1, start))
    q, got = run(cache, *given)
    assert "internjax_rope_write" in run.lower(cache, *given).as_text()
    monkeypatch.setattr(library, "library", lambda: None)
    want_q, want = jax.jit(lambda cache, *a: rotate_and_write(cache, 0, *a, 1.1, start))(
        cache, *given
    )
    np.testing.assert_allclose(q, want_q, rtol=0, atol=1e-6)
    for name in ("k", "v", "k_scale", "v_scale"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            # A last bit more or less may round to the next step.
            step = {"int8": 1.0, "bfloat16": 0.02}.get(str(a.dtype), 1e-6)
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), 0, step)
            assert np.mean(np.asarray(a) != np.asarray(b)) < 0.01 or a.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kernels", [pytest.param(True, marks=built), False])
def test_blocks_in_any_order_are_a_row(dtype, kernels, monkeypatch):
    """Bit for bit, whichever blocks hold it; a sequence without blocks writes and reads nothing."""
    if not kernels:
        monkeypatch.setattr(library, "library", lambda: None)
    rows, blocks = drawn_cache(dtype, 1, 24, 2, 16), drawn_cache(dtype, 9, 8, 2, 16)
    order, start, angle = jnp.array([5, 0, 7]), jnp.array([7]), jnp.ones((1, 10, 8))
    scatter = lambda b, r: b.at[order].set(r.reshape(3, 8, *r.shape[2:]))  # noqa: E731
    blocks = jax.tree.map(scatter, blocks, rows)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 10, 2, 16)), jnp.float32)
    want_q, want = rotate_and_write(rows, 0, x, x, x, angle, 1.0, start)
    two = lambda x: jnp.concatenate([x, x])  # noqa: E731
    table = jnp.array([[5, 0, 7, -1], [-1] * 4])
    given = (two(x), two(x), two(x), two(angle), 1.0, two(start), table)
    got_q, got = rotate_and_write(blocks, 0, *given)
    np.testing.assert_array_equal(got_q[:1], want_q)
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(scatter, blocks, want))
    mixed = attend_layer(got_q, got, 0, two(start), 24, table)
    np.testing.assert_array_equal(mixed[:1], attend_layer(want_q, want, 0, start, 24))


@built
def test_a_cache_that_is_given_away_is_written_in_place():
    cache = drawn_cache("float32", 2, 4096, 2, 16)
    x = jnp.ones((2, 1, 2, 16))
    run = jax.jit(
        lambda cache, x: rotate_and_write(cache, 0, x, x, x, x[..., 0, :8], 1.0, jnp.array([3, 4])),
        donate_argnums=0,
    )
    assert run.lower(cache, x).compile().memory_analysis().temp_size_in_bytes < cache.k[0].nbytes


@built
def test_a_head_that_is_not_finite_spoils_itself_only():
    ones = jnp.ones((1, 2, 2, 16))
    k = ones.at[0, 1, 0, 3].set(jnp.inf)
    cache = drawn_cache("int8", 1, 4, 2, 16)
    turns = jnp.stack([jnp.ones((1, 2, 8)), jnp.zeros((1, 2, 8))])
    pool = cache.k[0], cache.v[0], cache.k_scale[0], cache.v_scale[0]
    _, (keys, _, scales, _) = rope_write(ones, k, ones, turns, pool, jnp.asarray([[2, 0]]))
    assert np.isnan(scales[0, 0, 0]) and np.isfinite(np.asarray(scales).flatten()[1:]).all()
    np.testing.assert_array_equal(keys[0, 2], np.full((2, 16), 127))
    np.testing.assert_array_equal(keys[0, 1], cache.k[0][0, 1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": jnp.ones((1, 2, 2, 16), jnp.float16)}, "legal are float32 or bfloat16"),
        ({"k": jnp.ones((1, 3, 2, 16))}, r"legal are float32 or bfloat16"),
        ({"turns": jnp.ones((2, 1, 2, 16))}, r"legal are \[2, 1, 2, 8\]"),
        ({"places": jnp.ones((2, 1), jnp.int32)}, r"legal are .* and \[1, 2\]"),
        ({"pool": (jnp.ones((4, 2, 16)), jnp.ones((5, 2, 16)))}, "two like float32"),
        ({"pool": (jnp.ones((4, 3, 16)),) * 2}, r"heads \[2, 16\], the pool \[3, 16\]"),
        ({"pool": (jnp.ones((4, 2, 16), jnp.int8),) * 2}, "an int8 pool has two"),
    ],
)
def test_what_writing_refuses(change, complaint):
    x = jnp.ones((1, 2, 2, 16))
    args = {"q": x, "k": x, "v": x, "turns": jnp.ones((2, 1, 2, 8))}
    args |= {"pool": (jnp.ones((4, 2, 16)),) * 2, "places": jnp.ones((1, 2), jnp.int32)}
    with pytest.raises(ValueError, match=complaint):
        rope_write.__wrapped__(**args | change)


def test_kernels_of_older_code_are_told_and_not_used(tmp_path, caplog):
    """An editable install after a git pull: the library is there, a symbol in it is not."""
    import _ctypes

    (tmp_path / "_native.so").symlink_to(_ctypes.__file__)
    assert library.library(tmp_path) is None
    assert "built from older code" in caplog.text
