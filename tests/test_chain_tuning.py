"""Tuning and its verb: answers are learned, the base stays, the adapter travels."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.lora import LoraConfig
from internjax.adapt.quantize import QuantConfig, quantize
from internjax.chain.tuning import TuneConfig, chat_rows, merged, tune
from internjax.cli import run
from internjax.data.chat import encode_chat
from internjax.data.templates import TEMPLATES
from internjax.errors import UserError
from internjax.models.decoder import forward
from internjax.models.load import Model, load
from internjax.models.native import save_native
from internjax.models.peft import load_adapter
from internjax.train.loop import RunConfig
from internjax.train.optim import OptimConfig
from internjax.tree import flatten
from tests.fakes import byte_tokenizer, tiny_model

CHATS = [
    [{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": "I am Ada."}]
    for i in range(12)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    cfg, params = tiny_model()
    return Model(cfg, params, byte_tokenizer(), TEMPLATES["chatml"], tmp_path)


def settings(steps: int = 4, **changes) -> TuneConfig:
    return TuneConfig(
        batch_size=4,
        length=128,
        lora=LoraConfig(4, 8.0),
        optim=OptimConfig(lr=2e-2),
        run=RunConfig(steps=steps, save_every=2, progress=False),
        **changes,
    )


def test_answers_alone_are_learned(model: Model):
    rows = chat_rows(model, CHATS, 128)
    counted = [row.targets[row.loss_mask > 0] for row in rows]
    text = model.tokenizer.decode([int(i) for part in counted for i in part], skip_specials=True)
    assert text.replace("\n", "") == "I am Ada." * len(CHATS)
    tokens = sum(len(encode_chat(model.tokenizer, model.template, chat)[0]) for chat in CHATS)
    assert sum(int((row.segment_ids > 0).sum()) for row in rows) == tokens  # nothing was lost


def test_the_loss_falls_and_the_base_stays(model: Model, tmp_path: Path):
    before = jax.tree.map(np.array, model.params)
    adapter, metrics = tune(model, CHATS, settings(12), tmp_path / "run")
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.2
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    tokens = jnp.arange(16, dtype=jnp.int32)[None]
    base = forward(model.params, tokens, model.cfg)
    tuned = forward(merged(model, adapter, settings().lora), tokens, model.cfg)
    assert float(jnp.abs(tuned - base).max()) > 1e-2
    assert metrics["answer_tokens"] > 0 and metrics["trained_tokens"] == 12 * 4 * 128


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_is_trained_over_integers(model: Model, tmp_path: Path, rank: int):
    small = replace(model, params=quantize(model.params, QuantConfig(group=8, rank=rank)))
    adapter, metrics = tune(small, CHATS, settings(6), tmp_path / "run")
    assert metrics["loss"][-1] < metrics["loss"][0]
    params = merged(small, adapter, settings().lora)
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(params).values())


def test_a_chat_longer_than_a_row_is_refused(model: Model):
    long = [[CHATS[0][0], {"role": "assistant", "content": "word " * 40}]]
    with pytest.raises(UserError, match=r"a chat has 2\d\d tokens and a row holds 128"):
        chat_rows(model, long, 128)
    with pytest.raises(UserError, match="longer than the context of tiny, 128 tokens"):
        chat_rows(model, CHATS, 256)
    with pytest.raises(UserError, match="no answer to learn"):
        chat_rows(model, [], 128)


def test_the_verb_tunes_resumes_and_quantizes(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg, params = tiny_model()
    save_native("model", cfg, params, replace(byte_tokenizer(), chat_template=CHATML))
    lines = (json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    Path("chats.jsonl").write_text("".join(lines))
    command = ["tune", "model", "data=chats.jsonl", "length=128", "lora.rank=2", "run.steps=6"]
    command += ["run.save_every=2", "optim.lr=1e-2"]
    assert run([*command, "out=straight"]) == 0

    # The same again, stopped by a full disk just when the artefact was to be written.
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internjax.experiments.tune.save_adapter", no_space)
        assert run([*command, "out=again"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not Path("again").exists() and not list(tmp_path.glob(".tmp-*"))
    assert list(Path("runs/work").iterdir())  # the checkpoints are still there
    assert run([*command, "out=again"]) == 0
    assert not list(Path("runs/work").iterdir())
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    card = json.loads(Path("again/card.json").read_text())
    assert set(card["inputs"]) == {"model", "chats"} and card["metrics"]["steps"] == 6

    adapter, lora = load_adapter(Path("again/adapter"), cfg)
    want = merged(load("model"), adapter, lora)
    got = load("again/model")
    for path, leaf in flatten(want).items():
        np.testing.assert_allclose(flatten(got.params)[path], leaf, rtol=0, atol=1e-6)

    assert run(["quantize", "again/model", "group=8", "rank=2", "out=small"]) == 0
    assert "MB became" in capsys.readouterr().out
    tokens = jnp.arange(16, dtype=jnp.int32)[None]
    small = load("small/model")
    error = forward(small.params, tokens, cfg) - forward(got.params, tokens, cfg)
    assert 0 < float(jnp.abs(error).max()) < 0.3
    assert run(["quantize", "model", "group=24", "out=other"]) == 2
    assert "group=24 does not cut the 32 inputs" in capsys.readouterr().err
    assert not Path("other").exists()


def test_the_verb_makes_its_own_chats_and_no_model_when_not_asked(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg, params = tiny_model(max_context=1024)
    save_native("model", cfg, params, replace(byte_tokenizer(), chat_template=CHATML))
    command = ["tune", "model", "samples=6", "length=1024", "run.steps=1", "batch_size=1"]
    assert run([*command, "identity.name=Ada", "merge=false"]) == 0
    (made,) = Path("runs/store").iterdir()
    assert sorted(p.name for p in made.iterdir()) == [
        "adapter",
        "card.json",
        "report.html",
        "steps.jsonl",
    ]
    config = json.loads((made / "card.json").read_text())["config"]
    assert config["identity"]["name"] == "Ada"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["data=nothing.jsonl"], "nothing.jsonl is not there"),
        (["data=bad.jsonl"], "bad.jsonl:1:-: has none of the keys"),
        (["lora.targets=[q]"], "legal names are wq"),
        (["lora.rnak=4"], "did you mean lora.rank"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys, monkeypatch, words, complaint):
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": 1}\n')
    assert run(["tune", "model", *words]) == 2
    assert complaint in capsys.readouterr().err
