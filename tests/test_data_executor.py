"""The whole stage on rendered pages with planted faults: found, counted, repeatable, whole."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from internjax.data.dedup import jaccard, shingles
from internjax.data.document import Document, Source, check_file, read_documents
from internjax.data.executor import DataConfig, DataReport, find_files, run, split
from internjax.data.plant import KINDS, plant_faults, read_ledger, score_plants
from internjax.data.render import render_pages
from internjax.data.shards import TokenShards
from internjax.errors import Missing, UserError
from tests.fakes import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[DataConfig, Path, DataReport]:
    """The project's own English pages, rendered, planted with faults, and run."""
    folder = tmp_path_factory.mktemp("data")
    render_pages(ROOT / "docs" / "en", folder / "rendered")
    plant_faults(folder / "rendered", folder / "planted", folder / "ledger.json", seed=3)
    cfg = DataConfig(input=str(folder / "planted"), ledger=str(folder / "ledger.json"))
    return cfg, folder, run(cfg, folder / "out", tokenizer=byte_tokenizer(), progress=False)


def test_every_planted_fault_is_found_and_nothing_else_is_lost(made):
    _, _, report = made
    for kind in KINDS:
        assert report.plants[kind]["missed"] == [], kind
        assert report.plants[kind]["found"] == report.plants[kind]["planted"] >= 1
    assert report.plants["clean"]["lost"] == []
    assert report.plants["clean"]["documents"] > 40


def test_the_funnel_adds_up(made):
    _, folder, report = made
    for row, after in zip(report.funnel, report.funnel[1:]):
        assert row["out"] == after["in"], f"{row['stage']} -> {after['stage']}"
    for row in report.funnel:
        lost = row["in"]["documents"] - row["out"]["documents"]
        assert sum(row["dropped"].values()) == lost, row["stage"]
    assert [row["stage"] for row in report.funnel] == [
        "extract",
        "language",
        "filter",
        "dedup",
        "pii",
    ]
    last = report.funnel[-1]["out"]
    assert report.train["documents"] + report.heldout["documents"] == last["documents"]
    assert report.train["bytes"] + report.heldout["bytes"] == last["bytes"]
    # shards hold one end-of-text token a document more
    tokens = report.train["tokens"] + report.heldout["tokens"]
    assert tokens == last["tokens"] + last["documents"]
    stored = json.loads((folder / "out" / "funnel.json").read_text())
    assert stored["stages"] == report.funnel and stored["train"] == report.train
    assert json.dumps(report.as_dict())


