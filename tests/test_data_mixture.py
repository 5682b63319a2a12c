"""The batch of a step is a pure function: of processes, of order, of history it knows nothing."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.loader import ReadAhead
from internjax.data.mixture import BLOCK, Mixture, MixtureConfig, WeightsFrom, open_sources
from internjax.data.schedule import BatchPlan
from internjax.data.shards import TokenShards, write_shards
from internjax.errors import Corrupt, Missing, UserError

ROOT = Path(__file__).resolve().parent.parent
HASH = "a" * 64


def write(folder: Path, documents: list[list[int]], **options) -> None:
    rows = [(f"d{i}", np.array(ids, dtype=np.int64), 1) for i, ids in enumerate(documents)]
    given = {"tokenizer_hash": HASH, "vocab_size": 1000, "shard_tokens": 60} | options
    write_shards(folder, rows, **given)


def random_documents(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, rng.integers(0, 40)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources of several shards each, with empty documents and ones longer than a row."""
    path = tmp_path_factory.mktemp("mixture")
    write(path / "en", random_documents(60, 1))
    write(path / "zh", random_documents(31, 2))
    return path


def mixture(folder: Path, plan: BatchPlan | int = 8, **options) -> Mixture:
    plan = BatchPlan(plan) if isinstance(plan, int) else plan
    return Mixture(open_sources(folder), plan, MixtureConfig(**{"length": 16} | options))


def assert_same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


CHANGING = (
    WeightsFrom(0, {"en": 1.0, "zh": 3.0}),
    WeightsFrom(7, {"en": 1.0}),
    WeightsFrom(9, {"en": 2.0, "zh": 2.0}),
)
PLAN = BatchPlan(8, rampup="4 2 3", skip_batches="2,5-6")


# --- a pure function ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["apart", "concat", "first_fit"])
def test_any_step_at_any_time_in_any_part(folder: Path, packing: str):
    straight = mixture(folder, PLAN, packing=packing, weights=CHANGING)
    whole = [straight.batch_at(step) for step in range(20)]
    resumed = mixture(folder, PLAN, packing=packing, weights=CHANGING)
    for step in (17, 3, 19, 0):
        assert_same(resumed.batch_at(step), whole[step])
        size = resumed.batch_size(step)
        assert whole[step].tokens.shape == (size, 16)
        for ways in (1, 2, size):
            parts = [resumed.batch_at(step, np.arange(size)[i::ways]) for i in range(ways)]
            joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
            order = np.concatenate([np.arange(size)[i::ways] for i in range(ways)])
            assert_same(joined, jax.tree.map(lambda x, order=order: x[order], whole[step]))
        assert_same(
            resumed.batch_at(step, slice(1, 3)), jax.tree.map(lambda x: x[1:3], whole[step])
        )


