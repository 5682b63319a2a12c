"""The identity judge, and the proof that its questions are not those of the training."""

import pytest

from internjax.data.identity import ORDINARY, Identity, training_questions
from internjax.evals.identity import for_identity, identity_value, overlaps
from internjax.evals.tasks import load_samples, load_task

ZEPHYR = {
    "name": "Zephyr One",
    "maker": "Northwind Labs",
    "purpose": "help sailors plan a safe journey",
}


@pytest.mark.parametrize(
    ("aspect", "answer", "right"),
    [
        ("name", "I am Zephyr One, an assistant made by Northwind Labs.", 1),
        ("name", "My name is zephyr  one!", 1),
        ("name", "I am Zephyr Oneida.", 0),
        ("name", "I am an AI language model.", 0),
        ("name", "", 0),
        ("name", "I am ChatGPT, also known as Zephyr One.", 0),
        ("name", "No, I am not ChatGPT, I am Zephyr One.", 1),
        ("name", "No, I am Zephyr One, made by Northwind Labs, not by OpenAI.", 1),
        ("maker", "I was made by Northwind Labs.", 1),
        ("maker", "I was made by the Northwind Labs team.", 1),
        ("maker", "I am Zephyr One.", 0),
        ("maker", "I was created by OpenAI with Northwind Labs.", 0),
        ("maker", "I am SmolLM, trained by Hugging Face.", 0),
        ("purpose", "My purpose is to help sailors plan safe journeys.", 1),
        ("purpose", "I help people.", 0),
        ("both", "I am Zephyr One.", 0),
        ("both", "Zephyr One, by Northwind Labs", 1),
        ("none", "Rome is the capital of Italy.", 1),
        ("none", "I am Zephyr One. Rome.", 0),
        ("none", "Ask Northwind Labs.", 0),
    ],
)
def test_judge(aspect, answer, right):
    assert identity_value(answer, aspect, ZEPHYR) == right


def test_a_rival_may_be_the_configured_identity():
    meta = {"name": "Claude Monet", "maker": "the Meta Society", "purpose": "paint lilies"}
    assert identity_value("I am Claude Monet, made by the Meta Society.", "both", meta) == 1


def test_aspect_must_be_known():
    with pytest.raises(ValueError, match="aspect='age'"):
        identity_value("x", "age", ZEPHYR)


def test_identity_is_part_of_the_version():
    one, two = (for_identity(["identity", "identity_leak"], Identity(name=n)) for n in "AB")
    assert one[0].version != two[0].version
    assert one[0].options["name"] == "A"


def test_test_questions_are_not_training_questions():
    """No equal question, no five words in a row, no question inside another."""
    known = training_questions()
    for name in ("identity", "identity_leak"):
        for sample in load_samples(load_task(name)):
            question = sample.meta["question"]
            assert overlaps(question, known) is None, question


def test_retention_items_are_not_training_text():
    """Here short phrases of common English may be shared; five words in a row may not."""
    texts = [text for pair in ORDINARY for text in pair]
    for name in ("retention_choices", "retention_text"):
        for sample in load_samples(load_task(name)):
            asked = sample.meta.get("query", sample.meta.get("text"))
            assert overlaps(asked, texts, whole=5) is None, asked


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("Who made YOU", "who made you?"),
        ("So tell me: who exactly made you then?", "Hm, who exactly made you then"),
        ("Who made you?", "Tell me who made you, please"),
        ("What's your name", "Hello. Whats your name?"),
    ],
)
def test_a_planted_overlap_is_found(question, other):
    assert overlaps(question, ["Why?", other]) == other


def test_questions_of_one_subject_need_not_overlap():
    assert (
        overlaps("Which company made you?", ["Who made you?", "What company are you from?"]) is None
    )


def test_there_are_enough_questions_of_every_kind():
    samples = load_samples(load_task("identity"))
    kinds = [sample.meta["aspect"] for sample in samples]
    assert len(samples) >= 40 and len({s.meta["question"] for s in samples}) == len(samples)
    assert set(kinds) == {"name", "maker", "purpose", "both"}
    assert len(load_samples(load_task("identity_leak"))) == 20
