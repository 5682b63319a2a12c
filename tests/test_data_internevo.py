"""InternEvo's .bin files: read and written as it does, masks and all; damage is named by line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.internevo import from_internevo, read_bin, to_internevo, write_bin
from internjax.data.mixture import Mixture, MixtureConfig, open_sources
from internjax.data.schedule import BatchPlan
from internjax.data.shards import TokenShards, write_shards
from internjax.data.tokenizer import load_tokenizer
from internjax.errors import Corrupt, Missing, UserError
from tests.fakes import BYTE_VOCAB, byte_tokenizer


def as_internevo_writes(path: Path, documents: list[list[int]]) -> None:
    """What tools/tokenizer.py of InternEvo does, with its 32-bit meta."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"tokens": ids}).encode() + b"\n" for ids in documents]
    path.write_bytes(b"".join(lines))
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    pairs = list(zip(starts.tolist(), map(len, documents)))
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(pairs, dtype=np.int32))


def test_a_file_as_internevo_writes_it(tmp_path: Path):
    as_internevo_writes(tmp_path / "in" / "cn" / "a.bin", [[1, 104, 101, 2], [1, 2]])
    as_internevo_writes(tmp_path / "in" / "cn" / "b.bin", [[7]])
    as_internevo_writes(tmp_path / "in" / "en" / "a.bin", [[1, -104, -101, 108, 2]])
    tokenizer = byte_tokenizer()
    headers = from_internevo(tmp_path / "in", tmp_path / "out", tokenizer)
    assert {name: h["documents"] for name, h in headers.items()} == {"cn": 3, "en": 1}
    sources = open_sources(tmp_path / "out", tokenizer_hash=tokenizer.hash, verify=True)
    assert [ids.tolist() for ids in sources["cn"]] == [[1, 104, 101, 2], [1, 2], [7]]
    assert not sources["cn"].masked
    assert sources["cn"].documents()[1]["id"] == "cn/a.bin:2"
    assert sources["cn"].num_bytes == 4 + 2 + 1, "a byte tokenizer: a byte an id"
    assert sources["en"][0].tolist() == [1, 104, 101, 108, 2]
    assert sources["en"].read_mask(0, 5).tolist() == [1, 0, 0, 1, 1]
    batch = Mixture(sources, BatchPlan(1), MixtureConfig(length=5)).batch_at
    masked = next(b for b in map(batch, range(9)) if b.sources[0, 0] == 1)
    assert masked.tokens[0].tolist() == [1, 104, 101, 108, 2], "the input is abs(id)"
    assert masked.targets[0, :4].tolist() == [104, 101, 108, 2]
    assert masked.loss_mask[0].tolist() == [0, 0, 1, 1, 0], "label <= 0: not learned"


@pytest.mark.needs_mirror
def test_internevos_own_example_with_its_own_tokenizer(mirror: Path, tmp_path: Path):
    """The ids stand in tools/tokenizer.py of InternEvo; begin and end as its program adds them."""
    ids = [67577, 69095, 63010, 61770, 67783, 69301, 74732]
    tokenizer = load_tokenizer(mirror / "models-small" / "tokenizer_internlm.model")
    as_internevo_writes(tmp_path / "in" / "cn" / "a.bin", [[1, *ids, 2]])
    from_internevo(tmp_path / "in", tmp_path / "out", tokenizer)
    shards = open_sources(tmp_path / "out", tokenizer_hash=tokenizer.hash)["cn"]
    text = "今天天气晴朗适合出门散步"
    assert tokenizer.encode(text) == shards[0].tolist()[1:-1] == ids
    assert tokenizer.decode(shards[0].tolist(), skip_specials=True) == text
    assert shards.num_bytes == len(text.encode())


def test_id_0_is_never_learned_and_bos_may_be_masked(tmp_path: Path):
    """Trap: 0 has no negative, so a label 0 is ignored either way; -1 is a masked bos."""
    as_internevo_writes(tmp_path / "in" / "a.bin", [[-1, 5, 0, 6]])
    from_internevo(tmp_path / "in", tmp_path / "out", byte_tokenizer())
    shards = TokenShards(tmp_path / "out")
    assert shards[0].tolist() == [1, 5, 0, 6]
    assert shards.read_mask(0, 4).tolist() == [0, 1, 0, 1]
    as_internevo_writes(tmp_path / "zero" / "a.bin", [[5, 0, 6]])  # without any minus sign
    from_internevo(tmp_path / "zero", tmp_path / "out2", byte_tokenizer())
    assert TokenShards(tmp_path / "out2").read_mask(0, 3).tolist() == [1, 0, 1]


SIGNED = st.lists(st.lists(st.integers(1 - BYTE_VOCAB, BYTE_VOCAB - 1), max_size=8), max_size=5)


