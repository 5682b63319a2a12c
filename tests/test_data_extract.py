"""Extraction: each kind gives its text, hostile files give a reason, the child dies alone."""

import gzip
import io
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.extract import (
    Extracted,
    ExtractError,
    Limits,
    epub as epub_lane,
    extract_file,
    media_type,
    text as text_lane,
)
from internjax.data.extract.child import Child, extract_all
from internjax.data.render import FORMATS, WRITERS, blocks, render_pages, sections

PAGE = """# The lighthouse

The lighthouse stands on the northern cliff and has been lit every night since the year 1871, when
the first keeper carried oil up the stairs.

- The lamp turns once in twenty seconds, so that captains can tell it from the other lamps.
- The horn is sounded when the fog hides the rocks from the ships that enter the bay.

```
light = lamp.turn(seconds=20)
```

| hour | state |
|------|-------|
| dusk | the lamp is lit by the keeper |
"""
ZH = "# 灯塔\n\n灯塔立在北边的悬崖上，自从一八七一年起，每天晚上都有人点灯，为船只指路。\n"


def reason(path: Path, **limits) -> str:
    with pytest.raises(ExtractError) as caught:
        extract_file(path, Limits(**limits))
    return caught.value.reason


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_rendered_is_extracted(tmp_path: Path, form: str):
    path = tmp_path / f"page.{form}"
    path.write_bytes(WRITERS[form]("The lighthouse", PAGE))
    found, _, _ = extract_file(path)
    for line in (
        "northern cliff and has been lit every night since the year 1871, when the first",
        "The lamp turns once in twenty seconds",
        "light = lamp.turn(seconds=20)",
    ):
        assert line in words(found.content), found.content
    assert "Imprint" not in found.content, "the chrome of the page was kept"
    if form != "txt":
        assert found.title == "The lighthouse"
    assert WRITERS[form]("The lighthouse", PAGE) == path.read_bytes(), "rendering must repeat"


@pytest.mark.parametrize("form", FORMATS)
def test_chinese_pages_survive_all_formats(tmp_path: Path, form: str):
    path = tmp_path / f"page.{form}"
    path.write_bytes(WRITERS[form]("灯塔", ZH))
    assert "自从一八七一年起，每天晚上都有人点灯" in extract_file(path)[0].content


def test_pages_are_cut_into_sections_outside_code():
    page = (
        "# T\n\nIntro words here.\n\n## A\n\na b c d\n\n```\n## not a heading\n```\n\n## B\n\nx\n"
    )
    assert [title for title, _ in sections(page, least_words=3)] == ["T", "T: A"]
    assert "## not a heading" in sections(page, least_words=3)[1][1]
    assert ("row", "dusk | the lamp is lit by the keeper") in blocks(PAGE)


