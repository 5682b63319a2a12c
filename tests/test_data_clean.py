"""Rule filters: each measure by hand, each preset on texts it must keep and drop."""

import math
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from internjax.data.clean import (
    MEASURES,
    PRESETS,
    SPLITTERS,
    Preset,
    Text,
    first_failure,
    fix_lines,
    measures,
    preset_for,
)
from internjax.data.language import han_script, identify
from internjax.errors import UserError

STORY = (
    "The keeper climbed the stairs of the tower before the night began, and he carried the oil in "
    "a can that his father had made. When the lamp was lit he wrote the hour into the book that "
    "lay on the table. Ships came into the bay with the tide, and the pilots said that they could "
    "see the light from the far side of the sandbank. In the morning he put the lamp out, cleaned "
    "the glass with a soft cloth, and went down to the house to sleep until the noon bell.\n\n"
    "Nobody remembers who built the first wall around the garden. It is older than the tower, and "
    "its stones have been taken from the beach. Two of them have letters cut into them."
)
STORY_ZH = (
    "守灯人在天黑之前爬上塔楼的楼梯，手里提着父亲做的油罐。灯点亮以后，他就把时间写进桌上的本子里。"
    "船只随着潮水进入海湾，领航员说他们在沙洲的另一边也能看见灯光。早晨他熄灭了灯，用软布擦干净玻璃，"
    "然后下楼回家睡觉，一直睡到中午的钟声响起。没有人记得是谁在花园周围筑起了第一道墙。它比塔楼还要古老，"
    "石头都是从海滩上搬来的。其中有两块石头上刻着字，但是谁也不认识那是什么文字。"
)


CONSENT = (
    "We use cookies. See the privacy policy that the owner of this and of all our sites has. " * 2
)


def measure(name: str, text: str, n: int = 0, splitter: str = "words") -> float:
    return MEASURES[name](Text(text, Preset(splitter, ())), n)


@pytest.mark.parametrize(
    ("name", "text", "n", "expected"),
    [
        ("words", "It's a well-known fact, 42!", 0, 5),
        ("mean_word_length", "aa bbbb", 0, 3.0),
        ("hash_per_word", "# a # b", 0, 1.0),
        ("ellipsis_per_word", "a... b…", 0, 1.0),
        ("bullet_lines", "- a\n\n* b\nc\nd", 0, 0.5),
        ("ellipsis_lines", "a...\nb", 0, 0.5),
        ("alphabetic_words", "a 1 2 b3", 0, 0.5),
        ("stop_words", "The cat and the dog", 0, 2),
        ("duplicate_lines", "a\nb\na\na", 0, 0.5),
        ("duplicate_line_characters", "abc\nabc\nxy", 0, 0.3),
        ("duplicate_paragraphs", "a\n\na\n\nb\n\nc", 0, 0.25),
        ("top_ngram", "a b a b c d", 2, 4 / 6),
        ("top_ngram", "a b c d", 2, 0.0),
        ("duplicate_ngram", "a b c a b c", 3, 0.5),
        # the copy of "a a" may not count its overlap twice
        ("duplicate_ngram", "a a a a", 2, 0.5),
        ("punctuated_lines", "One.\nTwo\n三。", 0, 2 / 3),
        ("sentences", "One. Two! v1.2 三。四", 0, 3),
        ("short_lines", "short\n" + "x" * 31, 0, 0.5),
        ("newlines_per_word", "a\nb\nc d", 0, 0.5),
    ],
)
def test_measures_by_hand(name: str, text: str, n: int, expected: float):
    assert measure(name, text, n) == pytest.approx(expected)


@given(st.text())
def test_every_measure_is_finite_on_every_text(text: str):
    for preset in ("web-en", "docs-en", "c4-s5w3"):
        assert all(map(math.isfinite, measures(text, PRESETS[preset]).values()))


@pytest.mark.parametrize("preset", [p for p in PRESETS if not p.endswith("zh")])
def test_honest_english_passes_every_preset(preset: str):
    assert first_failure(STORY, PRESETS[preset]) is None


@pytest.mark.parametrize("preset", ["web-zh", "docs-zh"])
def test_honest_chinese_passes(preset: str):
    assert first_failure(STORY_ZH, PRESETS[preset]) is None


@pytest.mark.parametrize(
    ("preset", "text", "rule"),
    [
        ("gopher", "Too short.", "words"),
        ("gopher", "buy now " * 50, "top_ngram_2"),
        ("gopher", "x " + STORY.replace("the", "").replace("that", ""), None),
        ("gopher", " ".join(f"{i}" for i in range(100)), "mean_word_length"),
        ("gopher", " ".join(f"{w}..." for w in STORY.split()), "ellipsis_per_word"),
        ("fineweb", "\n".join(f"menu item {i}" for i in range(60)), "punctuated_lines"),
        ("c4-s5w3", STORY + " { }", "curly_brackets"),
        ("c4-s3w5", "Lorem ipsum. Dolor sit. Amet it.", "lorem_ipsum"),
        ("c4-s5w3", "One. Two. Three. Four.", "sentences"),
        ("docs-en", CONSENT, "policy_phrases_per_100_words"),
        ("docs-en", "Lorem ipsum dolor sit amet " * 5, "stop_words"),
        ("web-zh", "点击 " * 80, "stop_words"),
    ],
)
def test_the_first_failing_rule_is_named(preset: str, text: str, rule: str | None):
    failure = first_failure(text, PRESETS[preset])
    if rule is None:
        assert failure is None
    else:
        assert failure.rule == rule
        assert not failure.low <= failure.value <= failure.high
        assert failure.rule in str(failure)


def test_c4_drops_lines_and_the_two_readings_differ():
    text = (
        "Four words are here.\nno mark at the end\nEnable JavaScript to see it all.\n"
        "Only three words.\n[edit] A line with a note of five[12] words."
    )
    kept = fix_lines(text, PRESETS["c4-s5w3"])
    assert kept == "Four words are here.\nOnly three words.\n A line with a note of five words."
    assert fix_lines(text, PRESETS["c4-s3w5"]) == " A line with a note of five words."
    assert fix_lines(text, PRESETS["gopher"]) == text


def test_presets_by_name():
    assert preset_for("docs", "zh-Hans") is PRESETS["docs-zh"]
    assert preset_for("web", "en") is PRESETS["web-en"]
    with pytest.raises(UserError, match="did you mean gopher"):
        preset_for("gofer", "en")
    assert all(p.splitter in SPLITTERS for p in PRESETS.values())


def test_languages_and_scripts():
    assert identify(STORY)[0] == "en" and identify(STORY)[1] > 0.9
    assert identify(STORY_ZH)[0] == "zh-Hans"
    assert identify("守燈人在天黑之前爬上塔樓的樓梯，說這裡們都來了。")[0] == "zh-Hant"
    assert identify("12 34 !") == ("und", 0.0)
    assert han_script("國國国") == "Hant"


@pytest.mark.needs_mirror
def test_real_web_pages_mostly_pass(mirror: Path):
    import gzip
    import json

    with gzip.open(mirror / "raw-web/c4_demo.jsonl.gz", "rt", encoding="utf-8") as rows:
        texts = [json.loads(row)["text"] for row in rows]
    passed = sum(first_failure(text, PRESETS["gopher"]) is None for text in texts)
    # C4 was cleaned before: most of it passes Gopher's rules, and not all of it.
    assert 0.6 < passed / len(texts) < 0.99
