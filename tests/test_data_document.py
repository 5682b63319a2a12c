"""The record of a document: jsonl there and back, and every fault by file, line and field."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from internjax.data.document import (
    Document,
    Media,
    Source,
    check_file,
    check_row,
    document_id,
    from_row,
    read_documents,
    to_row,
    to_wanjuan,
    write_documents,
)
from internjax.data.files import PARTIAL, write_whole
from internjax.errors import Corrupt, Missing

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
NAME = st.text(string.ascii_lowercase, min_size=1)
FIELDS = st.fixed_dictionaries(
    {
        "id": NAME,
        "content": TEXT,
        "title": TEXT,
        "language": st.sampled_from(["", "en", "zh-Hans", "pt-BR", "und"]),
        "date": st.sampled_from(["", "2024", "2024-05-31", "2024-05-31T10:00:00Z"]),
        "meta": st.dictionaries(NAME, st.integers() | TEXT, max_size=2),
    }
)


def good_row(**changes) -> dict:
    return {**to_row(Document("a", "text", Source("a.txt"))), **changes}


@given(FIELDS, TEXT)
def test_a_document_survives_json(fields: dict, uri: str):
    media = (Media("image", url=uri),)
    document = Document(**fields, source=Source(uri), media=media)
    row = json.loads(json.dumps(to_row(document)))
    assert check_row(row) == []
    assert from_row(row) == document
    assert to_wanjuan(document) == {"id": document.id, "content": document.content}


def test_a_file_of_documents_reads_back_and_validates(tmp_path: Path):
    documents = [Document(f"d{i}", f"Text {i}\u2028\n中文", Source(f"{i}.txt")) for i in range(3)]
    assert write_documents(tmp_path / "d.jsonl", documents) == 3
    assert list(read_documents(tmp_path / "d.jsonl")) == documents
    assert check_file(tmp_path / "d.jsonl") == []


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"id": ""}, "id", "is empty"),
        ({"id": 7}, "id", "is an integer, not a string"),
        ({"content": None}, "content", "is null, not a string"),
        ({"content": " \n"}, "content", "is empty"),
        ({"contents": "x"}, "contents", "is no field"),
        ({"language": "english"}, "language", "zh-Hans"),
        ({"date": "31.5.2024"}, "date", "ISO 8601"),
        ({"source": {"mime": "x"}}, "source.uri", "is missing"),
        ({"source": {"uri": "x", "sha256": "XYZ"}}, "source.sha256", "64 lower-case"),
        ({"media": {}}, "media", "is an object, not a list"),
        ({"media": [{"kind": "scent"}]}, "media[0].kind", "none of image"),
        ({"media": [{"kind": "image", "offset": 99}]}, "media[0].offset", "outside"),
        ({"media": [{"kind": "image", "width": True}]}, "media[0].width", "a boolean"),
        ({"meta": []}, "meta", "is a list, not an object"),
        ({"title": "\ud800"}, "title", "lone surrogate"),
    ],
)
def test_every_fault_names_its_field(change: dict, field: str, words: str):
    problems = check_row(good_row(**change))
    assert [p for p in problems if p[0] == field and words in p[1]], problems


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is not JSON"),
        (b"", "is empty"),
        (b"[1]", "is a list, not a JSON object"),
        (b'{"id": "\xff"}', "is not UTF-8 at byte 8"),
        (b'{"id": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: bytes, words: str):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(good_row()).encode() + b"\n" + line + b"\n")
    (problem,) = check_file(path)
    assert str(problem).startswith("d.jsonl:2:-: ") and words in str(problem)
    with pytest.raises(Corrupt, match=r"d\.jsonl:2:-: "):
        list(read_documents(path))


def test_a_second_use_of_an_id_is_found(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps(good_row())] * 2))
    (problem,) = check_file(path)
    assert str(problem) == "d.jsonl:2:id: 'a' was used before, in line 1"


def test_missing_and_empty_files(tmp_path: Path):
    with pytest.raises(Missing, match="is not there"):
        check_file(tmp_path / "none.jsonl")
    (tmp_path / "e.jsonl").touch()
    assert [p.message for p in check_file(tmp_path / "e.jsonl")] == ["the file holds no document"]


def test_ids_depend_on_address_and_span_only():
    assert document_id("a/b.txt") == document_id("a/b.txt")
    assert len({document_id("a"), document_id("b"), document_id("a", "0-5")}) == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), write_whole(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert not list(tmp_path.glob(f"{PARTIAL}*"))