def test_render_pages_takes_formats_in_turn(tmp_path: Path):
    (tmp_path / "in").mkdir()
    body = "".join(f"\n## Part {i}\n\n" + "word " * 50 for i in range(7))
    (tmp_path / "in" / "p.md").write_text("# P\n" + body)
    paths = render_pages(tmp_path / "in", tmp_path / "out")
    assert [p.suffix[1:] for p in paths[:5]] == [*FORMATS, "html"]


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("The café’s naïve façade cost £5 — “déjà vu”.", "windows-1252"),
        ("灯塔立在北边的悬崖上，每天晚上都有人点灯，为船只指路。", "gb18030"),
        ("text with a mark", "utf-16"),
        ("text with a mark", "utf-8-sig"),
    ],
)
def test_other_encodings_are_read(tmp_path: Path, text: str, encoding: str):
    (tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert extract_file(tmp_path / "t.txt")[0].content.strip() == text


@given(st.text())
def test_utf8_text_is_never_taken_for_something_else(text: str):
    data = text.encode("utf-8", "ignore")
    if not text_lane.CONTROL.search(text) and not data.startswith(
        tuple(m for m, _ in text_lane.BOMS)
    ):
        assert text_lane.decode(data) == (data.decode(), "utf-8")


@given(st.text())
def test_tidy_is_idempotent(text: str):
    once = text_lane.tidy(text)
    assert text_lane.tidy(once) == once


def test_bytes_are_not_text(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(bytes(range(256)) * 8)
    assert reason(tmp_path / "t.txt") == "binary"
    (tmp_path / "u.txt").write_bytes(b"\xff\xfea")
    assert reason(tmp_path / "u.txt") == "encoding"


def test_front_matter_goes_and_the_heading_is_the_title():
    found = text_lane.extract(b"---\na: b\n---\n# Name #\n\ntext\n", Limits())
    assert (found.title, found.content) == ("Name", "# Name #\n\ntext\n")


def test_contents_tell_more_than_names(tmp_path: Path):
    (tmp_path / "really.txt").write_bytes(WRITERS["pdf"]("The lighthouse", PAGE))
    assert extract_file(tmp_path / "really.txt")[1] == "application/pdf"
    assert media_type(Path("a/b.HTML.gz")) == "text/html" and media_type(Path("x.exe")) is None


def test_html_encodings_and_statements(tmp_path: Path):
    page = (
        '<html lang="de"><head><meta charset="iso-8859-1"><title> Über  uns </title>'
        '<meta name="date" content="2020-02-03T10:00"></head><body><article><p>'
        + "Die Straße führt über den Fluß zum alten Schloß. " * 6
        + "</p></article></body></html>"
    )
    (tmp_path / "p.html").write_bytes(page.encode("latin-1"))
    found = extract_file(tmp_path / "p.html")[0]
    assert "Straße führt über" in found.content
    assert (found.title, found.date, found.language) == ("Über uns", "2020-02-03", "de")


# --- hostile files --------------------------------------------------------------------------------


def epub(members: dict[str, bytes | str], **changes) -> bytes:
    """An EPUB with some members replaced (None: removed)."""
    with zipfile.ZipFile(io.BytesIO(WRITERS["epub"]("T", PAGE))) as archive:
        whole: dict = {name: archive.read(name) for name in archive.namelist()}
    whole |= members
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in whole.items():
            if content is not None:
                archive.writestr(name, content)
    return out.getvalue()


OPF = "OEBPS/book.opf"
ENTITY = (
    '<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">]><package><manifest>'
    '<item id="c" href="&x;" media-type="text/html"/></manifest></package>'
)
OUTSIDE = (
    '<package><manifest><item id="c" href="../../../etc/passwd" media-type="text/html"/>'
    '</manifest><spine><itemref idref="c"/></spine></package>'
)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({OPF: ENTITY}, "unsafe"),
        ({OPF: OUTSIDE}, "unsafe"),
        ({"../evil.txt": "x"}, "unsafe"),
        ({"/etc/evil": "x"}, "unsafe"),
        ({"C:/evil": "x"}, "unsafe"),
        ({"OEBPS/zeros.xhtml": bytes(2**24)}, "bomb"),
        ({OPF: "<package>"}, "corrupt"),
        ({OPF: None}, "corrupt"),
        ({OPF: "<package/>"}, "corrupt"),
        ({"META-INF/container.xml": "<container/>"}, "corrupt"),
        ({"OEBPS/text/chapter.xhtml": None}, "corrupt"),
    ],
)
def test_hostile_epubs_are_refused(tmp_path: Path, members: dict, expected: str):
    (tmp_path / "b.epub").write_bytes(epub(members))
    assert reason(tmp_path / "b.epub") == expected


def test_the_archive_that_the_others_are_made_of_is_read(tmp_path: Path):
    (tmp_path / "b.epub").write_bytes(epub({}))
    assert "northern cliff" in extract_file(tmp_path / "b.epub")[0].content


