"""The Hopper kernel for attention to a cache in blocks, interpreted on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.gpu import decode_attention as module
from internjax.kernels.gpu.decode_attention import (
    KVPool,
    decode_attention,
    dequantize_kv,
    parts_of,
    quantize_kv,
    reference,
)
from tests.interpreting import interpreter


def drawn(seed: int, T: int, N: int, K: int, H: int, C: int, bits: int, lengths: list[int]):
    """Queries, a pool whose unwritten places are NaN, a shuffled table, lengths."""
    rng = np.random.default_rng(seed)
    slots, most = len(lengths), max(1, -(-max(lengths) // C))
    blocks = slots * most + 1
    table = rng.permutation(blocks)[: slots * most].reshape(slots, most)
    written = np.zeros((blocks, C), bool)
    for row, length in zip(table, lengths, strict=True):
        for i, block in enumerate(row):
            written[block] = np.arange(C) < length - i * C
    table = np.where(np.arange(most) * C < np.array(lengths)[:, None], table, -7)
    k, v = (rng.normal(size=(blocks, C, K, H)) for _ in range(2))
    if bits == 16:
        k, v = (
            jnp.where(written[..., None, None], x, jnp.nan).astype(jnp.bfloat16) for x in (k, v)
        )
        pool = KVPool(k, v)
    else:
        (k, *of_k), (v, *of_v) = (quantize_kv(jnp.asarray(x, jnp.float32), bits) for x in (k, v))
        scales = jnp.stack([*of_k, *of_v])  # [4, P, C, K]
        scales = jnp.where(written[None, ..., None], scales, jnp.nan).transpose(1, 3, 0, 2)
        pool = KVPool(k, v, scales)
    q = jnp.asarray(rng.normal(size=(slots, T, N, H)), jnp.bfloat16)
    return q, pool, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


def check(*shape) -> None:
    q, pool, table, lengths = drawn(0, *shape)
    with interpreter() as interpret:
        got = decode_attention(
            q, pool, table, lengths, implementation="pallas", interpret=interpret
        )
        got = np.asarray(got, np.float32)
    want = np.asarray(reference(q.astype(jnp.float32), pool, table, lengths))
    # Weights and result are rounded to bfloat16 (2^-9 each) against values of a few units.
    assert np.abs(got - want).max() < 2**-6
    assert np.isfinite(got).all()


def test_several_queries_of_bfloat16_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LEAST_PART", 64)
    assert parts_of(3, 1, 128) == 2
    # All of slot 1 is empty, and the second part of slot 2, whose first two queries see nothing.
    check(3, 2, 1, 64, 64, 16, [70, 0, 1])


def test_int4_with_grouped_heads():
    check(1, 4, 2, 64, 64, 4, [65])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "C", "lengths"),
    [
        (1, 8, 1, 64, 64, [1, 64, 0, 129]),
        (2, 4, 4, 128, 64, [2, 1]),  # a query before the first token sees nothing
        (8, 8, 1, 64, 128, [200]),
        (1, 2, 2, 96, 64, [33]),
        (1, 2, 2, 80, 64, [33]),
        (4, 2, 1, 256, 64, [100]),
    ],
)
@pytest.mark.parametrize("least", [64, 256])
def test_every_kind_and_shape(bits, T, N, K, H, C, lengths, least, monkeypatch):
    if H not in module.HEAD_SIZES[bits]:
        pytest.skip("a head size that is not served")
    monkeypatch.setattr(module, "LEAST_PART", least)
    check(T, N, K, H, C, bits, lengths)


def test_the_reference_by_loops():
    q, pool, table, lengths = drawn(1, 2, 2, 1, 64, 64, 16, [70, 1])
    q = q.astype(jnp.float32)
    got = reference(q, pool, table, lengths)
    for s in range(2):
        length = int(lengths[s])
        owned = [b for b in np.asarray(table[s]) if b >= 0]
        k, v = (
            np.concatenate([np.asarray(x[b], np.float32) for b in owned])[:length, 0]
            for x in pool[:2]
        )
        for t in range(2):
            seen = length - 1 + t
            for n in range(2):
                if seen == 0:
                    want = np.zeros(64)
                else:
                    scores = k[:seen] @ np.asarray(q[s, t, n]) / 8
                    weights = np.exp(scores - scores.max())
                    want = weights @ v[:seen] / weights.sum()
                np.testing.assert_allclose(got[s, t, n], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_vectors_are_within_half_a_step(bits: int):
    x = np.random.default_rng(0).normal(size=(5, 3, 64)).astype(np.float32)
    x[0, 0], x[1, 0] = 3.25, 0.0  # constant vectors
    q, scale, zero = quantize_kv(jnp.asarray(x), bits)
    assert q.dtype == jnp.uint8 and q.shape[-1] == (64 if bits == 8 else 32)
    back = np.asarray(dequantize_kv(q, scale, zero, 64))
    step = np.asarray(scale)[..., None]
    # Half a step, and what float32 leaves of the zero of a nearly constant vector.
    assert (np.abs(back - x) <= 0.501 * step + 1e-5 * np.abs(x)).all()
    packed = quantize_kv(jnp.asarray([[0.0] + [15.0] * 31 + [1.0] + [7.0] * 31]), 4)[0]
    assert packed[0, :2].tolist() == [0x10, 0x7F]  # dims 0 and 32, dims 1 and 33


def test_what_is_not_served_is_named():
    q, pool, table, lengths = drawn(0, 1, 2, 1, 32, 64, 16, [3])
    run = lambda q, pool, table, **more: decode_attention(  # noqa: E731
        q, pool, table, lengths, implementation="pallas", **more
    )
    with pytest.raises(ValueError, match=r"head size 32 in 16 bits; legal are \(64, 80, 96"):
        run(q, pool, table, interpret=True)
    q, pool, table, lengths = drawn(0, 1, 2, 1, 64, 32, 16, [3])
    with pytest.raises(ValueError, match=r"blocks of 32 positions; legal are \(64, 128\)"):
        run(q, pool, table, interpret=True)
    q, pool, table, lengths = drawn(0, 9, 8, 1, 64, 64, 16, [9])
    with pytest.raises(ValueError, match="8 query heads a KV head x 9 queries; legal are 64"):
        run(q, pool, table, interpret=True)
    with pytest.raises(ValueError, match="sm_90"):
        run(q[:, :1], pool, table)
    with pytest.raises(ValueError, match=r"queries \(1, 9, 8, 64\)"):
        run(q, KVPool(pool.k, pool.v[:, :32]), table)
    with pytest.raises(ValueError, match="bits=5; legal are 8 and 4"):
        quantize_kv(jnp.ones((2, 4)), 5)
