"""Hugging Face folders: config.json in its many forms, shards, refusals, damage, memory."""

import dataclasses
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.config import RopeConfig
from internjax.models.decoder import param_table
from internjax.models.hf import load_hf, save_hf
from internjax.models.hf_config import config_from_hf, config_to_hf
from internjax.models.safetensors_file import open_tensors
from internjax.tree import flatten, unflatten, unstack_layers
from tests.reference.tiny import VARIANTS, tiny_config, tiny_shapes, write_tiny


def _edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_there_and_back(variant, tmp_path):
    """Our config.json says what upstream's does, and keeps the keys that we do not know."""
    cfg, params = load_hf(write_tiny(variant, tmp_path / "a"))
    upstream = tiny_config(variant) | {"auto_map": {"AutoModel": "modeling.X"}}
    save_hf(tmp_path / "b", cfg, params, tmp_path / "a", upstream=upstream)
    ours = json.loads((tmp_path / "b" / "config.json").read_text())
    again, _ = load_hf(tmp_path / "b")
    assert dataclasses.replace(again, name=cfg.name) == cfg
    moved = {"rope_theta", "rope_scaling", "rope_parameters", "rotary"}  # same in another form
    for key, value in upstream.items():
        if key not in moved | {"bias"}:
            assert ours[key] == value, key


def test_constants_of_a_family_are_read(tmp_path):
    cfg, _ = load_hf(write_tiny("internlm-dynamic", tmp_path / "a"))
    assert (cfg.family, cfg.norm_eps, cfg.qkv_bias, cfg.output_bias) == (
        "internlm",
        1e-6,
        True,
        True,
    )
    assert cfg.rope == RopeConfig("dynamic", 10000.0, 2.0)
    cfg, _ = load_hf(write_tiny("qwen3", tmp_path / "b"))
    assert (cfg.qk_norm, cfg.head_dim, cfg.rope.theta, cfg.qkv_bias) == (True, 32, 1e6, False)
    cfg, _ = load_hf(write_tiny("smollm2", tmp_path / "c"))
    assert (cfg.family, cfg.tie_embeddings) == ("smollm2", True)


def test_biases_are_read_from_the_weights_not_the_config(tmp_path):
    """InternLM-20B's config and training code disagree on them."""
    folder = _edit_config(write_tiny("internlm-nobias", tmp_path / "a"), bias=True)
    cfg, params = load_hf(folder)
    assert not cfg.qkv_bias and "layers/bq" not in flatten(params)


ROPES = {
    "older": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
}


@pytest.mark.parametrize("form", ROPES)
def test_every_form_of_rope_scaling(form):
    raw = {k: v for k, v in tiny_config("llama2").items() if not k.startswith("rope")}
    cfg = config_from_hf(raw | ROPES[form], tiny_shapes("llama2"), where="x")
    assert cfg.rope == RopeConfig("linear", 5e5, 2.0)


