"""The plain kernels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.attention import (
    _looped,
    _looped_backward,
    attention,
    causal_attention,
    causal_mask,
)
from internjax.kernels.cross_entropy import chunked_cross_entropy


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 64])
def test_cross_entropy_by_chunks_is_the_plain_one(chunk: int):
    x, head = drawn(0, 2, 7, 4), drawn(1, 4, 11)
    targets = jax.random.randint(jax.random.key(2), (2, 7), 0, 11, jnp.int32)

    def chunked(x, head):
        return chunked_cross_entropy(lambda x: x @ head, x, targets, chunk=chunk)[0]

    def direct(x, head):
        logp = jax.nn.log_softmax(x @ head, axis=-1)
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    np.testing.assert_allclose(chunked(x, head), direct(x, head), rtol=0, atol=1e-12)
    weight = drawn(3, 2, 7)  # not all positions count alike
    grads = [
        jax.grad(lambda x, h, f=f: jnp.sum(f(x, h) * weight), (0, 1))(x, head)
        for f in (chunked, direct)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *grads)


def test_smoothing_and_z_loss_by_their_definitions():
    x, head = drawn(0, 2, 7, 4), drawn(1, 4, 11)
    targets = jax.random.randint(jax.random.key(2), (2, 7), 0, 11, jnp.int32)
    aim, nll, right = chunked_cross_entropy(
        lambda x: x @ head, x, targets, chunk=3, smoothing=0.2, z_loss=0.01
    )
    logp = jax.nn.log_softmax(x @ head, axis=-1)
    aimed = 0.8 * jax.nn.one_hot(targets, 11) + 0.2 / 11
    log_z = jax.nn.logsumexp(x @ head, axis=-1)
    want = -(aimed * logp).sum(axis=-1) + 0.01 * log_z**2
    np.testing.assert_allclose(aim, want, rtol=0, atol=1e-12)
    picked = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, picked, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(right, (x @ head).argmax(axis=-1) == targets)


def test_cross_entropy_of_huge_logits_is_finite():
    x = jnp.full((1, 2, 1), 1e4)
    head = jnp.array([[1.0, -1.0]])
    _, got, _ = chunked_cross_entropy(lambda x: x @ head, x, jnp.array([[0, 1]]), chunk=1)
    np.testing.assert_allclose(got, [[0.0, 2e4]])


def test_attention_by_loops():
    B, T, N, K, H = 2, 5, 4, 2, 3
    q, k, v = drawn(0, B, T, N, H), drawn(1, B, T, K, H), drawn(2, B, T, K, H)
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    got = attention(q, k, v, causal_mask(positions, segments))
    for b in range(B):
        for n in range(N):
            for t in range(T):
                seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
                scores = np.array([q[b, t, n] @ k[b, s, n // 2] for s in seen]) / np.sqrt(H)
                weights = np.exp(scores) / np.exp(scores).sum()
                want = sum(w * v[b, s, n // 2] for w, s in zip(weights, seen))
                np.testing.assert_allclose(got[b, t, n], want, rtol=0, atol=1e-12)


def test_a_row_that_may_see_nothing_is_finite():
    q = drawn(0, 1, 2, 2, 4)
    mask = jnp.zeros((1, 2, 2), bool)
    value, grad = jax.value_and_grad(lambda q: jnp.sum(attention(q, q, q, mask)))(q)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("T", [7, 128, 300])
@pytest.mark.parametrize("packed", [True, False])
def test_blockwise_attention_is_attention_with_its_derivatives(T: int, packed: bool):
    B, N, K, H = 2, 6, 2, 4
    q, k, v, g = (drawn(i, B, T, heads, H) for i, heads in enumerate((N, K, K, N)))
    segments = jnp.sort(jax.random.randint(jax.random.key(9), (B, T), 0, 4, jnp.int32), axis=1)
    mask = causal_mask(segments, segments if packed else None)  # positions only give the shape
    run = lambda f, *args: jax.jit(lambda *a: jax.vjp(f, *a)[1](g))(*args)  # noqa: E731
    block = lambda q, k, v: causal_attention(q, k, v, segments if packed else None)  # noqa: E731
    plain = lambda q, k, v: attention(q, k, v, mask)  # noqa: E731
    np.testing.assert_allclose(block(q, k, v), plain(q, k, v), rtol=0, atol=1e-12)
    for got, want in zip(run(block, q, k, v), run(plain, q, k, v), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_the_looped_form_for_other_platforms_is_the_same():
    B, T, N, K, H = 1, 512, 4, 2, 4  # two turns of the loop
    q, k, v, g = (drawn(i, B, T, heads, H) for i, heads in enumerate((N, K, K, N)))
    segments = jnp.sort(jax.random.randint(jax.random.key(9), (B, T), 0, 4, jnp.int32), axis=1)
    out, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, segments), q, k, v)
    np.testing.assert_allclose(_looped(q, k, v, segments), out, rtol=0, atol=1e-12)
    zeros = jnp.zeros(q.shape[:3])
    looped = _looped_backward(q, k, v, segments, out, zeros, g)
    for got, want in zip(looped, pull(g), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_blockwise_attention_in_bfloat16_is_as_near_as_bfloat16_allows():
    q, k, v, g = (drawn(i, 1, 200, heads, 8) for i, heads in enumerate((4, 2, 2, 4)))
    low = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    _, pull = jax.vjp(causal_attention, *(low(x) for x in (q, k, v)))
    _, exact = jax.vjp(causal_attention, q, k, v)
    for got, want in zip(pull(low(g)), exact(g), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < 2**-6  # a few roundings of 2^-8