def test_entities_in_chapters_are_not_resolved(tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret of the house")
    entity = f'<!DOCTYPE p [<!ENTITY x SYSTEM "{secret.as_uri()}">]>'
    chapter = f"{entity}<html><body><p>a &x; b</p></body></html>"
    assert "secret of the house" not in epub_lane.markdown(chapter.encode())


def test_a_member_larger_than_promised_is_a_bomb_or_corrupt(tmp_path: Path):
    data = epub({"OEBPS/text/chapter.xhtml": b"<p>" + b"x" * 5000})
    # 5003 bytes, little endian, in the central directory and in the local header
    (tmp_path / "b.epub").write_bytes(data.replace((5003).to_bytes(4, "little"), b"\x64\0\0\0"))
    assert reason(tmp_path / "b.epub") in ("bomb", "corrupt")


def test_a_member_whose_own_header_names_it_in_no_encoding_is_corrupt(tmp_path: Path):
    data = bytearray(epub({"OEBPS/text/chapter.xhtml": b"<p>text</p>"}))
    name = data.index(b"META-INF/container.xml")  # the first is the member's own header
    data[name - 30 + 7] |= 0x08  # "the name is UTF-8"
    data[name + 8] = 0x8E
    (tmp_path / "n.epub").write_bytes(data)
    assert reason(tmp_path / "n.epub") == "corrupt"


@pytest.mark.parametrize("form", ["pdf", "epub"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_cut_and_garbled_files_give_reasons(tmp_path_factory, form: str, data: st.DataObject):
    whole = bytearray(WRITERS[form]("T", PAGE))
    for _ in range(data.draw(st.integers(1, 20))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("g") / f"g.{form}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert isinstance(extract_file(path)[0], Extracted)
    except ExtractError as error:
        assert error.reason in (
            "corrupt",
            "empty",
            "unsafe",
            "bomb",
            "encrypted",
            "binary",
            "encoding",
        )


def test_gzip_is_looked_through_within_limits(tmp_path: Path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"some text " * 1000))
    assert extract_file(path)[0].content.startswith("some text")
    assert reason(path, file_bytes=500) == "bomb"
    assert reason(path, characters=500) == "large"
    path.write_bytes(path.read_bytes()[:-20])
    assert reason(path) == "corrupt"


def test_empty_pages_and_pictures_have_no_text(tmp_path: Path):
    (tmp_path / "p.html").write_text("<html><body></body></html>")
    assert reason(tmp_path / "p.html") == "empty"
    (tmp_path / "p.pdf").write_bytes(WRITERS["pdf"]("T", "\n"))
    assert reason(tmp_path / "p.pdf") in ("empty", "corrupt")


# --- the child ------------------------------------------------------------------------------------


def test_outcomes_come_in_order_and_poison_costs_one_document(tmp_path: Path):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(f"text number {i}")
    os.mkfifo(tmp_path / "3.fifo.txt")  # never ends: nobody writes
    paths.insert(3, tmp_path / "3.fifo.txt")
    paths.insert(5, tmp_path / "gone.txt")
    outcomes = list(extract_all(paths, limits=Limits(seconds=2), workers=2))
    assert [o.path for o in outcomes] == paths
    assert [o.reason for o in outcomes] == ["", "", "", "timeout", "", "unreadable", "", ""]
    assert outcomes[4].extracted.content == "text number 3\n"


def test_memory_and_death_are_reasons_and_the_next_document_is_read(tmp_path: Path):
    big, small = tmp_path / "big.txt", tmp_path / "small.txt"
    big.write_bytes(b"x" * 2**27)
    small.write_text("small")
    child = Child(Limits(seconds=30, memory_bytes=2**29, file_bytes=2**30, characters=2**30))
    try:
        assert child.extract(big).reason == "memory"
        assert child.extract(small).extracted.content == "small\n"
        child.process.kill()
        child.process.wait()  # so that what is written next finds nobody
        assert (child.extract(small).reason, child.process) == ("crash", None)
        assert child.extract(small).extracted.content == "small\n"
    finally:
        child.stop()


@pytest.mark.needs_mirror
def test_real_files_give_their_text(mirror: Path):
    names = {
        "raw-pdf/multicolumn.pdf": "Sed ut",
        "raw-debian-docs/policy.epub": "Debian Policy Manual",
        "raw-debian-docs/policy.pdf.gz": "Policy",
        "raw-debian-docs/faq-zh-cn/pkgtools.html": "软件包管理",
        "raw-books-en/11-h.htm.gz": "Alice",
        "raw-pdf/libreoffice-writer-password.pdf": None,
        "raw-pdf/grayscale-image.pdf": None,
    }
    outcomes = list(extract_all([mirror / name for name in names]))
    found = {n: o.extracted and o.extracted.content for n, o in zip(names, outcomes, strict=True)}
    assert [o.reason for o in outcomes if o.reason] == ["encrypted", "empty"]
    assert all(
        found[n] is None if w is None else w in found[n]
        for n, w in names.items()
        if n != "raw-pdf/multicolumn.pdf"
    )
    book, page = found["raw-debian-docs/policy.epub"], found["raw-debian-docs/policy.pdf.gz"]
    assert 0.8 < len(page) / len(book) < 1.25