def test_yarn_reads_every_key_and_writes_it_back():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    raw = tiny_config("qwen2") | {
        "rope_scaling": scaling | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}
    }
    cfg = config_from_hf(raw, tiny_shapes("qwen2"), where="x")
    want = RopeConfig("yarn", 1e6, 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)
    assert cfg.rope == want
    back = config_from_hf(config_to_hf(cfg, np.dtype(np.float32)), tiny_shapes("qwen2"), where="x")
    assert back.rope == want
    raw["rope_scaling"] = scaling | {"mscale": 1.0, "mscale_all_dim": 0.5}
    mscale = config_from_hf(raw, tiny_shapes("qwen2"), where="x").rope.attention_factor
    np.testing.assert_allclose(mscale, (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox'; legal are internlm, internlm2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized by 'fp8'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'; legal are"),
        ({"rope_scaling": {"type": "linear"}}, "is damaged or lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=false"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_size": "many"}, "is damaged"),
        ({"num_attention_heads": 0}, "is damaged"),
        ({"num_hidden_layers": -1}, "num_layers is -1"),
        ({"num_hidden_layers": 4}, "tensors are missing, first model.layers.3"),
        ({"num_hidden_layers": 10**9}, "30 tensors for 1000000000 layers|num_layers is"),
        ({"num_hidden_layers": 2}, "have no place in a llama model, first model.layers.2"),
        ({"intermediate_size": 95}, "has shape .*, the config says"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message, tmp_path):
    folder = _edit_config(write_tiny("llama2", tmp_path / "a"), **changes)
    with pytest.raises(UserError, match=message) as error:
        load_hf(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_family_that_cannot_hold_the_model_is_refused(tmp_path):
    cfg, params = load_hf(write_tiny("qwen2", tmp_path / "a"))
    with pytest.raises(UserError, match="family=llama cannot hold qkv_bias=True"):
        save_hf(tmp_path / "b", dataclasses.replace(cfg, family="llama"), params)
    assert not (tmp_path / "b").exists()


def test_pickled_weights_are_refused(tmp_path):
    folder = write_tiny("llama2", tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="unpickling runs any code"):
        load_hf(folder)


def test_missing_files(tmp_path):
    with pytest.raises(Missing, match=r"no config\.json"):
        load_hf(tmp_path)
    folder = write_tiny("llama2", tmp_path / "a", num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(Missing, match=r"model-00002-of-00003\.safetensors"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(Missing, match="neither"):
        load_hf(folder)


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0, 0.999), flip=st.integers(0, 255))
def test_cut_or_damaged_weights_are_one_clear_line(fraction, flip, tmp_path_factory):
    folder = write_tiny("smollm2", tmp_path_factory.mktemp("hf") / "a")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(Corrupt, match=r"model\.safetensors.*fetch it again") as error:
        load_hf(folder)
    assert "\n" not in str(error.value)
    place = int(3000 * fraction)  # within the header
    file.write_bytes(whole[:place] + bytes([flip]) + whole[place + 1 :])
    try:
        load_hf(folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shards_read_and_written_as_the_format_library_does(dtype, tmp_path):
    folder = write_tiny("internlm2", tmp_path / "a", dtype=np.dtype(dtype), num_shards=4)
    cfg, params = load_hf(folder)
    assert all(leaf.dtype == np.dtype(dtype) for leaf in flatten(params).values())
    save_hf(tmp_path / "b", cfg, params, folder, shard_bytes=80_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == {s.name for s in shards}
    theirs = {k: v for s in shards for k, v in load_file(s).items()}
    source = {k: v for s in folder.glob("*.safetensors") for k, v in load_file(s).items()}
    assert theirs.keys() == source.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in theirs.values())
    for name, tensor in source.items():
        assert tensor.tobytes() == theirs[name].tobytes() and tensor.dtype == theirs[name].dtype
    for shard in shards[:-1]:
        assert sum(v.nbytes for v in load_file(shard).values()) <= 80_000


def test_asked_dtype_and_mixed_dtypes(tmp_path):
    folder = write_tiny("llama2", tmp_path / "a")
    _, half = load_hf(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in flatten(half).values()} == {np.dtype(ml_dtypes.bfloat16)}
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    _, mixed = load_hf(folder)  # one leaf holds all layers, so it takes the widest
    np.testing.assert_array_equal(
        mixed["layers"]["wq"][1].reshape(64, 64).T, tensors[name].astype(np.float32)
    )


def test_derived_tensors_of_older_exporters_are_skipped(tmp_path):
    folder = write_tiny("smollm2", tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    cfg, params = load_hf(folder)
    assert cfg.tie_embeddings and "head" not in params


def test_unstacked_layers_are_written_too_and_wrapped_weights_refused(tmp_path):
    cfg, params = load_hf(write_tiny("internlm2", tmp_path / "a"))
    save_hf(tmp_path / "b", cfg, unstack_layers(params))
    for name, tensor in open_tensors(tmp_path / "a", "model").items():
        got = open_tensors(tmp_path / "b", "model")[name].read()
        assert tensor.read().tobytes() == got.tobytes()
    params["layers"]["wq"] = {"base": params["layers"]["wq"]}
    with pytest.raises(UserError, match=r"layers/wq is .*merge adapters and dequantize"):
        save_hf(tmp_path / "c", cfg, params)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    cfg, params = load_hf(write_tiny("llama2", tmp_path / "a"))
    with pytest.raises(UserError, match="is there already and not empty"):
        save_hf(tmp_path / "a", cfg, params)
    params["final_norm"] = params["final_norm"][:5]  # found only when its turn comes
    with pytest.raises(UserError, match="final_norm has shape"):
        save_hf(tmp_path / "b", cfg, params)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internjax.models.hf.write_tensors", full_disk)
    with pytest.raises(UserError, match="c: cannot be written: No space left on device"):
        save_hf(tmp_path / "c", cfg, params)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("internjax.models.hf.write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_hf(tmp_path / "c", cfg, params)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A 34 MB Llama in 4 MB shards: 8 layers of 2 MB and two tables of 8 MB."""
    folder = tmp_path_factory.mktemp("larger") / "hf"
    changes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512}
    changes |= {"vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 4}
    raw = tiny_config("llama2") | changes
    rng = np.random.default_rng(0)
    cfg = config_from_hf(raw, tiny_shapes("llama2"), where="larger")
    leaves = {p: rng.random(s.shape, np.float32) for p, s in param_table(cfg).items()}
    save_hf(folder, cfg, unflatten(leaves), shard_bytes=4_500_000)
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_is_the_model_and_at_most_two_shards(larger, dtype, tmp_path):
    """NumPy reports its allocations to tracemalloc, so the peak is exact and repeatable."""
    shard = max(p.stat().st_size for p in larger.glob("*.safetensors"))
    tracemalloc.start()
    try:
        cfg, params = load_hf(larger, dtype=dtype)
        model = sum(leaf.nbytes for leaf in flatten(params).values())
        _, read_peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        held, _ = tracemalloc.get_traced_memory()
        save_hf(tmp_path / "b", cfg, params, shard_bytes=4_500_000)
        _, write_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > (2 if dtype else 4)
    assert model < read_peak < model + 2 * shard
    assert write_peak < held + 2 * shard
