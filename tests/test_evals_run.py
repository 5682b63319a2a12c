"""The evaluation loop over a byte-bigram model: values, cache, resume, failures, comparison."""

import json
import math

import numpy as np
import pytest

from internjax.errors import Corrupt, Missing, UserError
from internjax.evals.core import Incomplete, load_results
from internjax.evals.run import compare, evaluate
from internjax.evals.tasks import load_samples, load_task
from internjax.models.lm import LM, RequestFailed, SamplingParams
from tests.ngram_lm import CORPUS, BigramLM

WARMER = CORPUS.replace("cold", "hot!") * 3


class Faulty(BigramLM):
    """Fails any call with a prompt that holds `word`, the first `times` times."""

    def __init__(self, word: str, times: int, kind: type[BaseException] = RequestFailed):
        super().__init__()
        self.word, self.times, self.kind = word, times, kind

    def loglikelihood(self, pairs, progress=None):
        if self.times and any(self.word in context for context, _ in pairs):
            self.times -= 1
            raise self.kind(f"no answer about {self.word}")
        return super().loglikelihood(pairs, progress)


def test_the_test_model_is_an_lm():
    assert isinstance(BigramLM(), LM)


def test_scores_equal_a_direct_computation():
    """The same questions asked one by one in plain NumPy, without the evaluation code."""
    lm = BigramLM()
    results = evaluate(lm, ["retention"])
    samples = load_samples(load_task("retention_choices"))
    right, right_norm = [], []
    for sample in samples:
        query = sample.meta["query"].encode()
        sums = []
        for choice in sample.choices:
            data = query + b" " + choice.encode()
            steps = range(len(query), len(data))
            sums.append(sum(lm.logp[data[i - 1], data[i]] for i in steps))
        lengths = [len(choice) for choice in sample.choices]
        right.append(np.argmax(sums) == sample.target)
        right_norm.append(np.argmax(np.divide(sums, lengths)) == sample.target)
    acc, norm = results.score("retention_choices"), results.score("retention_choices", "acc_norm")
    assert (acc.value, norm.value) == (np.mean(right), np.mean(right_norm))
    assert acc.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert acc.baseline == pytest.approx(0.25, abs=0.01) and acc.n == len(samples)
    assert acc.low < acc.value < acc.high

    texts = [sample.input.encode() for sample in load_samples(load_task("retention_text"))]
    nats = sum(-lm.logp[a, b] for text in texts for a, b in zip(b"\0" + text, text))
    bits = nats / math.log(2) / sum(map(len, texts))
    assert results.score("retention_text").value == pytest.approx(bits, rel=1e-12)


def test_a_second_run_asks_nothing(tmp_path):
    lm = BigramLM()
    first = evaluate(lm, ["retention"], out=tmp_path)
    assert lm.calls == 143 * 4 + 64
    second = evaluate(lm, ["retention"], out=tmp_path)
    assert lm.calls == 143 * 4 + 64
    assert (second.scores, second.rows) == (first.scores, first.rows)
    assert load_results(tmp_path / "results.json").scores == first.scores


def test_another_model_name_or_prompt_is_asked_anew(tmp_path):
    evaluate(BigramLM(), ["retention_text"], out=tmp_path)
    other = BigramLM(name="other")
    evaluate(other, ["retention_text"], out=tmp_path, limit=5)
    assert other.calls == 5


@pytest.mark.parametrize("tail", [b"", b'{"key": "half a li'])
def test_an_interrupted_run_goes_on(tmp_path, tail):
    """Ctrl-C in the third chunk: two chunks are kept, even if the last line was cut short."""
    word = load_samples(load_task("retention_choices"))[0].meta["query"]
    stopped = Faulty(word, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, ["retention_choices"], out=tmp_path)
    rows = tmp_path / "rows.jsonl"
    kept = rows.read_bytes().count(b"\n") if rows.is_file() else 0
    assert stopped.calls == kept * 4
    with rows.open("ab") as file:
        file.write(tail)
    fresh = BigramLM()
    results = evaluate(fresh, ["retention_choices"], out=tmp_path)
    assert fresh.calls == (143 - kept) * 4
    assert results.scores == evaluate(BigramLM(), ["retention_choices"]).scores
    assert all(json.loads(line) for line in rows.read_text().splitlines())


