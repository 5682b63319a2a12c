"""Laws of the tokenizers: two engines, one rule for special tokens, bytes in and out."""

import io
import json
import random
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st
from sentencepiece import sentencepiece_model_pb2 as spm_proto

from internjax.data.gguf_metadata import read_metadata
from internjax.data.gguf_vocabulary import PRE_TOKENIZERS
from internjax.data.tokenizer import StreamDecoder, Tokenizer, check_vocab, load_tokenizer
from internjax.data.tokenizer_engines import BpeEngine, byte_alphabet
from internjax.errors import Corrupt, Missing, UserError

CORPUS = [
    "The decoder reads every token once, and the cache keeps what it has read.",
    "Twelve apples and 3 pears cost 45 coins; 12 + 33 = 45.",
    "模型读入文字，写出文字。每个字都有自己的编号。",
    "def add(a, b):\n    return a + b\n",
] * 4
MARKERS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<||>"]


def bpe_vocabulary() -> tuple[list[str], list[list[str]], list[int]]:
    """Tokens, merges and GGUF types of a small byte-level vocabulary; markers stand first."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=list(byte_alphabet()), show_progress=False
    )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*MARKERS, *words, "<think>", "        "]
    types = [3] * len(MARKERS) + [1] * len(words) + [4, 4]
    return tokens, model["merges"], types


def write_bpe_gguf(path: Path, pre: str = "gpt-2") -> Path:
    tokens, merges, types = bpe_vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    return close(writer, path)


def close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def sentencepiece_model(**options) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[UNUSED_TOKEN_0]", "——"],
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = {"bpe": write_bpe_gguf(folder / "bpe.gguf")}
    for name, prefix in (("spm", False), ("spm-prefix", True)):
        paths[name] = folder / f"{name}.model"
        paths[name].write_bytes(sentencepiece_model(add_dummy_prefix=prefix))
    return paths


@pytest.fixture(scope="module")
def loaded(files) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(path) for name, path in files.items()}


LAW = settings(deadline=None, max_examples=40)
KINDS = ["bpe", "spm", "spm-prefix"]
# SentencePiece writes a blank as U+2581, so a typed U+2581 comes back as a blank.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")),
        st.sampled_from([*MARKERS, "<s>", "</s>", "<unk>", "[UNUSED_TOKEN_0]", "——", "<think>"]),
        st.sampled_from([" ", "  ", "        ", "\n", "0", "文字", "<0x0A>"]),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(text=TEXTS, specials=st.booleans())
def test_decoding_is_the_inverse_of_encoding(loaded, kind, text, specials):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text, specials=specials)
    if not specials or kind != "spm-prefix":
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(text=TEXTS)
def test_typed_text_never_becomes_a_marker(loaded, kind, text):
    tokenizer = loaded[kind]
    assert not any(map(tokenizer.is_special, tokenizer.encode(text, specials=False)))
    assert tokenizer.encode_batch([text, "a"])[0] == tokenizer.encode(text, specials=False)


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_and_never_half_a_letter(loaded, kind, data):
    tokenizer = loaded[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip_specials=skip)
    kept = [i for i in ids if not (skip and tokenizer.is_special(i))]
    raw = b"".join(map(tokenizer.token_bytes, kept))
    if tokenizer.engine.strips_space:
        raw = raw.removeprefix(b" ")
    assert whole == raw.decode("utf-8", errors="replace")
    assert "".join(tokenizer.decode_stream(ids, skip_specials=skip)) == whole


def test_a_letter_is_held_back_until_it_is_whole(loaded):
    stream = StreamDecoder(loaded["bpe"])
    ids = [loaded["bpe"].encode("🙂")[0] for _ in range(1)] + loaded["bpe"].encode("🙂")[1:]
    assert len(ids) == 4  # the vocabulary has no merge for it: one id a byte
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


@LAW
@given(text=TEXTS)
def test_markers_are_found_as_the_tokenizers_library_finds_them(loaded, text):
    tokenizer = loaded["bpe"]
    native = tokenizers.Tokenizer.from_str(tokenizer.engine.dump().decode())
    assert tokenizer.encode(text) == native.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["spm", "spm-prefix"])
@LAW
@given(text=TEXTS.filter(lambda text: "[UNUSED" not in text))
def test_plain_text_is_encoded_as_the_sentencepiece_library_does(files, loaded, kind, text):
    native = _native(files[kind])
    assert loaded[kind].encode(text, specials=False) == native.encode(text)


_natives = {}


def _native(path: Path) -> sentencepiece.SentencePieceProcessor:
    if path not in _natives:
        _natives[path] = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return _natives[path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_as_the_same_tokenizer(loaded, kind, tmp_path):
    tokenizer = loaded[kind]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "a <|im_start|>b</s> 文字 12 [UNUSED_TOKEN_0]——<think>"
    assert again.hash == tokenizer.hash
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos_id", "eos_id", "pad_id", "eos_ids", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name), name


def test_ids_of_a_document_and_of_its_end(loaded):
    assert (loaded["bpe"].bos_id, loaded["bpe"].eos_id, loaded["bpe"].pad_id) == (0, 1, 1)
    assert loaded["bpe"].eos_ids == (1, 2)  # <|endoftext|> ends a text as well
    assert loaded["bpe"].adds_bos is False and loaded["spm"].adds_bos is True
    assert loaded["spm"].encode("", bos=True) == [loaded["spm"].bos_id] == [1]
    with pytest.raises(UserError, match="outside the vocabulary"):
        loaded["spm"].decode([10**6])


def test_text_goes_on_without_a_second_blank(loaded):
    tokenizer = loaded["spm-prefix"]
    head, tail = tokenizer.encode("The"), tokenizer.engine.encode(" token", prefix=False)
    assert tokenizer.decode(head + tail) == "The token"
    assert tokenizer.encode("<s>The")[1:] == head


def test_a_model_smaller_than_the_vocabulary_is_refused(loaded):
    check_vocab(loaded["bpe"], loaded["bpe"].vocab_size)
    check_vocab(loaded["bpe"], 512)  # padded rows are fine
    with pytest.raises(UserError, match="belong to different models"):
        check_vocab(loaded["bpe"], 100)


def test_names_in_a_folder_are_added_to_a_sentencepiece_model(files, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(files["spm"].read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 421}')
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {"420": {"content": "<|im_end|>", "special": True}},
        "chat_template": [
            {"name": "tool_use", "template": "b"},
            {"name": "default", "template": "a"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 420]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|><|im_end|>") == [421, 420]
    assert tokenizer.decode([421]) == "<|im_start|>"
    assert tokenizer.vocab_size == 422
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (420, (420, 2))
    assert tokenizer.chat_template == "a"


def test_a_sentencepiece_vocabulary_survives_gguf(files, loaded, tmp_path):
    for kind in ("spm", "spm-prefix"):
        path = write_sentencepiece_gguf(files[kind], tmp_path / f"{kind}.gguf")
        again = load_tokenizer(path)
        for text in [*CORPUS, "a  b", " x", "🙂\n\n——", "<s>[UNUSED_TOKEN_0]"]:
            assert again.encode(text) == loaded[kind].encode(text)


def write_sentencepiece_gguf(model: Path, path: Path) -> Path:
    proto = spm_proto.ModelProto.FromString(model.read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([each.piece for each in proto.pieces])
    writer.add_token_scores([each.score for each in proto.pieces])
    writer.add_token_types([each.type for each in proto.pieces])
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return close(writer, path)


def test_every_pre_tokenizer_name_builds_and_splits_as_told(tmp_path):
    for name in PRE_TOKENIZERS:
        tokenizer = load_tokenizer(write_bpe_gguf(tmp_path / f"{name}.gguf", name))
        assert (
            tokenizer.decode(tokenizer.encode("It's 1234 文字!\n\n  x")) == "It's 1234 文字!\n\n  x"
        )


def test_digits_split_as_the_name_says(tmp_path):
    """A vocabulary that could merge 12, 123 and 1234, so only the splitting tells them apart."""
    tokens, merges, types = bpe_vocabulary()
    at = len(tokens)
    longer = ["12", "123", "1234"]
    pairs = [["1", "2"], ["12", "3"], ["123", "4"]]
    pieces = {}
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens + longer)
        writer.add_token_types(types + [1] * 3)
        writer.add_token_merges([" ".join(pair) for pair in [*pairs, *merges]])
        tokenizer = load_tokenizer(close(writer, path))
        pieces[name] = [tokenizer.decode([i]) for i in tokenizer.encode("1234")]
    assert at + 3 == tokenizer.vocab_size
    assert pieces == {
        "gpt-2": ["1234"],
        "smollm": ["1", "2", "3", "4"],
        "llama-bpe": ["123", "4"],
        "qwen2": ["1", "2", "3", "4"],
    }


def test_a_whole_word_rule_does_not_let_markers_in(tmp_path):
    tokenizer = load_tokenizer(write_bpe_gguf(tmp_path / "l3.gguf", "llama-bpe"))
    for marker in MARKERS:
        assert tokenizer.decode(tokenizer.encode(marker, specials=False)) == marker
        assert not any(map(tokenizer.is_special, tokenizer.encode(marker, specials=False)))


def test_gguf_metadata_is_what_the_gguf_library_reads(files):
    reader = gguf.GGUFReader(files["bpe"])
    metadata = read_metadata(files["bpe"])
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(metadata) == keys
    for key in keys:
        value, expected = metadata[key], reader.fields[key].contents()
        assert (value.tolist() if hasattr(value, "tolist") else value) == expected, key


def test_a_cut_gguf_is_called_corrupt_wherever_it_is_cut(files, tmp_path):
    whole = files["bpe"].read_bytes()
    path = tmp_path / "cut.gguf"
    for at in [0, 3, 10, 24, 30, *range(50, len(whole) - 1, len(whole) // 40)]:
        path.write_bytes(whole[:at])
        with pytest.raises(Corrupt):
            load_tokenizer(path)


@pytest.mark.parametrize("kind", ["bpe.gguf", "spm.gguf", "spm.model", "tokenizer.json"])
def test_damaged_bytes_load_or_end_in_one_clear_error(files, loaded, tmp_path, kind):
    source = tmp_path / kind
    if kind == "spm.gguf":
        write_sentencepiece_gguf(files["spm"], source)
    elif kind == "tokenizer.json":
        loaded["bpe"].save(tmp_path)
    else:
        source.write_bytes(files[kind.partition(".")[0]].read_bytes())
    whole, rng = source.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        source.write_bytes(damaged)
        try:
            load_tokenizer(source).encode("hello<|im_end|>")
            outcomes.add("loaded")
        except UserError:
            outcomes.add("refused")
    assert "refused" in outcomes  # and nothing but a UserError has come out


def test_a_gguf_that_claims_huge_lengths_is_corrupt(files, tmp_path):
    whole = bytearray(files["bpe"].read_bytes())
    path = tmp_path / "huge.gguf"
    for at in (16, 24):  # the number of keys, the length of the first one
        damaged = bytearray(whole)
        damaged[at : at + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        with pytest.raises(Corrupt, match="damaged or cut short"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("tokenizer.json", b"{", Corrupt, "not JSON"),
        ("tokenizer.json", b"[]", Corrupt, "not a JSON object"),
        ("tokenizer.json", b"\xff\xfe", Corrupt, "not JSON"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordPiece", "vocab": {}}}',
            UserError,
            "WordPiece",
        ),
        (
            "tokenizer.json",
            b'{"model": {"vocab": {"a": 0}, "merges": []}}',
            UserError,
            "decodes with",
        ),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{}]}', Corrupt, "special"),
        ("x.model", b"\x00\x01nonsense", Corrupt, "SentencePiece"),
        ("x.model", b"", Corrupt, "no pieces"),
        ("x.gguf", b"GGML" + b"\0" * 40, Corrupt, "not a GGUF"),
        ("x.bin", b"", UserError, "no tokenizer"),
    ],
)
def test_bad_files_give_one_clear_error(tmp_path, name, content, error, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=match):
        load_tokenizer(tmp_path / name)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(Missing, match="is not there"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(Missing, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="'tomorrow' is not known"):
        load_tokenizer(write_bpe_gguf(tmp_path / "x.gguf", "tomorrow"))


def test_metaspace_tokenizer_json_with_byte_fallback():
    """The layout of Llama 2's tokenizer.json: blanks as U+2581, unknown letters as bytes."""
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": vocab[i], "special": True, "lstrip": False, "rstrip": False,
             "single_word": False, "normalized": False}
            for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "byte_fallback": True, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "ignore_merges": False,
                  "vocab": {text: i for i, text in enumerate(vocab)}, "merges": [["\u2581", "a"]]},
    }  # fmt: skip
    engine = BpeEngine(spec)
    native = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in ("a", " a", "a 文", "aa\n"):
        ids = engine.encode(text)
        assert ids == native.encode(text, add_special_tokens=False).ids
        assert b"".join(engine.pieces[i] for i in ids) == b" " + text.encode()
        assert engine.encode(text, prefix=False) != ids
    assert engine.strips_space and engine.prefix_after_special


