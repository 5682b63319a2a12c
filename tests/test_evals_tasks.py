"""Task files become the prompts they promise; real data files have the shape the tasks expect."""

import os

import pytest

from internjax.errors import Corrupt, Missing, UserError
from internjax.evals.tasks import load_samples, load_task, make_sample, resolve_tasks, task_names

PACKAGED = ("identity", "identity_leak", "retention_choices", "retention_text")

CHOICE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {dimension: knowledge, source: package}
"""
DOC = {"question": "2+2?", "choices": ["four", "five"], "answer": 0}


def _task(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_task(path)


@pytest.mark.parametrize("name", PACKAGED)
def test_shipped_rows_become_samples(name):
    samples = load_samples(load_task(name))
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({str(sample.input) for sample in samples}) == len(samples)


def test_retention_is_large_and_balanced():
    """>= 100 pairs for McNemar; the right choice stands everywhere, so position tells nothing."""
    samples = load_samples(load_task("retention_choices"))
    assert len(samples) >= 120
    assert all(2 <= len(s.choices) <= 4 and len(set(s.choices)) == len(s.choices) for s in samples)
    share = [sum(s.target == k for s in samples) / len(samples) for k in range(4)]
    assert all(0.15 < x < 0.35 for x in share)
    longest = sum(max(s.choices, key=len) == s.choices[s.target] for s in samples) / len(samples)
    assert longest < 0.5
    texts = load_samples(load_task("retention_text"))
    assert len(texts) >= 60 and all(len(str(t.input).split()) >= 30 for t in texts)


def test_choices_follow_the_context_after_one_space(tmp_path):
    sample = make_sample(_task(tmp_path, CHOICE), DOC, "0")
    assert sample.pairs == (("Q: 2+2?\nA:", " four"), ("Q: 2+2?\nA:", " five"))
    assert sample.target == 0


def test_few_shot_examples_are_joined_as_by_the_harness(tmp_path):
    shot = '{question: "1+1?", choices: [two, one], answer: 0}'
    more = f"num_fewshot: 1\nfewshot_config: {{samples: [{shot}]}}\ndescription: 'Sums. '\n"
    sample = make_sample(_task(tmp_path, CHOICE + more), DOC, "0")
    assert sample.pairs[0] == ("Sums. Q: 1+1?\nA: two\n\nQ: 2+2?\nA:", " four")


def test_contexts_may_compete_for_one_continuation():
    contexts = ["Ann left so Ann", "Ann left so Bob"]
    doc = {"context_options": contexts, "continuation": "stayed.", "gold": 1}
    sample = make_sample(load_task("winogrande"), doc, "0")
    assert sample.pairs == (("Ann left so Ann", " stayed."), ("Ann left so Bob", " stayed."))
    assert sample.target == 1


def test_prompt_changes_change_the_version(tmp_path):
    one = _task(tmp_path, CHOICE).version
    assert one == _task(tmp_path, CHOICE).version and len(one) == 6
    assert one != _task(tmp_path, CHOICE.replace("Q: ", "Question: ")).version
    assert one != _task(tmp_path, CHOICE + "num_fewshot: 0\n").version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{{question}}", "{{qestion}}"), "qestion"),
        (("answer\n", "7\n"), "target 7"),
        (("multiple_choice", "guess"), "'guess' is not one of multiple_choice"),
        (("doc_to_text", "doc_to_txt"), "unknown keys \\['doc_to_txt'\\]"),
        (("task: mine", "tag: mine"), "missing keys \\['task'\\]"),
        (("{{question}}", "{{ ''.__class__.__mro__ }}"), "does not fit"),
    ],
)
def test_a_broken_task_is_refused(tmp_path, change, said):
    """Also a template that reaches for Python's insides: the sandbox stops it."""
    with pytest.raises(Corrupt, match=said):
        make_sample(_task(tmp_path, CHOICE.replace(*change)), DOC, "0")


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(Missing, match="retention_choices"):
        load_task("retention_choice")


def test_tags_select_groups():
    assert [t.name for t in resolve_tasks(["retention"])] == ["retention_choices", "retention_text"]
    names = [t.name for t in resolve_tasks(["piqa", "commonsense", "piqa"])]
    assert names[0] == "piqa" and len(set(names)) == len(names) >= 6


def test_a_smaller_limit_draws_a_part_of_a_larger_one():
    task = load_task("retention_choices")
    ids = lambda limit, seed=0: [s.id for s in load_samples(task, limit, seed)]  # noqa: E731
    assert ids(10) == ids(40)[:10]
    assert ids(10, seed=1) != ids(10)
    assert ids(10_000) == ids(None) and ids(None)[0] == "choice-001"
    with pytest.raises(UserError, match="limit=0"):
        load_samples(task, 0)


def test_every_task_file_loads():
    for name in task_names():
        task = load_task(name)
        assert task.name == name and task.metrics and task.dimension


# ------------------------------------------------------------------------------ real data files

REAL = {
    "boolq": (3270, 0, " no"),
    "commonsense_qa": (1221, 0, " A"),
    "copa": (100, 1, " water flowed from the spout."),
    "hellaswag": (1000, 3, None),
    "openbookqa": (500, 1, " quit eating lunch out"),
    "piqa": (1838, 0, None),
    "siqa": (1954, 1, " B"),
    "winogrande": (1267, 1, " always got the easier cases."),
}


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", REAL)
def test_real_choice_sets(name, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path))
    rows, gold, continuation = REAL[name]
    samples = load_samples(load_task(name))
    assert len(samples) == rows and samples[0].target == gold
    if continuation:
        assert samples[0].pairs[samples[0].target][1] == continuation
    for sample in samples:
        for context, choice in sample.pairs:
            assert context and context == context.rstrip(" ") and choice.strip(), sample.id
            assert "[title]" not in context + choice and "{{" not in context


@pytest.mark.needs_mirror
@pytest.mark.parametrize(
    ("name", "rows", "target"), [("gsm8k", 1319, "18"), ("svamp", 1000, "51.0")]
)
def test_real_maths_sets(name, rows, target, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path))
    samples = load_samples(load_task(name))
    assert len(samples) == rows and samples[0].target == target
    for sample in samples:
        assert float(sample.target.replace(",", "")) is not None
        assert sample.input[0]["role"] == "user" and len(sample.input[0]["content"]) > 40


@pytest.mark.needs_mirror
def test_a_damaged_file_is_named_with_its_line(mirror, tmp_path, monkeypatch):
    """The catalogue checks sums on the way in; this is damage done to the cache afterwards."""
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path))
    load_samples(load_task("copa"))
    (path,) = tmp_path.rglob("copa.jsonl")
    size = path.stat().st_size
    os.chmod(path, 0o644)
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = "{" + "x" * (len(lines[1]) - 2) + "\n"
    path.write_text("".join(lines))
    assert path.stat().st_size == size
    with pytest.raises(Corrupt, match=r"copa\.jsonl line 2"):
        load_samples(load_task("copa"))