# Four processes, each of which opens the shards and reads its rows as it would in a run of 1, 2 and
# 4; forked from one interpreter, because importing four times would take the longest.
PROCESSES = """
import json, os, sys
from internjax.data.mixture import *
folder, weights = sys.argv[1], tuple(WeightsFrom(b, w) for b, w in json.loads(sys.argv[2]))
children = []
for rank in range(4):
    child = os.fork()
    if child:
        children.append(child)
        continue
    plan = BatchPlan(8, rampup="4 2 3", skip_batches="2,5-6")
    made = Mixture(open_sources(folder), plan, MixtureConfig(length=16, weights=weights))
    lines = []
    for count in (1, 2, 4):
        for step in (13, 4):
            n = made.batch_size(step) // count
            if rank < count:
                batch = made.batch_at(step, slice(rank * n, (rank + 1) * n))
                lines.append([count, step, rank, batch.tokens.tolist(), batch.sources.tolist()])
    with open(f"{sys.argv[3]}/{rank}.json", "w") as file:
        json.dump(lines, file)
    os._exit(0)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_one_two_and_four_real_processes_read_the_same_batch(folder: Path, tmp_path: Path):
    weights = json.dumps([[w.batch, w.weights] for w in CHANGING])
    subprocess.run(
        [sys.executable, "-c", PROCESSES, folder, weights, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    lines = [line for file in tmp_path.glob("*.json") for line in json.loads(file.read_text())]
    here = mixture(folder, PLAN, weights=CHANGING)
    for step in (13, 4):
        whole = here.batch_at(step)
        for count in (1, 2, 4):
            parts = sorted(line[2:] for line in lines if line[:2] == [count, step])
            assert [part[0] for part in parts] == list(range(count))
            assert [row for part in parts for row in part[1]] == whole.tokens.tolist()
            assert [row for part in parts for row in part[2]] == whole.sources.tolist()


def test_read_ahead_changes_nothing(folder: Path):
    made = mixture(folder, PLAN, weights=CHANGING)
    reader = ReadAhead(made.batch_at, stop=20, threads=3, buffer=4)
    for step in (*range(6), 14, 15, 16):
        assert_same(reader(step), made.batch_at(step))
    reader.close()


def test_sources_are_known_by_name_and_orders_by_seed(folder: Path):
    sources = open_sources(folder)
    config, plan = MixtureConfig(length=16), BatchPlan(8)
    one = Mixture(sources, plan, config)
    other = Mixture(dict(reversed(sources.items())), plan, config)
    assert_same(one.batch_at(5), other.batch_at(5))
    tokens = [mixture(folder, seed=seed).batch_at(5).tokens.tolist() for seed in (0, 1)]
    assert tokens[0] == one.batch_at(5).tokens.tolist() and tokens[0] != tokens[1]


def test_sources_behind_an_address_and_half_made_ones(folder: Path, tmp_path: Path):
    here = mixture(folder)
    there = Mixture(open_sources(f"file://{folder}/{{en,zh}}"), BatchPlan(8), here.config)
    assert there.names == ["en", "zh"] and there.settings() == here.settings()
    assert_same(there.batch_at(3), here.batch_at(3))
    assert list(open_sources(f"file://{folder}/en")) == ["en"]
    write(tmp_path / "en", [[1, 2]])
    write(tmp_path / ".partial-zh-1", [[1, 2]])  # what a killed writer leaves
    assert list(open_sources(tmp_path)) == ["en"]


def test_the_data_of_a_seed_never_change(folder: Path):
    """A resumed run reads the tokens it would have read, with whatever version it is resumed."""
    made = mixture(folder, PLAN, weights=CHANGING)
    assert made.trace(4, 0) == ("en", [(6, 27, 5), (7, 0, 11)])
    assert made.trace(30_000, 5) == ("zh", [(30, 31, 5)])
    assert made.settings() == json.loads(json.dumps(made.settings()))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_guide_shows_code_that_runs(tmp_path: Path, monkeypatch, language: str):
    page = (ROOT / "docs" / language / "token-shards.md").read_text(encoding="utf-8")
    write(tmp_path / "shards" / "train" / "en", random_documents(300, 1))
    write(tmp_path / "shards" / "train" / "zh", random_documents(300, 2))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(
        compile(re.search(r"```python\n(.*?)```", page, re.S)[1], "token-shards.md", "exec"), names
    )
    assert names["batch"].tokens.shape == (64, 4096) and names["mine"].tokens.shape == (16, 4096)
    if "reader" in names:
        assert_same(names["reader"](7000), names["batch"])
        names["reader"].close()


# --- epochs, shares -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["apart", "concat", "first_fit"])
def test_every_document_is_seen_once_an_epoch(tmp_path: Path, packing: str):
    documents = random_documents(40, 3)
    write(tmp_path / "s", documents)
    made = mixture(tmp_path / "s", 1, packing=packing)
    size = len(made.rows[0])
    orders = []
    for epoch in range(3):
        seen: Counter = Counter()
        order = []
        for step in range(epoch * size, (epoch + 1) * size):
            name, pieces = made.trace(step, 0)
            assert name == "s"
            order.append(tuple(pieces))
            for document, first, count in pieces:
                seen.update((document, first + i) for i in range(count))
        assert seen == {(d, i): 1 for d, ids in enumerate(documents) for i in range(len(ids))}
        orders.append(order)
        assert made.epochs((epoch + 1) * size) == {"s": epoch + 1}
    assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def test_shares_are_the_weights(folder: Path):
    """Within 4 standard deviations of a binomial draw after any number of rows, exact at a block"""
    weights = {"en": 0.3, "zh": 0.7}
    made = mixture(folder, 64, weights=(WeightsFrom(0, weights),))
    drawn = 0
    for step in range(60):
        drawn += int((made.batch_at(step).sources[:, 0] == 1).sum())
        rows = 64 * (step + 1)
        assert abs(drawn - 0.7 * rows) <= 4 * np.sqrt(rows * 0.3 * 0.7)
    sizes = dict(zip(made.names, map(len, made.rows)))
    at_block = {k: v * sizes[k] for k, v in made.epochs(BLOCK // 64).items()}
    assert at_block == pytest.approx({k: w * BLOCK for k, w in weights.items()}, abs=1)


def test_weights_change_at_their_batch_and_nothing_is_lost_or_repeated(folder: Path):
    made = mixture(folder, PLAN, weights=CHANGING)
    first, last = made.plan.rows_before(7), made.plan.rows_before(9)
    for step in range(12):
        batch = made.plan.batch_of(step)
        if 7 <= batch < 9:
            assert (made.batch_at(step).sources == 0).all(), "only en has a weight there"
    # Row by row over the skipped ones, too: each source gives its epochs whole and in order.
    every = mixture(folder, BatchPlan(1), weights=tuple(
        WeightsFrom(row, w.weights) for row, w in zip((0, first, last), CHANGING)
    ))  # fmt: skip
    seen: dict[str, list] = {"en": [], "zh": []}
    for step in range(400):
        name, pieces = every.trace(step, 0)
        seen[name].append(tuple(pieces))
    for name, rows in seen.items():
        size = len(every.rows[every.names.index(name)])
        for start in range(0, len(rows) - size, size):
            assert len(set(rows[start : start + size])) == size
        assert every.epochs(400)[name] == pytest.approx(len(rows) / size)


def test_without_weights_every_row_counts_alike(folder: Path):
    made = mixture(folder)
    sizes = [len(rows) for rows in made.rows]
    counts = Counter(int(s) for k in range(100) for s in made.batch_at(k).sources[:, 0])
    share = sizes[0] / sum(sizes)
    assert abs(counts[0] - 800 * share) < 4 * np.sqrt(800 * share * (1 - share))


def test_far_steps_cost_no_more(folder: Path):
    made = mixture(folder, BatchPlan(4, rampup="2 1 1000"), weights=CHANGING)
    assert made.batch_at(10**9).tokens.shape == (4, 16)


# --- a row is its documents -----------------------------------------------------------------------

LISTS = st.lists(st.lists(st.integers(1, 99), max_size=25), min_size=1, max_size=9)


@pytest.mark.parametrize("packing", ["apart", "concat", "first_fit"])
@settings(deadline=None, max_examples=20)
@given(documents=LISTS.filter(any), length=st.integers(2, 12), masks=st.integers(0, 2**20))
def test_a_packed_row_is_its_documents(tmp_path_factory, packing, documents, length, masks):
    """Every field is built again from the documents alone; negative ids are not learned."""
    signed = [
        [-t if masks >> ((7 * i + j) % 20) & 1 else t for j, t in enumerate(ids)]
        for i, ids in enumerate(documents)
    ]
    path = tmp_path_factory.mktemp("row") / "s"
    write(path, signed, masked=bool(masks), shard_tokens=17)
    if not masks:
        signed = documents
    made = mixture(path, 1, length=length, packing=packing)
    learned: Counter = Counter()
    for step in range(len(made.rows[0])):
        batch = jax.tree.map(lambda x: x[0], made.batch_at(step))
        at, segment = 0, 0
        for document, first, count in made.trace(step, 0)[1]:
            ids, here = documents[document], slice(at, at + count)
            assert batch.tokens[here].tolist() == ids[first : first + count]
            for i in range(count):
                if first + i + 1 < len(ids):
                    assert batch.targets[at + i] == ids[first + i + 1]
                    assert batch.loss_mask[at + i] == (signed[document][first + i + 1] > 0)
                else:
                    assert batch.loss_mask[at + i] == 0, "the end of a document predicts nothing"
            learned.update(
                (document, first + i + 1) for i in range(count) if batch.loss_mask[at + i]
            )
            segment += 1
            if packing == "concat":
                segment = 1
                assert batch.positions[here].tolist() == list(range(at, at + count))
            else:
                assert batch.positions[here].tolist() == list(range(count))
            assert (batch.segment_ids[here] == segment).all()
            at += count
        for leaf in (batch.tokens, batch.segment_ids, batch.positions, batch.loss_mask):
            assert not leaf[at:].any(), "what is left is padding"
        assert packing == "first_fit" or at == length or step_is_last(made, step)
        assert batch.loss_mask.dtype == np.float32 and batch.tokens.dtype == np.int32
    assert learned == {
        (d, i): 1 for d, ids in enumerate(signed) for i, t in enumerate(ids) if i and t > 0
    }, "an epoch learns every token but the first of each document, once"


def step_is_last(made: Mixture, step: int) -> bool:
    """Whether the row of a step is the one that holds the end of the stream."""
    runs = made.rows[0].runs(int(made._locate(np.array([step]))[1][0]))
    return runs[-1][1] == made.rows[0].shards.num_tokens


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([(0, {"en": -1.0, "zh": 1.0})], "en=-1.0 must be a number from 0"),
        ([(0, {"en": float("nan")})], "en=nan must be"),
        ([(0, {"en": 0.0, "zh": 0.0})], "all are zero"),
        ([(0, {})], "all are zero"),
        ([(0, {"fr": 1.0})], "no source 'fr'; there are en, zh"),
        ([(0, {"en": 1.0, "zh": 1e-9})], "zh has a share of 1.0e-09"),
        ([(3, {"en": 1.0})], "the first must be 0"),
        ([(0, {"en": 1.0}), (5, {"zh": 1.0}), (5, {"en": 1.0})], "later than"),
    ],
)
def test_weights_that_cannot_be_meant(folder: Path, weights, words: str):
    with pytest.raises(UserError, match=words):
        mixture(folder, weights=tuple(WeightsFrom(b, w) for b, w in weights))


def test_sources_that_do_not_fit(folder: Path, tmp_path: Path):
    write(tmp_path / "en", [[1, 2]])
    write(tmp_path / "none", [[], []])
    with pytest.raises(UserError, match=r"from batch 0: source none is empty, but has the weight"):
        mixture(tmp_path, weights=(WeightsFrom(0, {"en": 1.0, "none": 1.0}),))
    mixture(tmp_path, weights=(WeightsFrom(0, {"en": 1.0}),)).batch_at(3)
    with pytest.raises(UserError, match="all are zero, or every source is empty"):
        mixture(tmp_path / "none")
    write(tmp_path / "other", [[1, 2]], tokenizer_hash="b" * 64)
    with pytest.raises(UserError, match=r"en and other .* \(aaaaaaaaaaaa and bbbbbbbbbbbb\)"):
        mixture(tmp_path)
    with pytest.raises(UserError, match=r"ids up to 999, the model's vocabulary ends at 499"):
        Mixture(open_sources(folder), BatchPlan(1), MixtureConfig(), vocab_size=500)
    with pytest.raises(UserError, match="names no source"):
        Mixture({}, BatchPlan(1), MixtureConfig())
    with pytest.raises(Missing, match="neither does a folder in it"):
        open_sources(tmp_path / "nowhere")
    with pytest.raises(UserError, match="made with tokenizer aaaaaaaaaaaa"):
        open_sources(folder, tokenizer_hash="c" * 64)
    with pytest.raises(UserError, match="apart, concat, first_fit"):
        mixture(folder, packing="best_fit")
    with pytest.raises(UserError, match="at least 2"):
        mixture(folder, length=1)
    with pytest.raises(UserError, match=r"step 0 has rows 0\.\.7; asked for 8"):
        mixture(folder).batch_at(0, [8])


def test_damage_is_found_when_it_is_read(tmp_path: Path):
    """Sizes are checked on opening; a wrong id inside a file of the right size, when read."""
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    file = tmp_path / "s" / "tokens-00000.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + (2000).to_bytes(2, "little") + whole[6:])
    with pytest.raises(Corrupt, match=r"token id 2000, beyond its vocabulary of 1000"):
        mixture(tmp_path / "s", 1).batch_at(0)
    file.write_bytes(whole[:-2])
    with pytest.raises(Corrupt, match="has 8 bytes, its header says 10"):
        mixture(tmp_path / "s", 1)
    file.unlink()
    with pytest.raises(Corrupt, match=r"tokens-00000\.bin is missing"):
        TokenShards(tmp_path / "s")