def test_damage_inside_the_file_is_named(tmp_path):
    evaluate(BigramLM(), ["retention_text"], out=tmp_path, limit=3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"key"', "key", 1))
    with pytest.raises(Corrupt, match=r"rows\.jsonl line 1"):
        evaluate(BigramLM(), ["retention_text"], out=tmp_path, limit=3)


def test_a_failed_request_is_asked_again():
    lm = Faulty("Italy", times=2)  # the whole chunk, then the sample alone once
    results = evaluate(lm, ["retention_choices"])
    assert results.scores == evaluate(BigramLM(), ["retention_choices"]).scores
    assert lm.times == 0


def test_what_cannot_be_had_is_named_not_scored(tmp_path):
    lm = Faulty("Italy", times=99)
    with pytest.raises(Incomplete, match="no answer about Italy") as caught:
        evaluate(lm, ["retention_choices"], out=tmp_path)
    (failure,) = caught.value.failures
    assert failure[:2] == ("retention_choices", "choice-018")
    assert caught.value.results.score("retention_choices").n == 142
    assert not (tmp_path / "results.json").exists()
    fresh = BigramLM()
    assert evaluate(fresh, ["retention_choices"], out=tmp_path).scores[0].n == 143
    assert fresh.calls == 4


def test_generation_is_sampled_as_the_task_says():
    asked = []

    class Spy(BigramLM):
        def generate(self, prompts, params, progress=None):
            asked.append((prompts, params))
            return super().generate(prompts, params, progress)

    results = evaluate(Spy(), ["identity"], limit=5)
    assert asked[0][1] == SamplingParams(max_tokens=40)
    assert all(prompt[0]["role"] == "user" for prompt in asked[0][0])
    assert results.score("identity").value == 0 and results.score("identity").high < 0.5


def test_limits_may_differ_by_task():
    results = evaluate(BigramLM(), ["retention"], limit={"retention_text": 7})
    assert results.score("retention_text").n == 7 and results.score("retention_choices").n == 143


def test_progress_counts_samples():
    seen = []
    evaluate(BigramLM(), ["retention_text"], progress=lambda *args: seen.append(args))
    assert seen[-1] == ("retention_text", 64, 64)


def test_comparison_pairs_samples():
    before, after = (evaluate(lm, ["retention"]) for lm in (BigramLM(), BigramLM(WARMER)))
    acc, norm, bits = compare(before, after)
    old, new = before.values("retention_choices", "acc"), after.values("retention_choices", "acc")
    wins = sum(new[key] > old[key] for key in old)
    losses = sum(new[key] < old[key] for key in old)
    assert (acc.wins, acc.losses, acc.n) == (wins, losses, 143) and wins + losses > 0
    assert acc.change == pytest.approx((wins - losses) / 143)
    assert acc.low <= acc.change <= acc.high and norm.metric == "acc_norm"
    assert math.isnan(bits.p_value) and not bits.higher_is_better
    assert bits.relative == pytest.approx(bits.after / bits.before - 1)
    assert bits.low < bits.change < bits.high


def test_a_model_compared_with_itself_has_not_changed():
    results = evaluate(BigramLM(), ["retention"])
    for c in compare(results, results):
        assert (c.change, c.low, c.high, c.wins, c.losses) == (0, 0, 0, 0, 0)
    assert compare(results, results)[0].p_value == 1.0


def test_unlike_results_are_not_compared(tmp_path):
    lm = BigramLM()
    ten, other = (evaluate(lm, ["retention_choices"], limit=10, seed=seed) for seed in (0, 1))
    with pytest.raises(UserError, match="not the same"):
        compare(ten, other)
    with pytest.raises(UserError, match="no task in common"):
        compare(ten, evaluate(lm, ["retention_text"], limit=2))


def test_missing_or_foreign_results_are_refused(tmp_path):
    with pytest.raises(Missing, match="No results at"):
        load_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"model": 1}')
    with pytest.raises(Corrupt, match="no results file"):
        load_results(tmp_path / "results.json")


def test_a_score_that_is_not_there_lists_those_that_are():
    with pytest.raises(UserError, match="retention_text/bits_per_byte"):
        evaluate(BigramLM(), ["retention_text"], limit=2).score("piqa")
