"""Law: the nnx module is the same model; its weights go there and back as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from internjax.models.decoder import forward, init_params
from internjax.models.nnx_bridge import from_nnx, to_nnx
from internjax.tree import count, flatten
from tests.fakes import tiny_model


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
def test_the_module_is_the_forward_pass(dtype: str, bound: float):
    with jax.enable_x64(dtype == "float64"):
        cfg = tiny_model(dtype=dtype, qkv_bias=True)[0]
        params = init_params(cfg, jax.random.key(0), jnp.dtype(dtype))
        tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, cfg.vocab_size, jnp.int32)
        module = to_nnx(cfg, params)
        want = forward(params, tokens, cfg)
        for call in (module, nnx.jit(lambda tokens: module(tokens))):
            np.testing.assert_allclose(call(tokens), want, rtol=0, atol=bound)


def test_weights_go_there_and_back():
    cfg, params = tiny_model()
    again = flatten(from_nnx(to_nnx(cfg, params)))
    assert again.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf)


def test_nnx_trains_what_we_serve():
    cfg, params = tiny_model()
    module = to_nnx(cfg, params)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean(m(tokens) ** 2))(module)
    optimizer.update(module, grads)
    moved = from_nnx(module)
    assert count(moved) == count(params)
    assert all((moved["layers"][n] != params["layers"][n]).any() for n in ("wq", "w_down"))
    np.testing.assert_array_equal(module(tokens), forward(moved, tokens, cfg))


def test_a_module_can_be_shown(capsys):
    cfg, params = tiny_model()
    nnx.display(to_nnx(cfg, params))
    shown = capsys.readouterr().out
    assert "wq" in shown and "Param" in shown
