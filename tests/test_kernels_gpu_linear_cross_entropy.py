"""Cross-entropy of a linear head: the interpreted Hopper kernels and plain jnp, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.gpu.linear_cross_entropy import chunk_width, linear_cross_entropy
from tests.interpreting import interpreter


def drawn(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def check(shape: tuple[int, ...], D: int, V: int, **more) -> None:
    """Values and gradients against the definition in float32."""
    x, w = drawn(0, *shape, D), drawn(1, D, V) * jnp.bfloat16(0.2)
    targets = jax.random.randint(jax.random.key(2), shape, 0, V, jnp.int32)
    weight = jax.random.normal(jax.random.key(3), (2, *shape))  # not all positions count alike
    smoothing, z_loss = more.get("smoothing", 0.0), more.get("z_loss", 0.0)

    def plain(x, w):
        logits = x @ w
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        aim = (1 - smoothing) * nll - smoothing * logp.mean(axis=-1)
        aim += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return aim, nll, (logits.argmax(axis=-1) == targets).astype(jnp.float32)

    def loss(f):
        def of(x, w):
            aim, nll, right = f(x, w)
            return jnp.sum(aim * weight[0] + nll * weight[1]), (aim, nll, right)

        return jax.grad(of, (0, 1), has_aux=True)

    with interpreter() as interpret:
        how = {"implementation": "pallas", "interpret": interpret, **more}
        got = loss(lambda x, w: linear_cross_entropy(x, w, targets, **how))(x, w)
        got = jax.tree.map(lambda x: np.asarray(x, np.float32), got)
    want = loss(plain)(x.astype(jnp.float32), w.astype(jnp.float32))
    for mine, theirs in zip(got[1], want[1], strict=True):  # sums of float32, in other order
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(got[0], want[0], strict=True):  # two roundings to bfloat16
        assert np.linalg.norm(mine - theirs) < 2**-7 * np.linalg.norm(theirs)


def test_losses_and_gradients_are_the_definitions():
    check((3,), 64, 128, smoothing=0.1, z_loss=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "D", "V", "more"),
    [
        ((2, 5), 128, 384, {"chunk": 128}),
        ((130,), 64, 512, {"z_loss": 0.1}),
        ((1,), 192, 128, {"smoothing": 0.2}),
        ((7,), 64, 768, {"chunk": 300}),
    ],
)
def test_losses_and_gradients_of_every_shape(shape, D, V, more):
    check(shape, D, V, **more)


def test_the_plain_path_is_the_same_and_no_tokens_are_no_losses():
    x, w, targets = drawn(0, 2, 3, 64), drawn(1, 64, 128), jnp.ones((2, 3), jnp.int32)
    aim, nll, right = linear_cross_entropy(x, w, targets)
    logp = jax.nn.log_softmax(jnp.matmul(x, w, preferred_element_type=jnp.float32))
    np.testing.assert_allclose(nll, -logp[..., 1], rtol=1e-5, atol=1e-5)
    assert aim.shape == right.shape == (2, 3)
    assert linear_cross_entropy(x[:0], w, targets[:0])[0].shape == (0, 3)


def test_chunks_are_whole_tiles_that_divide():
    assert chunk_width(256, 10) == 256
    assert chunk_width(49152, 8192) == 8192
    assert chunk_width(384, 300) == 128
    for V, most in ((92544, 8192), (103168, 8192), (128, 8192)):
        width = chunk_width(V, most)
        assert V % width == 0 and width % 128 == 0 and width <= most


def test_what_is_not_served_is_named():
    x, w, targets = drawn(0, 2, 64), drawn(1, 64, 200), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="states of 64 and 200 logits; legal are multiples of 64"):
        linear_cross_entropy(x, w, targets, implementation="pallas", interpret=True)
    with pytest.raises(ValueError, match="states of float32"):
        linear_cross_entropy(
            x.astype(jnp.float32), w, targets, implementation="pallas", interpret=True
        )
    with pytest.raises(ValueError, match="sm_90"):
        linear_cross_entropy(x, w[:, :128], targets, implementation="pallas")
