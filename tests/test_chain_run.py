"""The chain's logic on a tiny random model: rounds, gates, the report, and what is reused.

A random model cannot learn who it is in two updates, so the gate must stop it. The chain that
passes runs on the real model: `make quickstart`.
"""

import dataclasses
import json
import math

import pytest

from internjax.chain.gate import Check, GateConfig, gate, passed, reasons
from internjax.chain.present import terminal_rows, write_report
from internjax.chain.pretraining import PretrainConfig
from internjax.chain.run import Attempt, ChainConfig, _at_hand, find_pages, run_chain
from internjax.chain.stages import ScoreConfig
from internjax.chain.tuning import TuneConfig
from internjax.cli import run
from internjax.errors import GateFailed, Missing, UserError
from internjax.evals.core import Results, Row, Score
from internjax.models.native import save_native
from internjax.serve.engine import EngineConfig
from internjax.train.loop import RunConfig
from internjax.train.optim import OptimConfig
from tests.fakes import byte_tokenizer, tiny_model

PAGE = """# Rivers

A river carries water from the hills to the sea. It starts as a small spring, grows with every
stream that joins it, and slows down where the land is flat and wide before it meets the coast.

## Floods

After days of heavy rain the water rises over its banks and covers the meadows beside the river.
People who live there build their houses on higher ground and watch the gauge at the old bridge.

## Bridges

Stone bridges have stood for many hundreds of years. Each arch hands its load on to the pier beside
it, and the piers stand on wooden piles that were driven deep into the ground of the river.
"""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tiny_chain(tmp_path) -> ChainConfig:
    cfg, params = tiny_model(max_context=1024)
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=CHATML)
    save_native(tmp_path / "model", cfg, params, tokenizer)
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(6):
        text = PAGE.replace("river", f"river number {number}").replace(
            "# Rivers", f"# Page {number}"
        )
        (pages / f"page{number}.md").write_text(text, encoding="utf-8")
    small = RunConfig(steps=2, save_every=0, progress=False)
    return ChainConfig(
        model=str(tmp_path / "model"),
        pages=str(pages),
        samples=8,
        runs=str(tmp_path / "runs"),
        pretrain=PretrainConfig(
            batch_size=2,
            length=64,
            run=RunConfig(steps=8, progress=False),
            optim=OptimConfig(lr=3e-3),
        ),
        tuning=TuneConfig(batch_size=2, length=1024, run=small),
        scores=ScoreConfig(
            extra=(),
            limit={"identity": 4, "identity_leak": 2}
            | dict.fromkeys(("retention_text", "retention_choices"), 6),
        ),
        engine=EngineConfig(slots=4, context=512),
    )


def test_a_model_that_fails_the_gate_does_not_go_online(tiny_chain, tmp_path):
    record = run_chain(tiny_chain)
    names = [stage.name for stage in record.stages]
    assert not record.ok
    assert "identity: 0.0% of 4 questions, at least 90% asked" in record.error
    assert "after 2 rounds" in record.error
    assert "tune" in names and "tune (round 2)" in names
    assert not {"quantize", "serve", "agent"} & set(names)
    first, second = (
        stage.artefact.metrics["steps"]
        for stage in record.stages
        if stage.name.startswith("tune") and "scores" not in stage.name
    )
    assert (first, second) == (2, 4)
    page = write_report(record, tmp_path / "report")
    told = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert told["ok"] is False and told["stages"][0]["name"].startswith("import")
    assert "Training loss" in page.read_text(encoding="utf-8")
    assert any(row["ok"] is False for row in terminal_rows(record))

    assert not list((tmp_path / "runs" / "work").iterdir()), "scratch space outlives the training"
    again = run_chain(tiny_chain)
    assert all(stage.reused for stage in again.stages if stage.artefact)
    assert again.error == record.error


