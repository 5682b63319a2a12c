"""`internjax convert`: every family there and back is bit-identical, by way of every format."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from internjax.data.tokenizer import load_tokenizer
from internjax.errors import Missing, UserError
from internjax.models.convert import convert, detect, read_model
from internjax.models.folders import carried_files
from internjax.models.gguf_file import open_gguf
from internjax.models.native import load_native
from internjax.models.safetensors_file import open_tensors
from internjax.tree import flatten
from tests.reference.tiny import VARIANTS, write_tiny
from tests.reference.tiny_gguf import write_tiny_gguf

TEXT = "The chain runs, and the 42 others: für alle 模型!"


def _assert_same_checkpoint(one, other):
    a, b = open_tensors(one, "model"), open_tensors(other, "model")
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].read(), b[name].read()
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_bit_identical(variant, dtype, tmp_path):
    shards = 3 if dtype == "bfloat16" else 1
    src = write_tiny(variant, tmp_path / "src", dtype=np.dtype(dtype), num_shards=shards)
    cfg = convert(src, tmp_path / "native", shard_bytes=100_000)
    assert detect(tmp_path / "native") == "native"
    convert(tmp_path / "native", tmp_path / "back")
    _assert_same_checkpoint(src, tmp_path / "back")
    for path in carried_files(src):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()

    convert(src, tmp_path / "m.gguf")
    assert detect(tmp_path / "m.gguf") == "gguf"
    convert(tmp_path / "m.gguf", tmp_path / "again")
    _assert_same_checkpoint(src, tmp_path / "again")
    for folder in ("back", "again"):
        back, _ = read_model(tmp_path / folder)
        assert dataclasses.replace(back, name=cfg.name) == cfg


def test_tokenizer_survives_a_gguf(tmp_path):
    src = write_tiny("smollm2", tmp_path / "src")
    convert(src, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", quant="q8_0")
    metadata = open_gguf(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    again = open_gguf(tmp_path / "again.gguf").metadata
    assert {k: v for k, v in metadata.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in again.items() if k.startswith("tokenizer.")
    }
    first = load_tokenizer(src)
    text = f"<|im_start|>user\n{TEXT}<|im_end|>"
    for path in ("m.gguf", "hf", "again.gguf"):
        other = load_tokenizer(tmp_path / path)
        assert other.encode(text) == first.encode(text)
        assert other.decode(other.encode(TEXT)) == TEXT
        for field in ("bos_id", "eos_id", "pad_id", "eos_ids", "adds_bos", "chat_template"):
            assert getattr(other, field) == getattr(first, field), field
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, 2, 2)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", ["tokenizer_internlm.model", "tokenizer_internlm2.model"])
def test_sentencepiece_vocabulary_survives_a_gguf(name, mirror, tmp_path):
    """The real InternLM vocabularies, inside a GGUF written by us."""
    from internjax.models.gguf_export import save_gguf
    from internjax.models.gguf_tokenizer import metadata_of
    from internjax.models.hf import load_hf

    cfg, params = load_hf(write_tiny("internlm", tmp_path / "src"))
    (tmp_path / "tokenizer").mkdir()
    shutil.copyfile(mirror / "models-small" / name, tmp_path / "tokenizer" / "tokenizer.model")
    first = load_tokenizer(tmp_path / "tokenizer")
    metadata = metadata_of(tmp_path / "tokenizer", first.vocab_size)
    save_gguf(tmp_path / "m.gguf", cfg, params, metadata)
    other = load_tokenizer(tmp_path / "m.gguf")
    for text in (TEXT, "上海人工智能实验室", " a  b\n\tc"):
        assert other.encode(text) == first.encode(text)
    assert (other.bos_id, other.eos_ids) == (first.bos_id, first.eos_ids)


def test_internlm_as_llama_is_the_same_model(tmp_path):
    """`family=llama` gives a checkpoint that transformers reads without remote code."""
    for variant in ("internlm", "internlm2", "internlm3"):
        src = write_tiny(variant, tmp_path / variant)
        dst = tmp_path / f"{variant}-llama"
        convert(src, dst, to="hf", family="llama")
        raw = json.loads((dst / "config.json").read_text())
        assert raw["architectures"] == ["LlamaForCausalLM"]
        assert raw["attention_bias"] is (variant == "internlm")
        assert "model.layers.2.self_attn.k_proj.weight" in open_tensors(dst, "model")
        (cfg, params), (llama, relaid) = read_model(src), read_model(dst)
        assert dataclasses.replace(llama, family=variant) == cfg
        for path, leaf in flatten(params).items():
            np.testing.assert_array_equal(leaf, flatten(relaid)[path], err_msg=path)


def test_dtype_and_quant_of_the_target(tmp_path):
    src = write_tiny("qwen2", tmp_path / "src")
    convert(src, tmp_path / "half", dtype="bfloat16")
    _, half = load_native(tmp_path / "half")
    assert {str(leaf.dtype) for leaf in flatten(half).values()} == {"bfloat16"}
    convert(tmp_path / "half", tmp_path / "half.gguf")
    kinds = {t.kind for t in open_gguf(tmp_path / "half.gguf").tensors.values()}
    assert kinds == {"BF16", "F32"}
    convert(src, tmp_path / "q.gguf", quant="q4_1")
    tensors = open_gguf(tmp_path / "q.gguf").tensors
    kinds = [tensors[n].kind for n in ("blk.0.attn_q.weight", "token_embd.weight", "output.weight")]
    assert kinds == ["Q4_1", "Q8_0", "Q8_0"]


def test_a_folder_with_one_gguf_is_that_gguf(tmp_path):
    (tmp_path / "m").mkdir()
    write_tiny_gguf("llama2", "F32", tmp_path / "m" / "a.gguf")
    cfg, _ = read_model(tmp_path / "m")
    assert cfg.num_layers == 3
    write_tiny_gguf("llama2", "F32", tmp_path / "m" / "b.gguf")
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        read_model(tmp_path / "m")


def test_the_folder_around_a_model_is_told_where_the_model_is(tmp_path):
    (tmp_path / "made" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the model is the folder model/ in it; give .*/model\."):
        detect(tmp_path / "made")


def test_what_is_no_model_and_what_is_no_choice(tmp_path):
    with pytest.raises(Missing, match="no such file or folder"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is no model; legal are a \.gguf file"):
        convert(tmp_path / "empty", tmp_path / "out")
    src = write_tiny("llama2", tmp_path / "src")
    choices = {"to": "onnx", "dtype": "int8", "family": "bert", "quant": "q2_k"}
    for name, value in choices.items():
        with pytest.raises(UserError, match=f"{name}='{value}'; legal are"):
            convert(src, tmp_path / "out.gguf", **{name: value})
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "src"}


def test_native_folder_of_a_newer_format_is_refused(tmp_path):
    convert(write_tiny("llama2", tmp_path / "src"), tmp_path / "native")
    record = tmp_path / "native" / "model.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2; format 1 is read"):
        load_native(tmp_path / "native")
    record.write_text('{"format": 1, "config": {"name": "x"}}')
    with pytest.raises(UserError, match="config does not fit"):
        load_native(tmp_path / "native")
