"""AWQ, GPTQ, SmoothQuant and FP8: folds change nothing, each method does what it promises."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.awq import AwqConfig
from internjax.adapt.calibrate import inputs_of
from internjax.adapt.folding import FOLDS, fold
from internjax.adapt.gptq import GptqConfig, gptq_factor, gptq_matrix
from internjax.adapt.quantize import QuantConfig, quantize, quantize_on
from internjax.adapt.rounding import codes_on, grouped, integer_grid, round_to_fp8, values_of
from internjax.adapt.texts import CalibrationConfig, calibration_rows, read_texts, text_path
from internjax.errors import Missing, UserError
from internjax.models.decoder import embed, forward
from internjax.models.load import Model, load
from internjax.models.native import load_native, save_native
from internjax.tree import unstack_layers
from internjax.weights import QuantWeight, ScaledWeight, einsum, packed, plain
from tests.fakes import byte_tokenizer, tiny_model

ROWS = np.random.default_rng(0).integers(0, 256, (16, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A tiny random model with grouped queries, biases and channels of very different sizes."""
    cfg, params = tiny_model(num_layers=1, qkv_bias=True)
    layers = dict(params["layers"])
    key = jax.random.key(1)
    for name in ("attn_norm", "ffn_norm", "bv"):
        key, one = jax.random.split(key)
        layers[name] = jnp.exp(jax.random.normal(one, layers[name].shape))
    folder = tmp_path_factory.mktemp("tiny") / "m"
    save_native(folder, cfg, {**params, "layers": layers}, byte_tokenizer())
    return load(folder)


def logits(model: Model, params) -> np.ndarray:
    return np.asarray(forward(params, jnp.asarray(ROWS[:2]), model.cfg))


@pytest.mark.parametrize(("names", "source"), FOLDS)
def test_a_fold_changes_weights_but_no_logit(model, names, source):
    (layer,) = unstack_layers(model.params)["layers"]
    made = layer[source]
    channels = made.size if source.endswith("norm") else made[0].size
    s = jnp.exp(jax.random.normal(jax.random.key(2), (channels,)))
    folded = fold(layer, names, source, s)
    stacked = jax.tree.map(lambda x: x[None], folded)
    got = logits(model, {**model.params, "layers": stacked})
    np.testing.assert_allclose(got, logits(model, model.params), rtol=2e-4, atol=2e-5)
    assert not np.allclose(folded[names[0]], layer[names[0]], rtol=0.1)


def test_the_inputs_of_projections_are_those_of_the_model(model):
    (layer,) = unstack_layers(model.params)["layers"]
    x = embed(model.params, jnp.asarray(ROWS), model.cfg)
    seen = inputs_of(layer, [x[:8], x[8:]], model.cfg)
    wide = np.asarray(x, np.float64)
    h = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + model.cfg.norm_eps)
    h = (h * np.asarray(layer["attn_norm"], np.float64)).reshape(-1, model.cfg.d_model)
    for name in ("wq", "wk", "wv"):
        np.testing.assert_allclose(seen[name].gram, h.T @ h / len(h), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen[name].mean, np.abs(h).mean(0), rtol=1e-5)
        np.testing.assert_allclose(seen[name].largest, np.abs(h).max(0), rtol=1e-5)
    assert seen["wo"].gram.shape == (32, 32)
    assert seen["w_down"].gram.shape == (64, 64)