@settings(deadline=None, max_examples=15)
@given(cn=SIGNED.filter(bool), code=SIGNED.filter(bool))
def test_out_and_in_again_is_the_same(tmp_path_factory, cn, code):
    folder = tmp_path_factory.mktemp("internevo")
    tokenizer = byte_tokenizer()
    given = {"cn": cn, "code": code}
    for name, documents in given.items():
        rows = [(f"{i}", np.array(ids, np.int64), 0) for i, ids in enumerate(documents)]
        write_shards(
            folder / "a" / name,
            rows,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            masked=True,
        )
    counts = to_internevo(open_sources(folder / "a"), folder / "bin")
    assert counts == {name: len(documents) for name, documents in given.items()}
    for name, documents in given.items():
        found = [ids.tolist() for ids in read_bin(folder / "bin" / name / "train-00000.bin")]
        assert found == documents
    from_internevo(folder / "bin", folder / "b", tokenizer)
    for name in given:
        before, after = (TokenShards(folder / x / name, verify=True) for x in "ab")
        total = before.num_tokens
        assert before.offsets.tolist() == after.offsets.tolist()
        assert before.read(0, total).tolist() == after.read(0, total).tolist()
        assert before.read_mask(0, total).tolist() == after.read_mask(0, total).tolist()


def test_a_learned_0_is_not_lost_silently(tmp_path: Path):
    rows = [("d", np.array([0, 5, 0]), 1)]
    write_shards(tmp_path / "s", rows, tokenizer_hash="a" * 64, vocab_size=9)
    sources = open_sources(tmp_path / "s")
    with pytest.raises(UserError, match=r"source s: document 0 learns the id 0"):
        to_internevo(sources, tmp_path / "bin")
    assert not (tmp_path / "bin").exists()
    assert to_internevo(sources, tmp_path / "bin", mask_zero=True) == {"s": 1}


def test_offsets_beyond_32_bits_are_written(tmp_path: Path):
    write_bin(tmp_path / "a.bin", [np.array([1, 2]), np.array([3])])
    meta = np.load(tmp_path / "a.bin.meta")
    assert meta.tolist() == [[0, 2], [19, 1]] and meta.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:-5], r"a\.bin:2: is no line .* or is cut short"),
        (lambda b: b + b'{"tokens": [1]}\n', r"goes on after its 2 documents"),
        (lambda b: b.replace(b"5, 6", b"5, 6, 6"), r"a\.bin:1: has 3 tokens, its \.meta says 2"),
        (lambda b: b.replace(b"5, 6", b"55, 6"), r"a\.bin:2: begins at byte 20, .* says 19"),
        (lambda b: b.replace(b"5, 6", b"5,.6"), r"a\.bin:1: is no line"),
        (lambda b: b.replace(b"5, 6", b"5.56"), r"a\.bin:1: tokens is not a list of whole"),
        (lambda b: b.replace(b"tokens", b"token_"), r"a\.bin:1: is no line"),
        (lambda b: b.replace(b"[5, 6]", b"999999"), r"a\.bin:1: "),
    ],
)
def test_damaged_files_are_named_by_line(tmp_path: Path, change, words: str):
    as_internevo_writes(tmp_path / "a.bin", [[5, 6], [7]])
    file = tmp_path / "a.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(Corrupt, match=words):
        list(read_bin(file))


def test_meta_files_that_are_none(tmp_path: Path):
    as_internevo_writes(tmp_path / "a.bin", [[5, 6]])
    meta = tmp_path / "a.bin.meta"
    for content, words in (
        (b"", "is no NumPy array"),
        (b"\x93NUMPY", "is no NumPy array"),
        (np.zeros(3, np.int32), "not whole numbers"),
        (np.zeros((1, 2)), "not whole numbers"),
        (np.array([[-5, 2]], np.int32), "beyond 2 GiB"),
    ):
        if isinstance(content, bytes):
            meta.write_bytes(content)
        else:
            with open(meta, "wb") as file:
                np.save(file, content)
        with pytest.raises(Corrupt, match=words):
            list(read_bin(tmp_path / "a.bin"))
    meta.unlink()
    with pytest.raises(Missing, match=r"a\.bin\.meta is missing"):
        list(read_bin(tmp_path / "a.bin"))


def test_what_cannot_be_imported(tmp_path: Path):
    with pytest.raises(Missing, match=r"holds no \.bin file"):
        from_internevo(tmp_path, tmp_path / "out", byte_tokenizer())
    as_internevo_writes(tmp_path / "in" / "en" / "a.bin", [[1], [5, -BYTE_VOCAB]])
    with pytest.raises(UserError, match=rf"a\.bin:2: token id {BYTE_VOCAB} is beyond"):
        from_internevo(tmp_path / "in", tmp_path / "out", byte_tokenizer())
    assert not (tmp_path / "out").exists()
    as_internevo_writes(tmp_path / "in" / "b.bin", [[1]])
    with pytest.raises(UserError, match=r"beside folders of such files: move b\.bin"):
        from_internevo(tmp_path / "in", tmp_path / "out", byte_tokenizer())
