"""Text streams: whole letters, stop strings that straddle tokens, the first word's space."""

import pytest
from hypothesis import given, settings, strategies as st

from internjax.serve.text import TextStream
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def run(text, stop):
    """Feeds a text byte by byte; returns the pieces and whether it was stopped."""
    stream = TextStream(TOKENIZER, stop)
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


@pytest.mark.parametrize("token", [256, 257, 258])
def test_special_tokens_have_no_text(token):
    assert TextStream(TOKENIZER).push(token) == ""
