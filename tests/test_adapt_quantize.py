"""Rounding: the error bound, the format, and quantized folders on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.lora import LoraConfig, attach, init_adapter
from internjax.adapt.quantize import QuantConfig, quantize, quantize_array
from internjax.errors import Corrupt, UserError
from internjax.models.decoder import forward
from internjax.models.native import load_native, save_native
from internjax.tree import flatten, size_bytes
from internjax.weights import QuantWeight, dequantize, plain
from tests.fakes import tiny_model


def steps_of(w: QuantWeight) -> np.ndarray:
    """The step of every weight, `[in, out]`."""
    rows = 2 * w.values.shape[-2]
    return np.repeat(np.asarray(w.scales, np.float32), rows // w.scales.shape[-2], axis=-2)


@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_no_weight_moves_by_more_than_half_a_step(shift: float, scale: float):
    w = (jax.random.normal(jax.random.key(0), (64, 24)) + shift) * scale
    got = quantize_array(w, 1, 32)
    error = np.abs(np.asarray(dequantize(got, jnp.float32) - w)) / steps_of(got)
    # Beyond one half: scale and zero are float16, so the ends of a group lie a little off the grid.
    assert error.max() <= 0.5 + 0.02
    assert error.max() > 0.4  # and it is rounding, not a finer format
    low, high = w.reshape(2, 32, 24).min(1), w.reshape(2, 32, 24).max(1)
    np.testing.assert_allclose(np.asarray(got.scales, np.float32), (high - low) / 15, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, -700.0])
def test_a_group_of_equal_weights_stays(value: float):
    w = jnp.full((32, 2), value)
    got = dequantize(quantize_array(w, 1, 32), jnp.float32)
    np.testing.assert_allclose(got, w, rtol=1e-3, atol=1e-7)


def test_rounding_twice_changes_nothing_more():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    once = dequantize(quantize_array(w, 1, 16), jnp.float32)
    twice = dequantize(quantize_array(once, 1, 16), jnp.float32)
    np.testing.assert_allclose(twice, once, rtol=0, atol=5e-3)


def test_two_input_dims_are_grouped_in_their_order():
    w = jax.random.normal(jax.random.key(0), (4, 8, 6))
    got = quantize_array(w, 2, 16)
    flat = quantize_array(w.reshape(32, 6), 1, 16)
    np.testing.assert_array_equal(got.values, flat.values)
    assert (got.in_shape, got.out_shape) == ((4, 8), (6,))
    assert dequantize(got, jnp.float32).shape == w.shape


def test_a_group_that_does_not_fit_is_refused_with_the_numbers():
    for group in (24, 7):
        with pytest.raises(UserError, match=f"group={group} does not cut the 64 inputs"):
            quantize_array(jnp.ones((64, 2)), 1, group)


def test_a_tree_is_rounded_where_asked_and_shrinks():
    cfg, params = tiny_model()
    small = quantize(params, QuantConfig(group=8, rank=0, targets=("w_up", "wo")))
    packed = {p for p, w in flatten(small).items() if isinstance(w, QuantWeight)}
    assert packed == {"layers/w_up", "layers/wo"}
    saved = size_bytes(params) - size_bytes(small)
    assert saved == (8 * 4 - 4 - 4) / (8 * 4) * sum(
        size_bytes(params["layers"][n]) for n in ("w_up", "wo")
    )
    with pytest.raises(UserError, match="no plain array"):
        quantize(small, QuantConfig(group=8))
    lora = LoraConfig(2)
    adapted = attach(params, init_adapter(cfg, lora, jax.random.key(1)), lora)
    with pytest.raises(UserError, match="merge adapters"):
        quantize(adapted, QuantConfig(group=8))


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_the_residual_is_nearly_the_best_of_its_rank(rank: int):
    _, params = tiny_model()
    w = params["layers"]["w_up"]
    small = quantize(params, QuantConfig(group=8, rank=rank))["layers"]["w_up"]
    error = np.asarray(w - dequantize(small.base, jnp.float32))
    left = np.linalg.norm(np.asarray(w - plain(small, jnp.float32)))
    best = np.linalg.norm(np.linalg.svd(error, compute_uv=False)[:, rank:])
    assert left <= 1.1 * best + 1e-3 * np.linalg.norm(error)  # 1e-3: the residual is float16


@pytest.fixture(params=[0, 4])
def rank(request) -> int:
    return request.param


@pytest.fixture
def folder(tmp_path, rank: int):
    cfg, params = tiny_model()
    save_native(tmp_path / "model", cfg, quantize(params, QuantConfig(group=8, rank=rank)))
    return tmp_path / "model"


def test_a_quantized_folder_goes_there_and_back(folder, tmp_path, rank: int):
    cfg, params = tiny_model()
    small = quantize(params, QuantConfig(group=8, rank=rank))
    read_cfg, read = load_native(folder)
    assert read_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, read, small)
    assert jax.tree.map(lambda x: str(x.dtype), read) == jax.tree.map(lambda x: str(x.dtype), small)
    save_native(tmp_path / "again", read_cfg, read)
    for name in ("model.json", "params.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    onto_device = jax.tree.map(jnp.asarray, read)
    np.testing.assert_array_equal(forward(onto_device, tokens, cfg), forward(small, tokens, cfg))


def integers(record: dict) -> dict:
    """The description of wq's integers, under its residual or not."""
    described = record["layers/wq"]
    return described.get("base", described)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: integers(r).update(in_shape=[16]), r"layers/wq.* model.json says"),
        (lambda r: integers(r).pop("out_shape"), r"layers/wq.* damaged or incomplete"),
        (lambda r: r.update({"layers/w_x": r["layers/wq"]}), r"layers/w_x.* damaged or incomplete"),
        (lambda r: r.pop("layers/wq"), r"layers/wq"),
    ],
)
def test_a_damaged_record_is_refused(folder, change, complaint):
    record = json.loads((folder / "model.json").read_text())
    change(record["weights"])
    (folder / "model.json").write_text(json.dumps(record))
    with pytest.raises(Corrupt, match=complaint):
        load_native(folder)


def test_a_truncated_file_is_refused(folder):
    weights = folder / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=r"params\.safetensors"):
        load_native(folder)
