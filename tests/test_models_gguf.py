"""GGUF: files of other writers, every block format, our own export, and damaged files."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.config import RopeConfig
from internjax.models.gguf import load_gguf
from internjax.models.gguf_blocks import BLOCKS, PLAIN, decode, encode
from internjax.models.gguf_export import QUANTS, save_gguf
from internjax.models.gguf_file import open_gguf
from internjax.models.hf import load_hf
from internjax.tree import flatten
from tests.reference.tiny import VARIANTS, write_tiny
from tests.reference.tiny_gguf import ARCHITECTURES, KINDS, write_tiny_gguf


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """A tiny Llama as F32 GGUF of another writer."""
    return write_tiny_gguf("smollm2", "F32", tmp_path_factory.mktemp("gguf") / "smollm2.gguf")


@pytest.mark.parametrize("variant", [v for v in ARCHITECTURES if v != "llama3"])
def test_foreign_file_equals_the_hf_folder(variant, tmp_path):
    cfg, params = load_gguf(write_tiny_gguf(variant, "F32", tmp_path / "tiny.gguf"))
    hf_cfg, hf_params = load_hf(write_tiny(variant, tmp_path / "hf"))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(hf_params)[path], err_msg=path)
    shape = ("num_layers", "num_kv_heads", "head_dim", "norm_eps", "rope", "qkv_bias", "qk_norm")
    for field in (*shape, "family", "output_bias", "tie_embeddings", "vocab_size", "max_context"):
        if not (field == "family" and variant == "smollm2"):  # its file has no telling name
            assert getattr(cfg, field) == getattr(hf_cfg, field), field


def test_llama3_frequencies_of_another_rule_are_refused(tmp_path):
    """The tiny variant's original context is 32, which no published Llama 3 has."""
    with pytest.raises(UserError, match="rope_freqs"):
        load_gguf(write_tiny_gguf("llama3", "F32", tmp_path / "tiny.gguf"))


def test_llama3_frequencies_are_recognised(tmp_path, monkeypatch):
    published = {"original_max_position_embeddings": 8192, "factor": 32.0}
    changes = VARIANTS["llama3"][1]
    monkeypatch.setitem(changes, "rope_scaling", changes["rope_scaling"] | published)
    cfg, _ = load_gguf(write_tiny_gguf("llama3", "F32", tmp_path / "tiny.gguf"))
    assert cfg.rope == RopeConfig("llama3", 500000.0, 32.0, 8192)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_format_with_an_encoder(kind, tmp_path):
    """A file in `kind` reads as what the format's own encoder and scalar decoder make of it."""
    _, params = load_gguf(write_tiny_gguf("llama2", kind, tmp_path / "tiny.gguf"))
    _, exact = load_hf(write_tiny("llama2", tmp_path / "hf"))
    bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7, "Q5_0": 0.07, "Q5_1": 0.04}
    got, want = flatten(params), flatten(exact)
    for path in ("embed", "layers/wq", "layers/wo", "layers/w_down"):
        error = np.abs(got[path].astype(np.float32) - want[path]).max()
        assert error <= bound.get(kind, 0.14) * np.abs(want[path]).max(), (path, error)
    plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert got["layers/wq"].dtype == plain.get(kind, np.float32)


def _one_tensor(path, kind, raw, columns):
    """Writes a GGUF file with one tensor of raw blocks."""
    quant = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path).read("x")


