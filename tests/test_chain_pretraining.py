"""Pretraining and its verb: held-out text is better known, on one device or eight alike."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from internjax import configs
from internjax.chain.pretraining import PretrainConfig, bits_per_byte, pretrain
from internjax.cli import run
from internjax.data.loader import ReadAhead
from internjax.data.mixture import WeightsFrom
from internjax.data.shards import TokenShards, write_shards
from internjax.data.templates import TEMPLATES
from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.decoder import forward, init_params, param_table
from internjax.models.internlm import CONFIGS
from internjax.models.load import Model, load
from internjax.models.native import save_native
from internjax.train.loop import RunConfig
from internjax.train.optim import OptimConfig
from internjax.train.stop import Stopped
from internjax.tree import flatten
from tests.fakes import TINY, byte_tokenizer

VOCAB = 264  # divisible by 8, unlike the tokenizer's 259


def write_corpus(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    for part, numbers in (("train", range(24)), ("heldout", range(30, 36))):
        texts = [f"Line {n} comes after line {n - 1}. It is a line. " for n in numbers]
        rows = [
            (str(i), np.array(tokenizer.encode(t), np.int32), len(t)) for i, t in enumerate(texts)
        ]
        vocab_size = tokenizer.vocab_size
        write_shards(folder / part, rows, tokenizer_hash=tokenizer.hash, vocab_size=vocab_size)
    return folder


def setup(folder: Path, dtype: str) -> tuple[Model, TokenShards, TokenShards]:
    cfg = replace(TINY, vocab_size=VOCAB, dtype=dtype)
    params = init_params(cfg, jax.random.key(0), jnp.dtype(dtype))
    model = Model(cfg, params, byte_tokenizer(), TEMPLATES["chatml"], folder)
    corpus = write_corpus(folder / "corpus")
    return model, TokenShards(corpus / "train"), TokenShards(corpus / "heldout")


def settings(steps: int = 3, **changes) -> PretrainConfig:
    return PretrainConfig(
        batch_size=8,
        length=48,
        optim=OptimConfig(lr=1e-2),
        run=RunConfig(steps=steps, save_every=0, progress=False),
        **changes,
    )


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_heldout_text_is_better_known_afterwards(tmp_path: Path):
    model, train, heldout = setup(tmp_path, "float32")
    before = jax.tree.map(np.array, model.params)
    trained, metrics = pretrain(model, train, heldout, settings(8), tmp_path / "run")
    assert metrics["heldout_bits_per_byte_after"] < metrics["heldout_bits_per_byte_before"] - 0.5
    assert metrics["steps"] == len(metrics["loss"]) == 8
    jax.tree.map(np.testing.assert_array_equal, model.params, before)  # the given model is kept
    assert not np.array_equal(trained.params["embed"], before["embed"])


def test_bits_per_byte_by_hand(tmp_path: Path, float64):
    model, _, heldout = setup(tmp_path, "float64")
    nats = 0.0
    for ids in heldout:
        for start in range(0, len(ids), 48):
            piece = jnp.asarray(ids[start : start + 48], jnp.int32)[None]
            logp = jax.nn.log_softmax(forward(model.params, piece, model.cfg)[0], axis=-1)
            nats -= sum(logp[i, piece[0, i + 1]] for i in range(piece.shape[1] - 1))
    want = float(nats) / np.log(2) / heldout.num_bytes
    assert bits_per_byte(model.params, heldout, model.cfg, 48) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=4, tensor=2, zero=3, zero_group=2),
        MeshConfig(data=4, zero=0),
        MeshConfig(data=4, zero=1),
    ],
    ids=str,
)
def test_a_mesh_trains_the_same_model(tmp_path: Path, float64, mesh: MeshConfig):
    model, train, heldout = setup(tmp_path, "float64")
    cfg = settings(micro_batches=2)
    one, metrics = pretrain(model, train, heldout, cfg, tmp_path / "one")
    many, got = pretrain(model, train, heldout, cfg, tmp_path / "many", mesh=mesh)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-12)
    for when in ("before", "after"):
        key = f"heldout_bits_per_byte_{when}"
        assert got[key] == pytest.approx(metrics[key], rel=1e-12)
    w_up = many.params["layers"]["w_up"]
    assert len(w_up.sharding.device_set) == mesh.num_devices
    shards = mesh.sizes["fsdp"] * mesh.tensor
    assert w_up.size == w_up.addressable_shards[0].data.size * shards
    for path, leaf in flatten(one.params).items():
        error = np.linalg.norm(np.asarray(flatten(many.params)[path]) - leaf)
        assert error <= 1e-11 * np.linalg.norm(leaf), path


def test_a_run_goes_on_on_another_mesh(tmp_path: Path, float64):
    model, train, heldout = setup(tmp_path, "float64")
    cfg = settings(4)
    _, want = pretrain(model, train, heldout, cfg, tmp_path / "straight")

    class Stopping(ReadAhead):
        def __call__(self, step: int):
            if step == 1:
                (tmp_path / "moved" / "STOP").touch()
            return super().__call__(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internjax.chain.pretraining.ReadAhead", Stopping)
        with pytest.raises(Stopped, match="stopped by"):
            pretrain(model, train, heldout, cfg, tmp_path / "moved")
    _, got = pretrain(
        model, train, heldout, cfg, tmp_path / "moved", mesh=MeshConfig(data=2, tensor=2)
    )
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-11)


def test_a_mixture_tells_the_loss_of_every_source(tmp_path: Path, float64):
    model, train, heldout = setup(tmp_path, "float64")
    cfg = settings(2, weights=(WeightsFrom(0, {"a": 3.0, "b": 1.0}),))
    sources = {"a": train, "b": heldout}
    for mesh in (MeshConfig(), MeshConfig(pipe=2)):
        folder = tmp_path / f"pipe{mesh.pipe}"
        pretrain(model, sources, heldout, cfg, folder, mesh=mesh)
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        for line in lines:
            losses = [line[f"loss/{name}"] for name in sources if f"loss/{name}" in line]
            assert min(losses) * (1 - 1e-9) <= line["loss"] <= max(losses) * (1 + 1e-9)
            assert 0 <= line["accuracy"] <= 1 and line["lr"] > 0


def test_low_precision_learns_as_float32_does(tmp_path: Path):
    model, train, heldout = setup(tmp_path, "float32")
    _, wide = pretrain(model, train, heldout, settings(6), tmp_path / "wide")
    # float16 has 11 bits, bfloat16 8, fp8 4 or 3: how near the losses are follows.
    for change, near in (({"dtype": "float16"}, 1e-2), ({"matmul": "fp8"}, 5e-2)):
        folder = tmp_path / str(change)
        trained, got = pretrain(model, train, heldout, settings(6, **change), folder)
        np.testing.assert_allclose(got["loss"], wide["loss"], rtol=near)
        assert got["loss"] != wide["loss"] and got["loss"][-1] < got["loss"][0]
        assert trained.params["layers"]["wq"].dtype == np.float32
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        assert all(line["finite"] for line in lines)
        assert lines[0].get("loss_scale") == (65536 if "dtype" in change else None)


def test_rows_that_devices_cannot_share_are_refused(tmp_path: Path):
    model, train, heldout = setup(tmp_path, "float32")
    with pytest.raises(UserError, match="batch_size=8 is not a multiple of micro_batches=2 times"):
        pretrain(
            model, train, heldout, settings(micro_batches=2), tmp_path / "r", mesh=MeshConfig(8)
        )
    with pytest.raises(UserError, match="every part must have as many rows"):
        settings(micro_batches=3)
    with pytest.raises(UserError, match="length=48 is longer than the context of tiny, 32 tokens"):
        short = replace(model, cfg=replace(model.cfg, max_context=32))
        pretrain(short, train, heldout, settings(), tmp_path / "s")


@pytest.mark.parametrize("name", [*CONFIGS, "smoke-5m"])
def test_every_architecture_of_the_group_is_the_named_one(name: str):
    raw = OmegaConf.load(Path(configs.__file__).parent / "arch" / f"{name}.yaml")
    cfg = build(ModelConfig, raw)
    if name in CONFIGS:
        assert cfg == CONFIGS[name]
    else:
        numbers = sum(np.prod(spec.shape) for spec in param_table(cfg).values())
        assert 4.5e6 < numbers < 5.5e6


SHORT = ["length=48", "batch_size=8", "run.steps=3", "optim.lr=1e-2"]


def test_the_verb_trains_a_model_and_a_random_one(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    cfg = replace(TINY, vocab_size=VOCAB)
    save_native("model", cfg, init_params(cfg, jax.random.key(0)), byte_tokenizer())
    command = ["pretrain", "model", "shards=corpus", "out=out", *SHORT]
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "held-out bits per byte" in said
    card = json.loads(Path("out/card.json").read_text())
    assert set(card["inputs"]) == {"model", "train", "heldout"}
    assert len(Path("out/steps.jsonl").read_text().splitlines()) == 3
    assert "<svg" in Path("out/report.html").read_text()
    assert load("out/model").cfg == replace(cfg, name=load("out/model").cfg.name)
    assert not list(Path("runs/work").glob("*"))  # what only a crash needs is gone
    assert run(command) == 0  # found, not made again
    assert json.loads(Path("out/card.json").read_text())["created"] == card["created"]
    assert run([*command, "seed=1"]) == 2
    assert "out: is there already" in capsys.readouterr().err
    arch = ["arch=smoke-5m", "arch.vocab_size=264", "tokenizer=model", "mesh=cube-8"]
    assert run(["pretrain", *arch, "shards=corpus", "out=new", *SHORT]) == 0
    assert load("new/model").cfg.name == "smoke-5m"


def test_any_checkpoint_becomes_a_model_of_any_format(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    cfg = replace(TINY, vocab_size=VOCAB, num_layers=4)
    save_native("model", cfg, init_params(cfg, jax.random.key(0)), byte_tokenizer())
    kept = ["run.save_every=1", "run.keep_every=2", "run.keep=1"]
    # Interleaved stages hold the layers cut in two; the model has them in one piece.
    pipe = ["mesh.pipe=2", "mesh.chunks=2", "micro_batches=2"]
    assert run(["pretrain", "model", "shards=corpus", "out=out", *SHORT, *kept, *pipe]) == 0
    convert = ["convert", "out/checkpoints"]
    assert run([*convert, "last", "tokenizer=model"]) == 0
    assert run([*convert, "second", "to=native", "step=2", "tokenizer=model"]) == 0
    last, second, end = load("last"), load("second"), load("out/model")
    assert Path("last/config.json").is_file()
    jax.tree.map(np.testing.assert_array_equal, last.params, end.params)
    assert not np.array_equal(second.params["embed"], end.params["embed"])
    assert last.tokenizer.encode("a line") == end.tokenizer.encode("a line")
    capsys.readouterr()
    for words, complaint in (
        ([*convert, "no", "step=1"], "no checkpoint of step 1; there are 2, 3."),
        (["convert", "model", "no", "step=1"], "step= is for a folder of checkpoints"),
        (["pretrain", "out/checkpoints", "shards=corpus"], "make a model of them first"),
    ):
        assert run(words) == 2
        assert complaint in capsys.readouterr().err
    assert not Path("no").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["shards=corpus"], "either a model to go on with or an arch="),
        (["m", "arch=smoke-5m", "shards=corpus"], "either a model to go on with or an arch="),
        (["arch=smoke-5m", "shards=corpus"], "arch= needs tokenizer="),
        (["arch=smoke-6m", "shards=corpus"], "did you mean arch=smoke-5m"),
        (["model", "shards=nothing"], "nothing/train holds no token shards"),
        (["model", "shards=corpus", "optim.rl=1"], "did you mean optim.lr"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys, monkeypatch, words, complaint):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_native("model", TINY, init_params(TINY, jax.random.key(0)), byte_tokenizer())
    assert run(["pretrain", *words]) == 2
    assert complaint in capsys.readouterr().err
