"""Causal attention: the Hopper kernels, interpreted on the CPU, against plain jnp; the choice."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from internjax.kernels.attention import _check, attention, causal_attention
from internjax.kernels.gpu import flash
from internjax.kernels.gpu.flash import HEAD_SIZES, TILE, Blocks, Rule, key_bounds, query_bounds
from internjax.kernels.platform import readable
from tests.interpreting import Race, interpreter
from tests.targets import on


def drawn(seed: int, *shape: int, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def inputs(B: int, T: int, N: int, K: int, H: int, dtype=jnp.bfloat16):
    return [drawn(i, B, T, heads, H, dtype=dtype) for i, heads in enumerate((N, K, K, N))]


def segments(seed: int, B: int, T: int, *, ordered: bool = True):
    ids = jax.random.randint(jax.random.key(seed), (B, T), 0, 4, jnp.int32)
    return jnp.sort(ids, axis=1) if ordered else ids


def seen(T: int, window: int | None, ids):
    before = np.arange(T)[:, None] - np.arange(T)[None, :]
    mask = (before >= 0) & (before < (window or T + 1))
    return mask[None] & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :])


def reference(q, k, v, ids, *, window=None, soft_cap=None):
    ids = np.zeros(q.shape[:2]) if ids is None else ids
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return attention(q, k, v, jnp.asarray(seen(q.shape[1], window, ids)), soft_cap)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)


def check(B: int, T: int, N: int, K: int, H: int, ids, **options) -> None:
    """Interprets the three kernels with races on; compares values and gradients."""
    q, k, v, g = inputs(B, T, N, K, H)

    def both(attend, *args):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, **options), *args)
        return out, *pull(g.astype(out.dtype))

    with interpreter() as interpret:
        attend = partial(causal_attention, implementation="pallas", interpret=interpret)
        got = jax.block_until_ready(jax.jit(partial(both, attend))(q, k, v))
    want = both(reference, q, k, v)
    for name, a, b in zip(("out", "q", "k", "v"), got, want, strict=True):
        # Roundings to bfloat16, 2^-9 each: of weights, of their gradient, of the result.
        assert error(a, b) < 0.006, (name, error(a, b))


@st.composite
def calls(draw, most: int):
    """Shapes and options; `most` bounds the length of a row."""
    K, G = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    ids = draw(st.sampled_from([None, True, False]))
    B, T = draw(st.integers(1, 2 if most > 300 else 1)), draw(st.integers(1, most))
    ids = None if ids is None else segments(draw(st.integers(0, 99)), B, T, ordered=ids)
    options = {
        "window": draw(st.none() | st.integers(1, most)),
        "soft_cap": draw(st.sampled_from([None, None, 2.0])),
    }
    return (B, T, G * K, K, draw(st.sampled_from(HEAD_SIZES)), ids), options


def test_values_and_gradients_are_those_of_the_reference():
    check(1, 200, 1, 1, 64, segments(3, 1, 200), window=150, soft_cap=3.0)


@pytest.mark.slow
@settings(max_examples=1, deadline=None, derandomize=True, database=None)
@given(calls(128))
def test_a_few_drawn_calls_agree(call):
    args, options = call
    check(*args, **options)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, database=None)
@given(calls(520))
def test_many_drawn_calls_agree(call):
    args, options = call
    check(*args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("packed", [True, False])
def test_every_head_size_agrees(H, packed):
    check(1, 384, 2, 1, H, segments(1, 1, 384) if packed else None)


def interpreted(q, k, v, ids=None, **options):
    with interpreter() as interpret:
        out = causal_attention(
            q, k, v, ids, implementation="pallas", interpret=interpret, **options
        )
        return np.asarray(out, np.float32)


def test_a_forgotten_fence_is_found(monkeypatch):
    q, k, v, _ = inputs(1, TILE, 1, 1, 64)
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(Race):
        interpreted(q, k, v)


def test_a_copy_that_does_not_wait_until_its_place_is_free_is_found(monkeypatch):
    q, k, v, _ = inputs(1, TILE, 1, 1, 64)
    with_waits = flash.by_role

    def by_role(wg, compute, copy):
        def careless():
            with mock.patch.object(plgpu, "barrier_wait", lambda barrier: None):
                copy()

        with_waits(wg, compute, careless)

    monkeypatch.setitem(flash.FORWARD, 64, Blocks(64, 1))  # two steps, one place
    monkeypatch.setattr(flash, "by_role", by_role)
    with pytest.raises(Race):
        interpreted(q, k, v)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.slow
def test_tokens_that_see_only_themselves_and_numbers_that_are_none():
    T = 100  # two blocks of keys: most queries see nothing of the first one
    q, k, v, _ = inputs(2, T, 1, 1, 256)
    ids = jnp.stack([jnp.arange(T), jnp.zeros(T, jnp.int32)]).astype(jnp.int32)
    q, k = q.at[1, 40, 0, 5].set(jnp.nan), k.at[1, 70, 0, 0].set(jnp.nan)
    got = interpreted(q, k, v, ids)
    np.testing.assert_array_equal(got[0], np.asarray(v[0], np.float32))
    want = reference(q, k, v, ids)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert np.isfinite(got[1, :40]).all() and not np.isfinite(got[1, 70:]).any()


@pytest.mark.parametrize("shape", [(0, 128), (2, 0)])
def test_nothing_to_attend_is_nothing(shape):
    q, k, v, _ = inputs(*shape, 2, 1, 64)
    for options in ({}, {"implementation": "pallas", "interpret": plgpu.InterpretGPUParams()}):
        out = causal_attention(q, k, v, **options)
        assert out.shape == q.shape and out.dtype == q.dtype


@pytest.mark.parametrize("options", [{"window": 5}, {"soft_cap": 2.0}, {"window": 1}])
def test_windows_and_soft_caps_in_plain_jnp(options):
    q, k, v, _ = inputs(2, 40, 4, 2, 8, jnp.float32)
    ids = segments(0, 2, 40)
    got = causal_attention(q, k, v, ids, **options)
    np.testing.assert_allclose(got, reference(q, k, v, ids, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 90, 300])
@pytest.mark.parametrize("ordered", [True, False, None])
def test_bounds_hide_nothing_that_is_seen(window, ordered):
    T, C, rule = 512, 64, Rule(1.0, window=window)
    ids = None if ordered is None else segments(5, 2, T, ordered=ordered)
    mask = seen(T, window, np.zeros((2, T)) if ids is None else ids)
    first, clear = np.moveaxis(
        np.broadcast_to(key_bounds(T, rule, ids, C), (2, 2, T // TILE)), 1, 0
    )
    end = np.broadcast_to(query_bounds(T, rule, ids, C), (2, 2, T // TILE))[:, 0]
    for b in range(2):
        for tile in range(T // TILE):
            here = slice(tile * TILE, (tile + 1) * TILE)
            assert not mask[b, here, : first[b, tile] * C].any()
            assert mask[b, here, clear[b, tile] * C : tile * TILE].all()
            assert not mask[b, end[b, tile] * C :, here].any()
    if ordered is None and window is None:
        assert not first.any() and not clear.any()  # no block is skipped or masked for nothing


BAD = [  # shape of k, options, what is said
    ((1, 8, 3, 64), {}, "4 query heads and 3 KV heads"),
    ((1, 8, 2, 64), {"window": 0}, "window=0; at least 1"),
    ((1, 8, 2, 64), {"soft_cap": -1.0}, "soft_cap=-1.0; above 0"),
    ((1, 8, 2, 64), {"implementation": "triton"}, "legal are None, 'xla', 'pallas', 'cudnn'"),
    ((1, 8, 2, 64), {"implementation": "pallas"}, "its code is for sm_90 .* this is 'cpu'"),
    ((1, 8, 2, 64), {"implementation": "cudnn"}, "is for NVIDIA GPUs, this is 'cpu'"),
    ((1, 8, 2, 64), {"implementation": "tokamax"}, r"pip install 'internjax\[tokamax\]'"),
]


@pytest.mark.parametrize(("shape", "options", "say"), BAD)
def test_bad_calls_say_what_is_legal(shape, options, say):
    q, k = jnp.zeros((1, 8, 4, 64), jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=say):
        causal_attention(q, k, k, **options)


def test_shapes_that_do_not_fit_say_so():
    """Where annotations are not checked, as they are here."""
    q, k = jnp.zeros((1, 8, 4, 64)), jnp.zeros((1, 9, 2, 64))
    with pytest.raises(ValueError, match=r"q \(1, 8, 4, 64\), k \(1, 9, 2, 64\)"):
        _check(q, k, k, None, None, None)
    with pytest.raises(ValueError, match=r"segment_ids int32\[1, 7\]; legal are integers \[1, 8\]"):
        _check(q, q, q, jnp.zeros((1, 7), jnp.int32), None, None)


@pytest.mark.parametrize(
    ("q", "say"),
    [
        (jnp.zeros((1, 8, 1, 72), jnp.bfloat16), "heads of size 64, 80, 96, 128, 256, got 72"),
        (jnp.zeros((1, 8, 1, 64), jnp.float32), "it takes bfloat16, got float32"),
    ],
)
def test_what_the_kernel_does_not_serve(q, say):
    options = {"implementation": "pallas", "interpret": plgpu.InterpretGPUParams()}
    with pytest.raises(ValueError, match=say):
        causal_attention(q, q, q, **options)


@pytest.mark.parametrize(
    ("kind", "sizes", "H", "dtype", "kernel"),
    [
        ("NVIDIA H100 80GB HBM3", (), 128, jnp.bfloat16, True),
        ("NVIDIA H200", (1,), 64, jnp.bfloat16, True),
        ("NVIDIA H100 80GB HBM3", (2,), 128, jnp.bfloat16, False),  # cut by the compiler
        ("NVIDIA H100 80GB HBM3", (), 72, jnp.bfloat16, False),
        ("NVIDIA H100 80GB HBM3", (), 128, jnp.float32, False),
        ("NVIDIA A100-SXM4-80GB", (), 128, jnp.bfloat16, False),
        ("NVIDIA B200", (), 128, jnp.bfloat16, False),
    ],
)
def test_the_kernel_serves_where_it_says(kind, sizes, H, dtype, kernel):
    q, k, v, _ = inputs(1, 128, 2, 1, H, dtype)
    asked = partial(causal_attention, implementation="pallas")
    with on(kind, sizes):
        left = str(jax.make_jaxpr(lambda *x: causal_attention(*x))(q, k, v))
        assert ("flash_forward" in left) == kernel
        with readable():  # where FLOPs are counted in HLO
            read = str(jax.make_jaxpr(lambda *x: causal_attention(*x))(q, k, v))
        assert "flash_forward" not in read
        if kernel:
            assert "flash_forward" in str(jax.make_jaxpr(asked)(q, k, v))
        else:
            with pytest.raises(ValueError, match=r"implementation='pallas': (it|arrays)"):
                jax.make_jaxpr(asked)(q, k, v)