@pytest.mark.needs_mirror
def test_internlm_vocabularies(mirror, tmp_path):
    folder = mirror / "models-small"
    v1 = load_tokenizer(folder / "tokenizer_internlm.model")
    v2 = load_tokenizer(folder / "tokenizer_internlm2.model")
    text = "InternLM是书生·浦语大模型"
    assert v2.encode(text) == [
        1214, 1070, 11146, 60357, 60628, 60384, 60721, 62442, 60752, 60368, 70218,
    ]  # fmt: skip
    assert (v1.vocab_size, v2.vocab_size) == (103168, 92544)
    assert v2.encode("<|im_start|><|im_end|><|action_start|><|action_end|>") == [
        92543, 92542, 92541, 92540,
    ]  # fmt: skip
    assert v2.encode("<|interpreter|><|plugin|>") == [92539, 92538]
    assert v2.encode("[UNUSED_TOKEN_146][UNUSED_TOKEN_145]") == [92543, 92542]
    assert v2.decode([92543, 92542]) == "<|im_start|><|im_end|>"
    assert v2.eos_ids == (2, 92542)
    assert not {92542, 92543} & set(v2.encode("[UNUSED_TOKEN_145]<|im_end|>", specials=False))
    # The file's own <eoh>, <eoa>; 103166 is where InternEvo's alpaca recipe put the answer's end.
    assert v1.encode("<eoh><eoa>") == [103027, 103028]
    assert v1.eos_ids == (2, 103028, 103166)
    again = load_tokenizer(
        write_sentencepiece_gguf(folder / "tokenizer_internlm2.model", tmp_path / "v2.gguf")
    )
    samples = [text, "<|im_start|>user\n你好 world 123\n<|im_end|>", "——  ｆ\t\x00 🙂"]
    for tokenizer in (v1, v2, again):
        for sample in samples:
            assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert [again.encode(s) for s in samples] == [v2.encode(s) for s in samples]


@pytest.mark.needs_model
def test_smollm2_vocabulary(smollm2_gguf, tmp_path):
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.eos_ids == (2, 0) and not tokenizer.adds_bos
    assert (
        tokenizer.decode([504, 3575, 282, 4649, 314, 7042, 30]) == "The capital of France is Paris."
    )
    assert tokenizer.encode("The capital of France is Paris.") == [
        504,
        3575,
        282,
        4649,
        314,
        7042,
        30,
    ]
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert len(tokenizer.encode("12345")) == 5
    tokenizer.save(tmp_path)
    native = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Hello, world!  <|im_end|> 🙂 12", "文字\n\n\tx"):
        assert native.encode(text).ids == tokenizer.encode(text)
        assert native.decode(native.encode(text).ids, skip_special_tokens=False) == text