def test_the_verb_exits_with_1_when_a_gate_fails(tiny_chain, capsys):
    cfg = tiny_chain
    code = run(
        [
            "chain",
            f"chain.model={cfg.model}",
            f"chain.pages={cfg.pages}",
            f"chain.runs={cfg.runs}",
            "chain.pretrain.optim.lr=0",
            "chain.pretrain.run.steps=1",
            "chain.scores.extra=[]",
            "chain.scores.limit.retention_choices=2",
            "chain.engine={slots: 4, context: 512}",
        ]
    )
    out = capsys.readouterr()
    assert code == 1, out.err
    assert "pretraining did not help" in out.err
    assert "Traceback" not in out.err


def test_a_round_changes_what_the_last_one_failed_for():
    known, forgot = Check("identity", True, ""), Check("retention text", False, "")
    unknown = Check("identity", False, "")
    first = Attempt(strength=0.5)
    assert first.after([unknown, forgot]) == Attempt(rounds=2, strength=0.5)
    assert first.after([known, forgot]) == Attempt(rounds=1, strength=0.375)
    cfg = TuneConfig(run=RunConfig(steps=7))
    assert [Attempt(rounds=n).tuning(cfg).run.steps for n in (1, 2, 3)] == [7, 14, 21]


def test_a_share_of_an_adapter_beyond_it_is_refused():
    with pytest.raises(UserError, match=r"strength=1\.5"):
        ChainConfig(strength=1.5)


def test_without_a_mirror_no_extra_task_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("INTERNJAX_MIRROR", raising=False)
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path))
    assert not _at_hand("piqa")
    assert not any(tmp_path.iterdir()), "something was fetched"


def test_missing_pages_are_named(tmp_path):
    with pytest.raises(Missing, match="no such folder"):
        find_pages(str(tmp_path / "nowhere"))


def results(identity: float, bits: float, right: list[int]) -> Results:
    """Made-up results: 10 identity questions, one text of 100 bytes, paired choices."""
    asked = [int(i < 10 * identity) for i in range(10)]
    rows = [Row("identity", "v", str(i), {}, {"identity": float(x)}) for i, x in enumerate(asked)]
    rows += [
        Row("retention_choices", "v", str(i), {}, {"acc": float(x)}) for i, x in enumerate(right)
    ]
    rows += [
        Row(
            "retention_text",
            "v",
            str(i),
            {},
            {"bits_per_byte": bits, "nats": bits * 100 * math.log(2), "bytes": 100},
        )
        for i in range(3)
    ]

    def score(task: str, metric: str, value: float, n: int, up: bool = True) -> Score:
        return Score(task, metric, value, 0.0, value, value, 0.0, n, "v", "d", up)

    scores = (
        score("identity", "identity", identity, 10),
        score("retention_text", "bits_per_byte", bits, 3, up=False),
        score("retention_choices", "acc", sum(right) / len(right), len(right)),
    )
    return Results("made up", scores, tuple(rows))


BEFORE = [1] * 90 + [0] * 10


@pytest.mark.parametrize(
    ("after", "failing"),
    [
        (results(1.0, 1.0, BEFORE), []),
        (results(0.8, 1.0, BEFORE), ["identity"]),
        (results(1.0, 1.019, BEFORE), []),
        (results(1.0, 1.021, BEFORE), ["retention text"]),
        # 3 points lost by 3 losses: large enough, but McNemar p = 0.25
        (results(1.0, 1.0, [0] * 3 + [1] * 87 + [0] * 10), []),
        # 6 points lost by 6 losses: p = 2 / 2**6 = 0.03
        (results(1.0, 1.0, [0] * 6 + [1] * 84 + [0] * 10), ["retention choices"]),
    ],
)
def test_the_gate_fails_exactly_what_it_says(after: Results, failing: list[str]):
    checks = gate(results(0.0, 1.0, BEFORE), after, GateConfig())
    assert [check.name for check in checks if not check.ok] == failing
    assert passed(checks) is (not failing)
    assert all(name in reasons(checks) for name in failing)


def test_reasons_name_only_what_failed():
    checks = [Check("a", True, "fine"), Check("b", False, "2 > 1")]
    assert reasons(checks) == "b: 2 > 1"
    assert issubclass(GateFailed, ValueError)