def output_error(x: np.ndarray, w: np.ndarray, other: np.ndarray) -> float:
    return float(((x @ (w - other)) ** 2).sum())


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_makes_errors_good_that_rounding_leaves(act_order: bool):
    """Inputs that go together: the sum of 600 rows' squared errors falls by more than half."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(600, 64))
    w = rng.normal(size=(64, 24)).astype(np.float32)
    gram = jnp.asarray(x.T @ x / len(x), jnp.float32)
    cfg = GptqConfig(act_order=act_order)
    order, upper = gptq_factor(gram, cfg)
    codes, grid = gptq_matrix(jnp.asarray(w), order, upper, 16, act_order)
    groups, _, _ = grouped(jnp.asarray(w), 1, 16)
    plain_grid = integer_grid(groups.min(1), groups.max(1))
    nearest = values_of(codes_on(groups, *plain_grid), *plain_grid).reshape(w.shape)
    got = np.asarray(values_of(codes, *grid)).reshape(w.shape)
    assert output_error(x, w, got) < 0.5 * output_error(x, w, np.asarray(nearest))
    if act_order:  # groups stay runs of neighbours, on the grids of the weights as they were
        np.testing.assert_array_equal(grid[0], plain_grid[0])


def test_awq_spares_the_channels_that_matter(model):
    """On a model with uneven channels the search beats the same rounding without it."""
    how = QuantConfig(16, method="awq")
    want = logits(model, model.params)

    def error(own: AwqConfig) -> float:
        got = logits(model, quantize_on(model, replace(how, awq=own), ROWS))
        return float(np.square(got - want).mean())

    plain_rounding = error(AwqConfig(0))
    assert error(AwqConfig()) < plain_rounding
    assert error(AwqConfig(clip=True)) < plain_rounding


def test_only_the_targets_are_rounded_whatever_folds(model):
    got = quantize_on(model, QuantConfig(16, method="awq", targets=("wo", "w_up")), ROWS)["layers"]
    kinds = {name for name, w in got.items() if isinstance(w, QuantWeight)}
    assert kinds == {"wo", "w_up"}
    exact = {**model.params, "layers": {**got, "wo": plain(got["wo"], jnp.float32)}}
    assert np.isfinite(logits(model, exact)).all()


@pytest.fixture(scope="module")
def w8a8(model):
    return quantize_on(model, QuantConfig(method="w8a8"), ROWS)


def test_int8_products_are_those_of_integers(model, w8a8):
    w = jax.tree.map(lambda x: x[0], w8a8["layers"]["w_gate"])
    x = jax.random.normal(jax.random.key(3), (1, 5, 32)) * 3
    got = einsum("BTD,DF->BTF", x, w)
    steps = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127
    q = np.round(np.asarray(x) / steps)
    want = (q[0] @ np.asarray(w.values, np.float64)) * steps[0] * np.asarray(w.scales, np.float64)
    np.testing.assert_allclose(got[0], want, rtol=2e-3, atol=2e-3)
    exact = np.asarray(x[0] @ plain(w, jnp.float32))
    assert 0 < np.abs(got[0] - exact).max() < 0.05 * np.abs(exact).max()


def test_int8_weights_give_the_same_in_the_cpu_kernels(w8a8):
    w = jax.tree.map(lambda x: x[0], w8a8["layers"]["w_gate"])
    x = jax.random.normal(jax.random.key(3), (1, 5, 32))
    kernel = einsum("BTD,DF->BTF", x, packed(w, "int8", jnp.float32))
    np.testing.assert_allclose(kernel, einsum("BTD,DF->BTF", x, w), rtol=1e-2, atol=1e-3)
    unrounded = einsum("BTD,DF->BTF", x, packed(w, "f32", jnp.float32))
    np.testing.assert_allclose(unrounded, x @ plain(w, jnp.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [None, 16])
def test_e4m3_keeps_four_digits_in_two(group):
    w = jax.random.normal(jax.random.key(0), (2, 32, 8))
    got = round_to_fp8(w, 1, group, lead=1)
    assert got.values.dtype == jnp.float8_e4m3fn
    assert got.scales.shape == (2, 1 if group is None else 2, 8)
    error = np.abs(np.asarray(plain(got, jnp.float32) - w))
    largest = np.abs(np.asarray(w)).max(axis=1, keepdims=True)
    # Half a unit of 4 significant bits; below 2^-6 of the range's unit numbers lie evenly.
    assert (error <= np.abs(w) * 2**-4 + largest / 448 * 2**-10).all()


def test_the_largest_group_that_fits_every_projection_is_taken(model):
    params = quantize(model.params, QuantConfig(method="rtn"))  # inputs: 32 and 64
    assert {w.scales.shape[1] for w in params["layers"].values() if isinstance(w, QuantWeight)} == {
        1,
        2,
    }
    _, odd = tiny_model(d_ff=48)
    with pytest.raises(UserError, match=r"none of the groups .* w_down 48"):
        quantize(odd, QuantConfig(method="rtn"))


@pytest.mark.parametrize("method", ["w8a8", "fp8"])
def test_eight_bit_folders_go_there_and_back(model, w8a8, method, tmp_path):
    how = QuantConfig(method=method)
    params = w8a8 if method == "w8a8" else quantize(model.params, how)
    save_native(tmp_path / "m", model.cfg, params)
    record = json.loads((tmp_path / "m" / "model.json").read_text())
    assert record["weights"]["layers/wq"]["kind"] == "scaled"
    _, read = load_native(tmp_path / "m")
    read = jax.tree.map(jnp.asarray, read)
    assert isinstance(read["layers"]["wq"], ScaledWeight)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    np.testing.assert_array_equal(logits(model, read), logits(model, params))


def test_rows_come_from_a_text_or_from_the_model(model, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"content": f"text {i} " * 20}) for i in range(9)))
    cfg = CalibrationConfig(text=str(file), sequences=3, tokens=16)
    rows = calibration_rows(model, cfg)
    assert rows.shape == (3, 16)
    assert "text" in bytes(rows[0].tolist()).decode(errors="replace")
    np.testing.assert_array_equal(rows, calibration_rows(model, cfg))
    own = calibration_rows(model, CalibrationConfig(sequences=2, tokens=8))
    assert own.shape == (2, 8)
    assert (own[:, 0] == model.tokenizer.bos_id).all()
    assert not np.array_equal(own[0], own[1])
    with pytest.raises(UserError, match=r"wants more"):
        calibration_rows(model, replace(cfg, sequences=10_000))
    with pytest.raises(UserError, match="reads 128 at most"):
        calibration_rows(model, replace(cfg, tokens=500))


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(Missing, match=r"is no text; legal are files ending in \.txt"):
        list(read_texts(tmp_path / "a.bin"))
    with pytest.raises(Missing, match="neither a path nor a data set"):
        text_path("no-such-text")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: QuantConfig(method="w8a8", group=32), "one scale for each output"),
        (lambda: QuantConfig(group=1), "group=1"),
        (lambda: GptqConfig(damp=0.0), r"gptq\.damp"),
        (lambda: AwqConfig(steps=-1), r"awq\.steps"),
        (lambda: CalibrationConfig(tokens=1), r"calibration\.tokens=1"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


def test_models_that_cannot_be_calibrated_are_refused(model):
    experts = replace(
        model, cfg=replace(model.cfg, num_experts=2, experts_per_token=1, expert_d_ff=64)
    )
    with pytest.raises(UserError, match="has experts"):
        quantize_on(experts, QuantConfig(16, method="gptq"), ROWS)
    with pytest.raises(UserError, match="group=24 does not cut"):
        quantize_on(model, QuantConfig(24, method="gptq"), ROWS)
    with pytest.raises(UserError, match="needs a model and text"):
        quantize(model.params, QuantConfig(method="awq"))