def _scale_min(q, j):
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    low = (q[j + 4] & 15) | ((q[j - 4] >> 6) << 4)
    return low, (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def _k45_block(block, five):
    """Q4_K and Q5_K value by value: 8 runs of 32, each with a 6-bit scale and minimum."""
    d, dmin = struct.unpack("<2e", block[:4])
    scales = list(block[4:16])
    high = block[16:48] if five else bytes(32)
    codes = block[48:] if five else block[16:]
    values = []
    for run in range(8):
        scale, minimum = _scale_min(scales, run)
        for i in range(32):
            byte = codes[run // 2 * 32 + i]
            code = (byte >> 4 if run % 2 else byte & 15) + 16 * (high[i] >> run & 1)
            values.append(d * scale * code - dmin * minimum)
    return values


def _k6_block(block):
    """Q6_K value by value: two halves of 128, four bits in ql, two in qh, a scale each 16."""
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    values = []
    for i in range(256):
        half, quarter, l = i // 128, i % 128 // 32, i % 32
        byte = low[half * 64 + (quarter % 2) * 32 + l]
        four = byte >> 4 if quarter > 1 else byte & 15
        two = high[half * 32 + l] >> 2 * quarter & 3
        values.append(d * scales[i // 16] * ((four | two << 4) - 32))
    return values


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_equal_a_scalar_decoder(kind, tmp_path):
    rng = np.random.default_rng(3)
    size = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
    raw = rng.integers(0, 256, (3, 2, size), np.uint8)
    scale = np.array([0.01, 0.003], np.float16).view(np.uint8)
    if kind == "Q6_K":
        raw[..., 208:] = scale[:2]
    else:
        raw[..., :4] = scale
    got = _one_tensor(tmp_path / "k.gguf", kind, raw.reshape(3, 2 * size), 512)
    blocks = [b.tobytes() for b in raw.reshape(6, size)]
    want = [_k6_block(b) if kind == "Q6_K" else _k45_block(b, kind == "Q5_K") for b in blocks]
    np.testing.assert_allclose(got, np.array(want).reshape(3, 512), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - set(PLAIN)))
def test_random_blocks_decode_as_the_reference_does(kind):
    """Every byte pattern, infinite and NaN scales too: the same float32 bits as ggml's package."""
    block = BLOCKS[kind]
    assert gguf.GGMLQuantizationType[kind] == block.number
    raw = np.random.default_rng(5).integers(0, 256, (4000, block.fields.itemsize), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        want = getattr(gguf.quants, kind).dequantize_rows(raw)
        got = decode(kind, raw.reshape(-1), want.shape)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("quant", sorted(QUANTS))
def test_our_file_reads_elsewhere(quant, tmp_path):
    """ggml's own reader finds our keys, types, shapes, offsets and numbers."""
    cfg, params = _random_model(1)
    keys = {"tokenizer.ggml.tokens": ["a", "乙", ""], "tokenizer.ggml.merges": []}
    keys |= {"tokenizer.ggml.scores": [0.5, -1.0, 0.0], "tokenizer.ggml.token_type": [1, 1, 3]}
    keys["tokenizer.ggml.add_bos_token"] = True
    save_gguf(tmp_path / "x.gguf", cfg, params, keys, quant=quant)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in keys.items():
        assert reader.get_field(key).contents() == value, key
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("general.file_type").contents() == QUANTS[quant][2]
    assert reader.get_field("llama.block_count").contents() == cfg.num_layers
    ours = open_gguf(tmp_path / "x.gguf")
    assert [t.name for t in reader.tensors] == list(ours.tensors)
    for t in reader.tensors:
        theirs = gguf.quants.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(ours.read(t.name).astype(np.float32), theirs, t.name)


def _random_model(seed, scale=0.1):
    """A tiny model's config and parameters, scaled."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cfg, params = load_hf(write_tiny("internlm", folder, seed=seed))
    for leaf in flatten(params).values():
        leaf *= scale
    return cfg, params


@settings(max_examples=12, deadline=None)
@given(
    quant=st.sampled_from(sorted(QUANTS)),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-3, 3),
)
def test_export_reads_back(quant, seed, exponent, tmp_path_factory):
    """Our file reads back within half a step of its format; written again, nothing changes."""
    cfg, params = _random_model(seed, 10.0**exponent)
    folder = tmp_path_factory.mktemp("export")
    save_gguf(folder / "a.gguf", cfg, params, quant=quant)
    cfg_back, back = load_gguf(folder / "a.gguf")
    assert cfg_back == cfg
    half = 2**-11  # float16's rounding, also of a block's step and minimum
    bounds = {"f32": 0, "f16": half, "bf16": 2**-8, "q8_0": 0.5 / 127 + half}
    step = bounds.get(quant, 1.0 / 15 + 3 * half)
    for path, leaf in flatten(back).items():
        want = flatten(params)[path]
        error = np.abs(leaf.astype(np.float32) - want).max()
        # 4e-6: float16's smallest step, 2**-24, halved, times the largest code
        assert error <= step * np.abs(want).max() + 4e-6, (path, error)
    if quant != "q4_1":  # its minimum is rounded to float16, so codes may move by one
        save_gguf(folder / "b.gguf", cfg, back, quant=quant)
        again = flatten(load_gguf(folder / "b.gguf")[1])
        for path, leaf in flatten(back).items():
            np.testing.assert_array_equal(leaf, again[path], err_msg=path)


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=32, max_size=32), min_size=1, max_size=4
    ),
    kind=st.sampled_from(["Q8_0", "Q4_1"]),
)
def test_encoders_stay_within_their_bound(blocks, kind, tmp_path_factory):
    """Half a step a value, plus what float16 loses of the step and of the minimum."""
    x = np.array(blocks, np.float32)
    raw = encode(kind, x).reshape(len(x), -1)
    got = getattr(gguf.quants, kind).dequantize_rows(raw)
    largest = np.abs(x).max(1, keepdims=True)
    spread = x.max(1, keepdims=True) - x.min(1, keepdims=True)
    half16 = 2.0**-11  # relative; below 2**-14 float16 has a fixed step of 2**-24
    if kind == "Q8_0":
        bound = largest / 254 + largest * half16 + 127 * 2.0**-25
    else:
        bound = spread / 30 + (spread + largest) * half16 + 16 * 2.0**-25
    assert (np.abs(got - x) <= bound * 1.001).all()


@pytest.mark.parametrize("fraction", [0, 0.001, 0.02, 0.5, 0.999])
def test_truncated_file_is_one_clear_line(smol, fraction, tmp_path):
    whole = smol.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(Corrupt, match=r"cut\.gguf.*fetch") as error:
        load_gguf(tmp_path / "cut.gguf")
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@example(place=174, value=6)  # the context's length becomes a tiny float32
@given(place=st.integers(0, 2600), value=st.integers(0, 255))
def test_damaged_header_never_ends_in_another_error(smol, place, value, tmp_path_factory):
    """Any byte of the header changed: the file is refused in one line, or still reads."""
    data = bytearray(smol.read_bytes())
    data[place] = value
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(data)
    try:
        load_gguf(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_missing_foreign_and_unknown_files(tmp_path):
    with pytest.raises(Missing, match="no such GGUF file"):
        load_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("this is a text and not a model at all")
    with pytest.raises(Corrupt, match="is no GGUF file"):
        load_gguf(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_tensor("x", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'bert'; legal are llama"):
        load_gguf(tmp_path / "bert.gguf")
    with pytest.raises(UserError, match=f"number 20; formats read: {', '.join(BLOCKS)}"):
        raw = np.zeros((1, 18), np.uint8)
        _one_tensor(tmp_path / "iq.gguf", "IQ4_NL", raw, 32)


def test_unknown_quant_leaves_nothing(tmp_path):
    cfg, params = _random_model(0)
    with pytest.raises(UserError, match="quant='q9'; legal are"):
        save_gguf(tmp_path / "a.gguf", cfg, params, quant="q9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs_model
def test_smollm2_exports_without_loss(smollm2_gguf, tmp_path):
    """Dequantized weights as Q4_1/Q8_0 again hold the same numbers within float16's rounding."""
    cfg, params = load_gguf(smollm2_gguf)
    assert (cfg.family, cfg.num_layers, cfg.head_dim, cfg.rope.theta) == ("smollm2", 30, 64, 1e5)
    save_gguf(tmp_path / "again.gguf", cfg, params, quant="q8_0")
    _, again = load_gguf(tmp_path / "again.gguf")
    for path, leaf in flatten(params).items():
        scale = np.abs(leaf).max()
        assert np.abs(flatten(again)[path] - leaf).max() <= scale / 127, path
