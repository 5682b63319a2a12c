"""A tokenizer trained on Chinese and English text: exact, compact, repeatable, and usable at once.

Without the mirror, the project's own guide in both languages is the text.
"""

from pathlib import Path

import pytest

from internjax.data.document import Document, Source, read_documents, write_documents
from internjax.data.mixture import open_sources
from internjax.data.shards import TokenShards
from internjax.data.sources import documents_file, write_sources
from internjax.data.tokenizer import Tokenizer, load_tokenizer
from internjax.data.train_tokenizer import train_tokenizer
from internjax.errors import Corrupt, Missing, UserError

ROOT = Path(__file__).resolve().parent.parent


def guide(language: str) -> list[str]:
    pages = sorted((ROOT / "docs" / language).glob("*.md"))
    return [page.read_text(encoding="utf-8") for page in pages]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    return train_tokenizer(guide("zh") + guide("en"), folder, vocab_size=3000), folder


TEXTS = [
    "The tokenizer reads documents.",
    "参数是一棵数组的树。",
    "  two blanks,\n\ta tab\r\n and 12345 ½ 🦊 ",
    "龘 𠀀 ﷽ é",  # not in the guide: bytes
    "▁ the blank's own letter",
    "<|im_start|>user",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(trained, text: str):
    tokenizer, _ = trained
    ids = tokenizer.encode(text, specials=False)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert 0 not in ids, "no text is unknown"


def test_it_is_loaded_as_it_was_trained(trained):
    tokenizer, folder = trained
    loaded = load_tokenizer(folder)
    assert loaded.hash == tokenizer.hash and loaded.vocab_size == 3000
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.special_tokens["<|im_end|>"] in loaded.eos_ids
    user = loaded.encode("<|im_start|>", specials=False)
    assert loaded.special_tokens["<|im_start|>"] not in user, "typed markers stay text"


def test_it_serves_both_languages(trained):
    """Pages it was trained on take well under a token for two English letters, or one Chinese."""
    tokenizer, _ = trained
    for language, characters in (("en", 2.5), ("zh", 0.9)):
        text = "\n".join(guide(language))
        assert len(text) / len(tokenizer.encode(text, specials=False)) > characters


def test_the_same_texts_give_the_same_tokenizer(trained, tmp_path: Path):
    tokenizer, _ = trained
    again = train_tokenizer(guide("zh") + guide("en"), tmp_path / "t", vocab_size=3000)
    assert again.hash == tokenizer.hash
    assert train_tokenizer(guide("en"), tmp_path / "u", vocab_size=1000).hash != again.hash


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["文本" * 9], {"vocab_size": 200}, "does not hold the bytes"),
        (["a few words"], {"vocab_size": 9000}, "more than these texts give: lower it"),
        ([], {"vocab_size": 9000}, "no text to train"),
        (["\n\n"], {"vocab_size": 9000}, "no text to train"),
        (["a"], {"vocab_size": 300, "coverage": 0.0}, "coverage=0.0 must lie"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, texts, options, words: str):
    with pytest.raises(UserError, match=words):
        train_tokenizer(texts, tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_a_broken_document_is_named_not_the_trainer(tmp_path: Path):
    (tmp_path / "documents.jsonl").write_text("{}\n")
    texts = (document.content for document in read_documents(tmp_path / "documents.jsonl"))
    with pytest.raises(Corrupt, match=r"^documents\.jsonl:1:"):
        train_tokenizer(texts, tmp_path / "t", vocab_size=300)


# --- the same documents as shards -----------------------------------------------------------------


def corpus(path: Path) -> list[Document]:
    documents = [
        Document(
            id=f"{language}{i}",
            content=text,
            source=Source(f"{language}{i}.md", collection="the guide"),
            language=tag,
            meta={"split": "heldout" if i == 0 else "train"},
        )
        for language, tag in (("en", "en"), ("zh", "zh-Hans"))
        for i, text in enumerate(guide(language)[:4])
    ]
    write_documents(path, documents)
    return documents


def test_documents_become_sources_by_language(trained, tmp_path: Path):
    tokenizer, _ = trained
    documents = corpus(tmp_path / "run" / "documents.jsonl")
    file = documents_file(tmp_path / "run")
    headers = write_sources(file, tmp_path / "shards", tokenizer, by="language")
    assert {place: h["documents"] for place, h in headers.items()} == {
        "heldout": 2,
        "train/en": 3,
        "train/zh": 3,
    }
    sources = open_sources(tmp_path / "shards" / "train", tokenizer_hash=tokenizer.hash)
    for name, shards in sources.items():
        chosen = [d for d in documents if d.id[:2] == name and d.meta["split"] == "train"]
        assert [row["id"] for row in shards.documents()] == [d.id for d in chosen]
        for ids, document in zip(shards, chosen, strict=True):
            assert ids[-1] == tokenizer.eos_id
            assert tokenizer.decode(ids[:-1].tolist()) == document.content
        assert shards.num_bytes == sum(d.num_bytes for d in chosen)
    write_sources(file, tmp_path / "one", tokenizer)
    assert len(TokenShards(tmp_path / "one" / "train")) == 6
    write_sources(file, tmp_path / "two", tokenizer, by="collection")
    assert list(open_sources(tmp_path / "two" / "train")) == ["the_guide"]


def test_documents_that_cannot_be_parted(trained, tmp_path: Path):
    tokenizer, _ = trained
    with pytest.raises(Missing, match=r"documents\.jsonl is not there"):
        documents_file(tmp_path)
    corpus(tmp_path / "documents.jsonl")
    with pytest.raises(UserError, match="by='title' parts nothing"):
        write_sources(tmp_path / "documents.jsonl", tmp_path / "out", tokenizer, by="title")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="no document to train on"):
        write_sources(tmp_path / "none.jsonl", tmp_path / "out", tokenizer)
