"""The loss scale moves as InternEvo's: up after many good updates, down when patience is gone."""

import jax
import jax.numpy as jnp
import pytest

from internjax.errors import UserError
from internjax.train.scale import ScaleConfig, adjust, init_scale


def values(finite: str, **changes) -> list[float]:
    """The scale after each update of "g" (good) and "b" (bad)."""
    cfg = ScaleConfig(**{"growth_interval": 3, **changes})
    step = jax.jit(lambda scale, ok: adjust(scale, ok, cfg))
    scale, seen = init_scale(cfg), []
    for update in finite:
        scale = step(scale, jnp.bool_(update == "g"))
        seen.append(float(scale.value))
    return seen


def test_the_defaults_are_internevos():
    scale = init_scale(ScaleConfig())
    assert float(scale.value) == 65536 and int(scale.patience) == 2
    cfg = ScaleConfig()
    assert (cfg.minimum, cfg.maximum, cfg.growth_interval) == (1.0, 2.0**24, 1000)


def test_the_scale_doubles_after_the_interval_and_counts_anew():
    assert values("ggggggg", initial=8.0) == [8, 8, 16, 16, 16, 32, 32]


def test_one_overflow_is_borne_the_second_halves():
    assert values("bgb", initial=8.0) == [8, 8, 4]
    assert values("bbb", initial=8.0) == [8, 4, 2]  # without patience every overflow halves
    assert values("bgggb", initial=8.0) == [8, 8, 8, 16, 16]  # growing brings patience back


def test_an_overflow_starts_the_count_of_good_updates_anew():
    assert values("ggbggg", initial=8.0) == [8, 8, 8, 8, 8, 16]


def test_the_scale_stays_within_its_bounds():
    assert values("gggggg", initial=8.0, maximum=12.0) == [8, 8, 12, 12, 12, 12]
    assert values("bbbbb", initial=4.0, minimum=1.0) == [4, 2, 1, 1, 1]


def test_float16_gradients_come_through_only_with_the_scale():
    """A gradient of 1e-8 is 0 in float16; lifted by 2^16 and divided after, it is itself."""
    scale = init_scale(ScaleConfig()).value

    def loss(w, factor):
        return (w.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32) * 1e-4 * factor

    lost = jax.grad(loss)(jnp.float32(1.0), 1e-4)
    kept = jax.grad(loss)(jnp.float32(1.0), 1e-4 * scale) / scale
    assert float(lost) == 0.0
    assert float(kept) == pytest.approx(1e-12, rel=2e-3)  # half precision's eleven bits


@pytest.mark.parametrize(
    "changes",
    [{"initial": 0.5}, {"maximum": 2.0}, {"backoff": 0.0}, {"growth": 0.5}, {"hysteresis": 0}],
)
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(UserError, match="loss scale"):
        ScaleConfig(**changes)