def test_documents_rejects_and_shards_agree(made):
    _, folder, report = made
    out, tokenizer = folder / "out", byte_tokenizer()
    assert check_file(out / "documents.jsonl") == check_file(out / "rejected.jsonl") == []
    documents = {d.id: d for d in read_documents(out / "documents.jsonl")}
    for name in ("train", "heldout"):
        shards = TokenShards(out / name, tokenizer_hash=tokenizer.hash, verify=True)
        assert len(shards) == getattr(report, name)["documents"]
        for row, ids in zip(shards.documents(), shards, strict=True):
            assert documents[row["id"]].meta["split"] == name
            assert ids[-1] == tokenizer.special_tokens["<|endoftext|>"]
            assert tokenizer.decode(ids[:-1].tolist()) == documents[row["id"]].content
    for document in read_documents(out / "rejected.jsonl"):
        assert {"stage", "rule", "value"} <= document.meta["rejected"].keys()
    quarantine = [json.loads(x) for x in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {row["uri"]: row["reason"] for row in quarantine} == {
        "cut.pdf": "corrupt",
        "zeros.epub": "corrupt",
    }
    assert str(folder) not in (out / "documents.jsonl").read_text(), "a path of this machine"


def test_heldout_text_is_not_in_training_text(made):
    cfg, folder, _ = made
    documents = list(read_documents(folder / "out" / "documents.jsonl"))
    sides = {"train": [], "heldout": []}
    for document in documents:
        sides[document.meta["split"]].append(shingles(document.content))
    worst = max(jaccard(a, b) for a in sides["train"] for b in sides["heldout"])
    assert worst < cfg.heldout_jaccard


def test_the_same_input_gives_the_same_bytes(made, tmp_path: Path):
    cfg, folder, _ = made
    run(replace(cfg, workers=1), tmp_path / "again", tokenizer=byte_tokenizer(), progress=False)
    files = sorted(p.relative_to(folder / "out") for p in (folder / "out").rglob("*.*"))
    assert len(files) >= 12
    for file in files:
        assert (folder / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), (
            file
        )


def test_related_documents_are_held_out_together():
    words = [f"word{i}" for i in range(200)]
    texts = [" ".join(words[:150] + [f"own{j}x{i}" for i in range(50)]) for j in range(6)]
    texts += [" ".join(f"other{j}n{i}" for i in range(100)) for j in range(6)]
    documents = [Document(f"d{i}", t, Source(f"{i}")) for i, t in enumerate(texts)]
    for seed in range(5):
        done = split(documents, DataConfig(heldout=0.5, seed=seed))
        assert len({d.meta["split"] for d in done[:6]}) == 1
        assert {d.meta["split"] for d in done} == {"train", "heldout"}


def test_the_score_counts_misses(made):
    cfg, folder, _ = made
    ledger = read_ledger(Path(cfg.ledger))
    kept = list(read_documents(folder / "out" / "documents.jsonl"))
    rejected = list(read_documents(folder / "out" / "rejected.jsonl"))
    blind = score_plants(ledger, kept + rejected, [], [])
    assert all(blind[k]["found"] == 0 for k in KINDS if k not in ("pii", "encoding"))
    assert blind["corrupt_pdf"]["missed"] == ["cut.pdf"]
    leaky = [
        replace(d, content=d.content + " ".join(row.get("secrets", [])))
        for d in kept
        for row in ledger
        if row["path"] == d.source.uri
    ]
    assert score_plants(ledger, leaky, [], [])["pii"]["found"] == 0
    wrong = [d.with_meta(rejected={"stage": "filter"}) for d in kept]
    assert len(score_plants(ledger, [], wrong, [])["clean"]["lost"]) > 40


def test_planting_repeats_and_spares_the_source(made, tmp_path: Path):
    _, folder, _ = made
    for name in ("a", "b"):
        plant_faults(folder / "rendered", tmp_path / name, tmp_path / f"{name}.json", seed=3)
    names = [p.name for p in sorted((tmp_path / "a").iterdir())]
    assert names == [p.name for p in sorted((tmp_path / "b").iterdir())]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((folder / "rendered").glob("copy-of-*"))
    with pytest.raises(UserError, match="new folder only"):
        plant_faults(folder / "rendered", tmp_path / "a", tmp_path / "x.json")


# --- what a user can get wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ""}, "data needs a folder"),
        ({"preset": "dosc"}, "did you mean docs"),
        ({"pii": ("mail",)}, "no kind of personal data 'mail'"),
        ({"jaccard": 2.0}, "threshold 2"),
        ({"keep": "best"}, "keep policy 'best'"),
        ({"minhash": "x"}, "backend 'x'"),
        ({"heldout": 1.0}, "heldout=1"),
    ],
)
def test_a_wrong_config_is_found_before_any_work(tmp_path: Path, changes: dict, message: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        run(
            DataConfig(**{"input": str(tmp_path / "in")} | changes),
            tmp_path / "out",
            tokenizer=byte_tokenizer(),
        )
    assert not (tmp_path / "out").exists()


def test_nothing_to_read_is_one_clear_error(tmp_path: Path):
    with pytest.raises(Missing, match="is no folder"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"0 others\): there is nothing to read"):
        find_files(tmp_path)
    (tmp_path / "a.bin").touch()
    (tmp_path / ".hidden.txt").touch()
    with pytest.raises(UserError, match="1 others"):
        find_files(tmp_path)


def test_a_corpus_that_is_dropped_whole_is_an_error(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n")
    cfg, out = DataConfig(input=str(tmp_path / "in")), tmp_path / "out"
    with pytest.raises(UserError, match=r"none of the 1 files .* \{'empty': 1\}"):
        run(cfg, out, tokenizer=byte_tokenizer())
    (tmp_path / "in" / "a.txt").write_text("This is a short text about the harbour of the town.")
    with pytest.raises(
        UserError, match=r"stage 'filter' .* dropped every document: \{'words': 1\}"
    ):
        run(cfg, out, tokenizer=byte_tokenizer())
    assert not out.exists()


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path, made):
    cfg, _, _ = made
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        run(cfg, tmp_path, tokenizer=byte_tokenizer())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.fakes import byte_tokenizer
from internjax.data.executor import DataConfig, run
run(DataConfig(input=sys.argv[2]), Path(sys.argv[3]), tokenizer=byte_tokenizer())
"""


def test_a_killed_run_leaves_no_result_and_the_next_one_succeeds(made, tmp_path: Path):
    cfg, _, _ = made
    command = [sys.executable, "-c", RUN, str(ROOT), cfg.input, str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    time.sleep(4)  # imports are done, extraction or a later stage is at work
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out").exists():  # a fast machine was done before
        assert TokenShards(tmp_path / "out" / "train", verify=True)
    run(cfg, tmp_path / "out", tokenizer=byte_tokenizer(), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.needs_mirror
def test_real_documents_of_two_languages(mirror: Path, tmp_path: Path):
    cfg = DataConfig(input=str(mirror / "raw-debian-docs"), heldout_jaccard=0.2)
    report = run(cfg, tmp_path / "out", tokenizer=byte_tokenizer(), progress=False)
    documents = list(read_documents(tmp_path / "out" / "documents.jsonl"))
    assert {d.language for d in documents} == {"en", "zh-Hans"}
    # The policy manual in three formats is one text: of epub, pdf and txt one stays.
    policy = [d.source.uri for d in documents if d.source.uri.startswith("policy.")]
    assert len(policy) == 1, report.funnel
    assert not report.quarantined
