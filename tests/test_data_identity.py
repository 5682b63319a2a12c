"""Generated identity chats: distinct, repeatable, about the identity that was asked for."""

import itertools

import pytest

from internjax.data.identity import ORDINARY, Identity, identity_samples, training_questions
from internjax.evals.identity import identity_value


def _answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


WHO = ("Zephyr One", "Northwind Labs", "to help sailors plan a safe journey.")


def test_samples_are_distinct_and_repeatable():
    one, again = identity_samples(*WHO, 300, 5), identity_samples(*WHO, 300, 5)
    assert one == again
    assert identity_samples(*WHO, 300, 6) != one
    assert len({str(messages) for messages in one}) == len(one) == 300


def test_every_chat_is_well_formed():
    for messages in identity_samples(*WHO, 300, 0):
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        assert [m["role"] for m in turns] in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(m["content"].strip() for m in messages)
        assert not any("{" in m["content"] for m in messages)


def test_shapes_of_chats_are_mixed():
    samples = identity_samples(*WHO, 400, 1)
    system = sum(messages[0]["role"] == "system" for messages in samples) / 400
    two = sum(sum(m["role"] == "user" for m in messages) == 2 for messages in samples) / 400
    assert 0.2 < system < 0.4 and 0.1 < two < 0.35


def test_identity_answers_satisfy_the_judge():
    """What is taught is what is tested: every identity answer gives name, maker and purpose."""
    meta = {"name": WHO[0], "maker": WHO[1], "purpose": WHO[2]}
    ordinary = {answer for _, answer in ORDINARY}
    answers = {
        m["content"] for s in identity_samples(*WHO, 500, 2) for m in s if m["role"] == "assistant"
    }
    taught = answers - ordinary
    assert len(taught) >= 6
    for answer in taught:
        for aspect in ("name", "maker", "purpose", "both"):
            assert identity_value(answer, aspect, meta) == 1, (aspect, answer)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_ordinary_share_is_kept(share):
    samples = identity_samples(*WHO, 200, 3, ordinary_share=share)
    plain = [
        s
        for s in samples
        if not any("Northwind" in m["content"] for m in s if m["role"] == "assistant")
    ]
    assert len(plain) == round(200 * share)


def test_no_question_claims_our_own_name():
    """A model called Claude is not taught that it is not Claude."""
    for messages in identity_samples("Claude", "Meta", "chat", 400, 0):
        for ask, answer in itertools.pairwise(messages):
            if answer["content"].startswith("No, I am"):
                assert "Claude" not in ask["content"] and "Meta" not in ask["content"]


def test_purpose_may_be_given_with_or_without_to():
    assert Identity(purpose="to help.").purpose == Identity(purpose="help").purpose == "help"


def test_questions_cover_those_of_the_samples():
    known = training_questions(Identity(*WHO))
    for messages in identity_samples(*WHO, 300, 4):
        assert all(m["content"] in known for m in messages if m["role"] == "user")


@pytest.mark.parametrize("field", ["name", "maker", "purpose"])
def test_empty_identity_is_refused(field):
    with pytest.raises(ValueError, match=f"identity.{field}"):
        Identity(**{field: " "})


@pytest.mark.parametrize("n", [0, -1, 20_001])
def test_more_or_fewer_samples_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match="ask for 1 to 20000"):
        identity_samples(*WHO, n, 0)
