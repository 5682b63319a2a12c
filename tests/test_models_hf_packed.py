"""AWQ and GPTQ checkpoints: byte goldens of the layouts, there and back, and what is refused.

The goldens are written out from the definitions of the two layouts; `unpacked` below reads them
word by word with shifts, apart from the code under test.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internjax.adapt.lora import NUM_IN
from internjax.adapt.quantize import QuantConfig, quantize
from internjax.errors import Corrupt, UserError
from internjax.models.convert import convert
from internjax.models.decoder import forward
from internjax.models.hf import load_hf, save_hf
from internjax.models.hf_packed import to_awq_words, to_gptq_words, to_gptq_zeros
from internjax.models.native import load_native, save_native
from internjax.tree import flatten
from internjax.weights import QuantWeight, plain
from tests.reference.tiny import write_tiny

ROWS = np.random.default_rng(0).integers(0, 256, (1, 16)).astype(np.int32)


def test_the_words_of_awq():
    codes = np.arange(8, dtype=np.uint8)[None]  # columns 0..7
    assert [hex(x) for x in to_awq_words(codes).view(np.uint32)[0]] == ["0x75316420"]


def test_the_words_of_gptq():
    codes = np.arange(8, dtype=np.uint8)[:, None]  # rows 0..7
    assert [hex(x) for x in to_gptq_words(codes).view(np.uint32)[0]] == ["0x76543210"]
    zeros = np.arange(1, 9, dtype=np.uint8)[None]
    assert [hex(x) for x in to_gptq_zeros(zeros, True).view(np.uint32)[0]] == ["0x76543210"]
    assert [hex(x) for x in to_gptq_zeros(zeros, False).view(np.uint32)[0]] == ["0x87654321"]


def unpacked(tensors: dict, stem: str, method: str) -> np.ndarray:
    """Expands one matrix `[I, O]`, a number at a time."""
    words = {p: tensors[f"{stem}.{p}"].view(np.uint32) for p in ("qweight", "qzeros")}
    scales = tensors[f"{stem}.scales"].astype(np.float32)
    groups, columns = scales.shape
    rows = len(words["qweight"]) * (1 if method == "awq" else 8)
    out = np.zeros((rows, columns), np.float32)
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # column of eight -> nibble, awq
    for i in range(rows):
        for o in range(columns):
            group = i // (rows // groups)
            if method == "awq":
                shift = 4 * place[o % 8]
                code = int(words["qweight"][i, o // 8]) >> shift & 15
                zero = int(words["qzeros"][group, o // 8]) >> shift & 15
            else:
                code = int(words["qweight"][i // 8, o]) >> 4 * (i % 8) & 15
                zero = (int(words["qzeros"][group, o // 8]) >> 4 * (o % 8) & 15) + 1
            out[i, o] = (code - zero) * scales[group, o]
    return out


@pytest.fixture(scope="module", params=["llama3", "internlm2", "qwen2"])
def quantized(request, tmp_path_factory):
    """A tiny model with 4-bit weights of one family: its config and tree."""
    folder = write_tiny(request.param, tmp_path_factory.mktemp("tiny") / "m")
    cfg, params = load_hf(folder)
    layers = dict(params["layers"])
    for name, num_in in NUM_IN.items():
        layers[name] = drawn(layers[name].shape, num_in)
    return cfg, params | {"layers": layers}, folder


def drawn(shape: tuple[int, ...], num_in: int, group: int = 16) -> QuantWeight:
    """Random codes, scales and zeros of all legal sizes in the shape of a stacked projection."""
    rng = np.random.default_rng(len(shape))
    L, ins, outs = shape[0], shape[1 : 1 + num_in], shape[1 + num_in :]
    rows, columns = int(np.prod(ins)), int(np.prod(outs))
    values = rng.integers(0, 256, (L, rows // 2, columns)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.02, (L, rows // group, columns)).astype(np.float16)
    zeros = rng.integers(1, 16, scales.shape).astype(np.float16)
    return QuantWeight(values, scales, zeros, ins, outs)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_quantized_checkpoint_goes_there_and_back(quantized, method, tmp_path):
    cfg, params, source = quantized
    save_hf(tmp_path / "q", cfg, params, source, quant=method)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["bits"], said["group_size"]) == (method, 4, 16)
    _, read = load_hf(tmp_path / "q")
    for path, want in flatten(params).items():
        got = flatten(read)[path]
        if isinstance(want, QuantWeight):
            assert (got.in_shape, got.out_shape) == (want.in_shape, want.out_shape)
            for part in ("values", "scales", "zeros"):
                np.testing.assert_array_equal(getattr(got, part), getattr(want, part), path)
        else:
            np.testing.assert_array_equal(got, want, path)
    save_hf(tmp_path / "again", cfg, read, source, quant=method)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_another_reader_finds_the_same_weights(quantized, method, tmp_path):
    """Names, transposition and nibbles: the matrix read by definition is the weight of our tree."""
    cfg, params, source = quantized
    save_hf(tmp_path / "q", cfg, params, source, quant=method)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    fused = cfg.family == "internlm2"
    mlp = "feed_forward.w1" if fused else "mlp.gate_proj"
    got = unpacked(tensors, f"model.layers.1.{mlp}", method)
    want = plain(params["layers"]["w_gate"], jnp.float32)[1]
    np.testing.assert_array_equal(got, want)
    out = "attention.wo" if fused else "self_attn.o_proj"
    got = unpacked(tensors, f"model.layers.2.{out}", method)
    want = plain(params["layers"]["wo"], jnp.float32)[2]
    np.testing.assert_array_equal(got, want.reshape(got.shape))
    q, k, v = (plain(params["layers"][n], jnp.float32)[0] for n in ("wq", "wk", "wv"))
    if fused:  # rows by KV head: its queries, its key, its value
        got = unpacked(tensors, "model.layers.0.attention.wqkv", method)
        D, N, H = q.shape
        K = k.shape[1]
        got = got.reshape(D, K, N // K + 2, H)
        np.testing.assert_array_equal(got[:, :, :-2].reshape(q.shape), q)
        np.testing.assert_array_equal(got[:, :, -2], k)
        np.testing.assert_array_equal(got[:, :, -1], v)
    else:
        got = unpacked(tensors, "model.layers.0.self_attn.q_proj", method)
        np.testing.assert_array_equal(got, q.reshape(got.shape))


def test_conversion_keeps_the_integers(quantized, tmp_path):
    """awq -> ours -> gptq: other words, the same logits."""
    cfg, params, source = quantized
    save_hf(tmp_path / "awq", cfg, params, source, quant="awq")
    convert(tmp_path / "awq", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "gptq", to="hf", quant="gptq")
    _, ours = load_native(tmp_path / "ours")
    _, last = load_hf(tmp_path / "gptq")
    ours, last = (jax.tree.map(jnp.asarray, tree) for tree in (ours, last))
    tokens = jnp.asarray(ROWS)
    np.testing.assert_array_equal(forward(ours, tokens, cfg), forward(last, tokens, cfg))
    with pytest.raises(UserError, match="quant=awq or gptq"):
        convert(tmp_path / "ours", tmp_path / "none", to="hf")


def test_a_zero_of_sixteen_steps_wraps_as_in_gptqmodel():
    words = to_gptq_zeros(np.asarray([[0, 1, 0, 8, 15, 1, 0, 3]], np.uint8), True)
    from internjax.models.hf_packed import from_gptq_zeros

    np.testing.assert_array_equal(from_gptq_zeros(words, True), [[0, 1, 0, 8, 15, 1, 0, 3]])


@pytest.fixture
def folder(quantized, tmp_path) -> Path:
    cfg, params, source = quantized
    save_hf(tmp_path / "q", cfg, params, source, quant="gptq")
    return tmp_path / "q"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' in 4 bits; read are awq and gptq"),
        ({"bits": 3}, "in 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'; read is gemm"),
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
    ],
)
def test_other_quantizations_are_refused(folder, changes, complaint):
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=complaint):
        load_hf(folder)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (lambda t, n: t.pop(f"{n}.scales"), Corrupt, "scales is missing"),
        (lambda t, n: t.update({f"{n}.qzeros": t[f"{n}.qzeros"][:1]}), Corrupt, "qzeros is"),
        (
            lambda t, n: t.update({f"{n}.g_idx": t[f"{n}.g_idx"][::-1].copy()}),
            UserError,
            "desc_act",
        ),
        (lambda t, n: t.update({f"{n}.other": t[f"{n}.g_idx"]}), Corrupt, "have no place"),
    ],
)
def test_damage_and_scattered_groups_are_refused(folder, change, error, complaint):
    tensors = load_file(folder / "model.safetensors")
    stem = next(n for n in tensors if n.endswith(".qweight")).removesuffix(".qweight")
    change(tensors, stem)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error, match=complaint):
        load_hf(folder)


def test_what_the_layouts_cannot_hold_is_refused(quantized, tmp_path):
    cfg, params, source = quantized
    _, host = load_hf(source)
    host = jax.tree.map(jnp.asarray, host)
    rtn = quantize(host, QuantConfig(method="rtn", group=16, targets=("w_up",)))
    with pytest.raises(UserError, match="no whole numbers"):
        save_hf(tmp_path / "a", cfg, rtn, source, quant="awq")
    with pytest.raises(UserError, match="has no 4-bit weights"):
        save_hf(tmp_path / "b", cfg, host, source, quant="awq")
    save_native(tmp_path / "c", cfg, params)
    with pytest.raises(UserError, match="keeps integers as they are"):
        convert(tmp_path / "c", tmp_path / "d", to="native", quant="awq")
