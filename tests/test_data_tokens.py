"""`internjax data tokenizer | shards | import | export`, from the command line."""

from pathlib import Path

import pytest

from internjax.cli import run
from internjax.data.mixture import open_sources
from internjax.data.shards import TokenShards
from internjax.data.tokenizer import load_tokenizer
from tests.test_data_train_tokenizer import corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data run's documents, a tokenizer of them, and shards by language."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus(folder / "run" / "documents.jsonl")
    assert run(["data", "tokenizer", f"{folder}/run", f"{folder}/tok", "vocab_size=2500"]) == 0
    words = [f"tokenizer={folder}/tok", "by=language"]
    assert run(["data", "shards", f"{folder}/run", f"{folder}/shards", *words]) == 0
    return folder


def test_a_tokenizer_and_its_shards(made: Path):
    tokenizer = load_tokenizer(made / "tok")
    assert tokenizer.vocab_size == 2500
    sources = open_sources(made / "shards" / "train", tokenizer_hash=tokenizer.hash)
    assert list(sources) == ["en", "zh"]
    text = tokenizer.decode(sources["zh"][0][:-1].tolist())
    assert text in {page.read_text(encoding="utf-8") for page in Path("docs/zh").glob("*.md")}
    assert len(TokenShards(made / "shards" / "heldout")) == 2


def test_out_to_internevo_and_back(made: Path, capsys):
    assert run(["data", "export", f"{made}/shards/train", f"{made}/bin"]) == 0
    assert "bin/en: 3 documents" in capsys.readouterr().out
    back = f"{made}/back"
    assert run(["data", "import", f"{made}/bin", back, f"tokenizer={made}/tok"]) == 0
    before, after = open_sources(made / "shards" / "train"), open_sources(back, verify=True)
    for name in before:
        assert [x.tolist() for x in before[name]] == [x.tolist() for x in after[name]]
        assert before[name].num_bytes == after[name].num_bytes


def test_help_shows_the_keys_of_both_programs(capsys):
    assert run(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "internjax data tokenizer [INPUT] [OUT]" in text and "vocab_size=8192" in text
    assert "internjax data run [INPUT] [OUT]" in text and "jaccard=0.7" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tokenizer"], "needs what to read and a folder to write"),
        (["tokenizer", "nowhere", "x"], "nowhere is not there"),
        (["shards", "{made}/run", "x"], "needs tokenizer="),
        (["export", "{made}/bin2", "x"], "holds no token shards"),
        (["import", "{made}/run", "x", "tokenizer={made}/tok"], "holds no .bin file"),
        (["tokenizer", "{made}/run", "{made}/x", "vocab_size=400"], "raise it, or lower coverage"),
    ],
)
def test_one_clear_line(made: Path, capsys, words, line: str):
    assert run(["data", *(word.format(made=made) for word in words)]) == 2
    out = capsys.readouterr().err
    assert line in out and out.startswith("error: ") and out.count("\n") == 1
