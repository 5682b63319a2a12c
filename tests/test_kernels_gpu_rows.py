"""RMS norm and SwiGLU of the Hopper kernels, interpreted on the CPU, against plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.gpu.row_kernels import rms_norm, swiglu
from internjax.models import layers
from tests.interpreting import interpreter


def drawn(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def cases(D: int):
    """Name -> (function of implementation and more, what the model computes in float32)."""
    x, y, scale = drawn(0, 2, 2, D), drawn(1, 2, 2, D), drawn(2, D)
    wide = [a.astype(jnp.float32) for a in (x, y, scale)]
    return {
        "rms_norm": (
            lambda **how: rms_norm(x, scale, eps=1e-5, **how),
            layers.rms_norm(wide[0], wide[2], 1e-5),
        ),
        "swiglu": (lambda **how: swiglu(x, y, **how), layers.swiglu(*wide[:2])),
    }


def check(name: str, D: int, quantize: str | None) -> None:
    run, want = cases(D)[name]
    with interpreter() as interpret:
        got = run(quantize=quantize, implementation="pallas", interpret=interpret)
        got = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), got)
    steps = {None: 2**-8, "int8": 0, "float8_e4m3fn": 2**-4}[quantize]  # relative roundings
    if quantize is None:
        assert (np.abs(got - want) <= steps * np.abs(want) + 1e-6).all()
        return
    values, scale = got
    most = 127 if quantize == "int8" else 448
    np.testing.assert_allclose(scale, np.abs(want).max(-1) / most, rtol=1e-5)
    step = 0.501 * scale[..., None] if quantize == "int8" else 2**-9 * scale[..., None]
    assert (np.abs(values * scale[..., None] - want) <= steps * np.abs(want) + step).all()


def test_rows_that_are_rounded_are_the_models():
    check("swiglu", 256, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
@pytest.mark.parametrize("quantize", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("D", [128, 384, 2048])
def test_rows_of_every_kind(name: str, quantize: str | None, D: int):
    check(name, D, quantize)


def test_gradients_are_the_models_and_a_row_that_is_not_finite_spoils_no_other():
    x, scale, g = drawn(0, 3, 128), drawn(1, 128), drawn(2, 3, 128)
    with interpreter() as interpret:

        def ours(x, scale):
            return rms_norm(x, scale, eps=1e-5, implementation="pallas", interpret=interpret)

        y, pull = jax.vjp(ours, x.at[1, 7].set(jnp.inf), scale)
        y = np.asarray(y, np.float32)
        found = pull(g)[0]
    assert np.isfinite(y[[0, 2]]).all() and not np.isfinite(y[1]).all()
    _, pull = jax.vjp(lambda x, scale: layers.rms_norm(x, scale, 1e-5), x, scale)
    want = np.asarray(pull(g)[0], np.float32)[[0, 2]]
    error = np.linalg.norm(np.asarray(found, np.float32)[[0, 2]] - want) / np.linalg.norm(want)
    assert error < 2**-6  # both round to bfloat16, ours once


def test_what_is_not_served_is_named():
    x, scale = drawn(0, 2, 192), drawn(1, 192)
    with pytest.raises(ValueError, match="rows of 192; legal are multiples of 128"):
        rms_norm(x, scale, eps=1e-5, implementation="pallas", interpret=True)
    with pytest.raises(ValueError, match="rows of float32, float32; legal is bfloat16"):
        swiglu(*[x.astype(jnp.float32)] * 2, implementation="pallas", interpret=True)
    with pytest.raises(ValueError, match="quantize='int4'; legal are"):
        swiglu(x, x, quantize="int4")
    with pytest.raises(ValueError, match="sm_90"):
        swiglu(x[:, :128], x[:, :128], implementation="pallas")
    assert swiglu(x, x).shape == x.shape  # None falls to what runs here
