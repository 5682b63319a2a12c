"""Text streams: whole letters, stop strings that straddle tokens, the first word's space."""

import pytest
from hypothesis import given, settings, strategies as st

from internjax.serve.text import TextStream
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def run(text, stop, **options):
    """Feeds a text byte by byte; returns the pieces and whether it was stopped."""
    stream = TextStream(TOKENIZER, stop, **options)
    pieces = []
    for token in TOKENIZER.encode(text, specials=False):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.flush()], False


def test_stop_string_over_many_tokens_is_not_emitted():
    pieces, stopped = run("one END two", ("END", "ENORMOUS"))
    assert stopped
    assert "".join(pieces) == "one "


def test_false_alarm_is_given_out_in_order():
    pieces, stopped = run("EN. ENDE", ("ENDED",))
    assert not stopped
    assert "".join(pieces) == "EN. ENDE"


def test_letters_come_whole():
    pieces, _ = run("书é", ())
    assert [p for p in pieces if p] == ["书", "é"]


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stream_equals_cutting_the_whole_text(text, stop):
    pieces, stopped = run(text, tuple(stop))
    # A stream stops at the first moment a stop string is complete; the text then ends at the
    # leftmost one that is complete by that moment.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    seen = text[: min(ends)] if ends else text
    places = [seen.find(s) for s in stop if s in seen]
    assert stopped == bool(ends)
    assert "".join(pieces) == (seen[: min(places)] if places else text)


def cut(data, stop, min_tokens):
    """The definition over bytes: the first stop completed by token number min_tokens or later."""
    for end in range(max(1, min_tokens), len(data) + 1):
        starts = [end - len(s) for s in stop if data[:end].endswith(s)]
        if starts:
            return data[: min(starts)], True
    return data, False


@settings(deadline=None, max_examples=300)
@given(
    st.text("aé书", max_size=14),
    st.lists(st.text("aé书", min_size=1, max_size=3), max_size=3),
    st.integers(0, 20),
)
def test_stops_count_from_min_tokens_on_and_nothing_is_taken_back(text, stop, least):
    pieces, stopped = run(text, tuple(stop), min_tokens=least)
    whole, expected = cut(text.encode(), [s.encode() for s in stop], least)
    assert stopped == expected
    assert "".join(pieces) == whole.decode()


def test_special_tokens_are_shown_when_asked():
    stream = TextStream(TOKENIZER, ("<|im_st",), skip_specials=False)
    assert stream.push(97) + stream.push(258) + stream.flush() == "a<|im_end|>"


@pytest.mark.parametrize("token", [256, 257, 258])
def test_special_tokens_have_no_text(token):
    assert TextStream(TOKENIZER).push(token) == ""
