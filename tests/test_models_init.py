"""Random weights have the spread that their config states."""

import jax
import numpy as np
import pytest

from internjax.models.decoder import init_params
from internjax.models.init import InitConfig
from tests.fakes import tiny_model

CFG = tiny_model(d_model=64, num_layers=3, vocab_size=512)[0]


def spread(init: InitConfig, *path: str) -> np.ndarray:
    leaf = init_params(CFG, jax.random.key(0), init=init)
    for name in path:
        leaf = leaf[name]
    leaf = np.asarray(leaf)
    return leaf.reshape(len(leaf), -1).std(axis=1) if path[0] == "layers" else leaf.std()


# A standard deviation of n draws is known to 1/sqrt(2 n): 3% covers the smallest leaf here.
@pytest.mark.parametrize(
    ("kind", "inner", "edge", "residual"),
    [
        ("gpt2", 0.02, 0.02, [0.02 / 6**0.5] * 3),
        ("internlm", 0.006, 0.0052, [0.006 / (2 * layer) ** 0.5 for layer in (1, 2, 3)]),
        ("internlm2", 0.02, 0.02, [0.02 / (2 * layer) ** 0.5 for layer in (1, 2, 3)]),
    ],
)
def test_each_kind_by_its_definition(kind: str, inner: float, edge: float, residual: list):
    init = InitConfig(kind)
    np.testing.assert_allclose(spread(init, "layers", "w_gate"), inner, rtol=0.03)
    np.testing.assert_allclose(spread(init, "layers", "w_down"), residual, rtol=0.03)
    np.testing.assert_allclose(spread(init, "embed"), edge, rtol=0.03)
