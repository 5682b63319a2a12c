"""Rotation and writing into a cache in blocks: the interpreted Hopper kernel and plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.gpu.decode_attention import KVPool
from internjax.kernels.gpu.rope_write import destinations, rope_write
from internjax.models.rope import rotate
from tests.interpreting import interpreter


def drawn(T: int, N: int, K: int, H: int, bits: int, lengths: list[int], C: int = 64):
    """Everything that `rope_write` takes, of slots that own three shuffled blocks each."""
    rng = np.random.default_rng(0)
    slots = len(lengths)
    table = jnp.asarray(rng.permutation(3 * slots).reshape(slots, 3), jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    q, k, v = (jnp.asarray(rng.normal(size=(slots, T, n, H)), jnp.bfloat16) for n in (N, K, K))
    angle = jnp.asarray(rng.uniform(0, 6, size=(slots, T, H // 2)), jnp.float32)
    shape = (3 * slots, C, K, H // 2 if bits == 4 else H)
    if bits == 16:
        pool = KVPool(*(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2)))
    else:
        stored = (jnp.asarray(rng.integers(0, 256, shape), jnp.uint8) for _ in range(2))
        pool = KVPool(*stored, jnp.asarray(rng.normal(size=(3 * slots, K, 4, C)), jnp.float32))
    return q, k, v, angle, pool, destinations(table, lengths, T, C)


def check(*shape) -> None:
    given = drawn(*shape)
    with interpreter() as interpret:
        how = {"factor": 1.5, "implementation": "pallas", "interpret": interpret}
        got = jax.tree.map(np.asarray, rope_write(*given, **how))
    want = rope_write(*given, factor=1.5, implementation="xla")
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
        # The same float32 sums in other order may round to the next bfloat16 or step.
        assert (mine != theirs).mean() < 0.01
        if mine.ndim == 4 and mine.shape[2] != 4 and shape[4] == 4:
            continue  # two nibbles a byte: a step of the high one is 16
        assert np.abs(mine - theirs).max() <= 2**-6 * np.abs(theirs).max()


def test_int8_tokens_are_rotated_rounded_and_written():
    check(2, 2, 1, 64, 8, [65, 1, 0])  # over the edge of a block, one token, none


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "lengths"),
    [(1, 2, 2, 64, [1, 192, 0]), (70, 1, 1, 128, [100]), (3, 3, 1, 256, [64, 2])],
)
def test_tokens_of_every_kind(bits: int, T: int, N: int, K: int, H: int, lengths: list[int]):
    check(T, N, K, H, bits, lengths)


def test_the_plain_path_is_the_models_rotation_at_the_right_places():
    q, k, v, angle, pool, places = drawn(2, 2, 1, 64, 16, [65, 1])
    assert places[1].tolist()[0] == -1 and (places >= -1).all()
    rotated, new = rope_write(q, k, v, angle, pool, places, implementation="xla")
    np.testing.assert_array_equal(rotated, rotate(q, angle, 1.0))
    flat = np.asarray(new.k, np.float32).reshape(-1, 1, 64)
    before = np.asarray(pool.k, np.float32).reshape(-1, 1, 64)
    want = np.asarray(rotate(k, angle, 1.0), np.float32)
    written = {int(place): want[s, t] for (s, t), place in np.ndenumerate(places) if place >= 0}
    assert len(written) == 3
    for place, row in enumerate(flat):
        np.testing.assert_array_equal(row, written.get(place, before[place]))


def test_what_is_not_served_is_named():
    q, k, v, angle, pool, places = drawn(1, 1, 1, 96, 16, [3])
    with pytest.raises(ValueError, match=r"head size 96; legal are \(64, 128, 256\)"):
        rope_write(q, k, v, angle, pool, places, implementation="pallas", interpret=True)
    with pytest.raises(ValueError, match="1 KV heads"):
        rope_write(q, k, v, angle[..., :3], pool, places)
    q, k, v, angle, pool, places = drawn(1, 1, 1, 64, 16, [3])
    with pytest.raises(ValueError, match="sm_90"):
        rope_write(q, k, v, angle, pool, places, implementation="pallas")
