"""Laws of adapters: nothing at the start, attached equals merged, PEFT there and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.lora import attach, init_adapter, merge
from internjax.adapt.quantize import QuantConfig, quantize
from internjax.errors import Missing, UserError
from internjax.models.decoder import forward, init_params
from internjax.models.peft import LoraConfig, from_peft, load_adapter, save_adapter, to_peft
from internjax.tree import flatten, unflatten, unstack_layers
from internjax.weights import LoraWeight, QuantWeight, dequantize
from tests.fakes import tiny_model

LORA = LoraConfig(rank=3, alpha=6.0)
CFG = tiny_model(dtype="float64", qkv_bias=True)[0]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def setup(lora: LoraConfig = LORA, *, trained: bool = True):
    base = init_params(CFG, jax.random.key(0), jnp.float64)
    adapter = init_adapter(CFG, lora, jax.random.key(1), jnp.float64)
    if trained:  # b = 0 would hide every mistake
        keys = iter(jax.random.split(jax.random.key(2), 20))
        noisy = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype)  # noqa: E731
        adapter = jax.tree.map(noisy, adapter)
    tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, CFG.vocab_size, jnp.int32)
    return base, adapter, tokens


def test_a_new_adapter_changes_nothing():
    base, adapter, tokens = setup(trained=False)
    got = forward(attach(base, adapter, LORA), tokens, CFG)
    np.testing.assert_array_equal(got, forward(base, tokens, CFG))


@pytest.mark.parametrize("rounding", [None, QuantConfig(8, rank=0), QuantConfig(8, rank=2)])
def test_attached_equals_merged(rounding: QuantConfig | None):
    base, adapter, tokens = setup()
    plain_logits = forward(base, tokens, CFG)
    base = quantize(base, rounding) if rounding else base
    attached = attach(base, adapter, LORA)
    merged = merge(attached)
    want = forward(attached, tokens, CFG)
    np.testing.assert_allclose(forward(merged, tokens, CFG), want, rtol=0, atol=1e-12)
    assert float(jnp.abs(want - plain_logits).max()) > 1e-3
    kinds = (LoraWeight, QuantWeight)
    assert not any(isinstance(leaf, kinds) for leaf in flatten(merged).values())


def test_a_new_adapter_over_integers_is_the_quantized_base():
    base, adapter, tokens = setup(trained=False)
    base = quantize(base, QuantConfig(group=8, rank=0))
    expand = lambda w: dequantize(w, jnp.float64) if isinstance(w, QuantWeight) else w  # noqa: E731
    expanded = unflatten({path: expand(w) for path, w in flatten(base).items()})
    got = forward(attach(base, adapter, LORA), tokens, CFG)
    np.testing.assert_allclose(got, forward(expanded, tokens, CFG), rtol=0, atol=1e-12)


def test_unstacked_layers_carry_adapters_too():
    base, adapter, tokens = setup()
    attached = attach(base, adapter, LORA)
    got = forward(unstack_layers(attached), tokens, CFG)
    np.testing.assert_allclose(got, forward(attached, tokens, CFG), rtol=0, atol=1e-12)


def test_only_the_targets_are_corrected():
    lora = LoraConfig(rank=2, alpha=2.0, targets=("wq", "w_down"))
    base, adapter, _ = setup(lora)
    layers = attach(base, adapter, lora)["layers"]
    assert {n for n, w in layers.items() if isinstance(w, LoraWeight)} == {"wq", "w_down"}


def test_peft_tensors_mean_what_torch_linear_means():
    """W + alpha/r B A with W as [out, in], recomputed without our code."""
    base, adapter, _ = setup()
    tensors, config = to_peft(adapter, LORA, "base")
    merged = merge(attach(base, adapter, LORA))["layers"]
    for name, module, ins in (("wq", "self_attn.q_proj", 1), ("wo", "self_attn.o_proj", 2)):
        stem = f"base_model.model.model.layers.1.{module}"
        a, b = (np.asarray(tensors[f"{stem}.lora_{x}.weight"]) for x in "AB")
        w = np.asarray(base["layers"][name][1])
        rows = int(np.prod(w.shape[:ins]))
        linear = w.reshape(rows, -1).T + config["lora_alpha"] / config["r"] * b @ a
        want = np.asarray(merged[name][1]).reshape(rows, -1).T
        np.testing.assert_allclose(linear, want, rtol=0, atol=1e-12)


def test_peft_folder_there_and_back(tmp_path):
    _, adapter, _ = setup()
    adapter = jax.tree.map(lambda x: x.astype(jnp.float32), adapter)
    save_adapter(tmp_path / "adapter", adapter, LORA, "some-model")
    again, lora = load_adapter(tmp_path / "adapter", CFG)
    assert (lora.rank, lora.alpha, set(lora.targets)) == (3, 6.0, set(LORA.targets))
    for path, leaf in flatten(adapter).items():
        np.testing.assert_array_equal(flatten(again)[path], leaf)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some-model"
    assert "q_proj" in config["target_modules"] and "down_proj" in config["target_modules"]
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(Missing, match="no PEFT adapter"):
        load_adapter(tmp_path / "adapter", CFG)


def test_foreign_and_incomplete_adapters_are_refused():
    _, adapter, _ = setup()
    tensors, config = to_peft(adapter, LORA, "base")
    with pytest.raises(UserError, match="no LoRA of a known projection"):
        from_peft(tensors | {"base_model.model.lm_head.lora_A.weight": jnp.ones(3)}, config, CFG)
    lacking = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj.lora_B" not in k}
    with pytest.raises(UserError, match="w_up lacks B1"):
        from_peft(lacking, config, CFG)
    with pytest.raises(UserError, match=r"legal names are wq, wk"):
        LoraConfig(targets=("q_proj",))
    with pytest.raises(UserError, match="at least rank 1"):
        LoraConfig(rank=0)


def test_other_kinds_of_peft_adapters_are_refused():
    _, adapter, _ = setup()
    tensors, config = to_peft(adapter, LORA, "base")
    stable = from_peft(tensors, config | {"use_rslora": True}, CFG)[1]
    assert stable.alpha / stable.rank == pytest.approx(6.0 / 3**0.5)
    for changes, says in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "legal is LORA"),
        ({"r": 4}, "rank and model want"),
        ({"r": "many"}, "no numbers"),
    ):
        with pytest.raises(UserError, match=says):
            from_peft(tensors, config | changes, CFG)
    key = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    with pytest.raises(UserError, match="has A2: 2 layers"):
        from_peft(tensors | {key.format(2): tensors[key.format(1)]}, config, CFG)
