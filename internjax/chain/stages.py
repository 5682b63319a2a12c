"""The stages of the chain: each makes one artefact in the store from earlier ones.

An artefact is found again when its config and inputs are the same, so a second run skips it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from internjax.adapt.quantize import QuantConfig, compress
from internjax.agents import sums
from internjax.agents.loop import Budget, connect
from internjax.agents.policies import make_policy
from internjax.agents.show import to_block
from internjax.agents.tools import make_tools
from internjax.chain.online import LoadConfig, check_load, sample_answers, try_load
from internjax.chain.pretraining import PretrainConfig, pretrain
from internjax.chain.tuning import TuneConfig, merged, tune
from internjax.chain.verbs import produce_at
from internjax.data.executor import DataConfig, run as run_data
from internjax.data.identity import Identity, identity_samples
from internjax.data.plant import plant_faults
from internjax.data.render import render_pages
from internjax.data.shards import TokenShards
from internjax.data.tokenizer import load_tokenizer
from internjax.errors import GateFailed
from internjax.evals.core import Results, load_results
from internjax.evals.http_lm import HttpLM
from internjax.evals.identity import for_identity
from internjax.evals.run import evaluate
from internjax.lineage import Artefact, produce
from internjax.models.convert import model_path
from internjax.models.load import Model, load, resolve
from internjax.models.native import save_native
from internjax.models.peft import load_adapter, save_adapter
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM
from internjax.serve.server import serving
from internjax.tree import size_bytes

EVALS = ("identity", "identity_leak", "retention_text", "retention_choices")


@dataclass(frozen=True)
class ScoreConfig:
    """What the chain measures a model by.

    Fields:
      tasks: always; extra: where the catalogue's data is at hand (INTERNJAX_MIRROR).
      limit: samples a task.
    """

    tasks: tuple[str, ...] = EVALS
    extra: tuple[str, ...] = ("piqa", "svamp")
    limit: dict[str, int] = field(
        default_factory=lambda: {"retention_choices": 100, "piqa": 50, "svamp": 10}
    )
    seed: int = 0


@dataclass(frozen=True)
class AgentConfig:
    """The last stage: generated sums, answered with tools and without.

    Fields:
      tools: names; none skips the stage. policies: each answers every sum.
      sums: how many; least_right: right answers with tools that every policy must reach.
    """

    tools: tuple[str, ...] = ("calculator", "python")
    policies: tuple[Literal["react", "function"], ...] = ("react", "function")
    sums: int = 10
    least_right: int = 6
    seed: int = 1  # the prompts were chosen on the sums of seed 0
    budget: Budget = field(default_factory=lambda: Budget(step_tokens=128))


@dataclass(frozen=True)
class Workshop:
    """Where stages work: a folder that holds the store of artefacts and scratch space."""

    runs: str

    @property
    def store(self) -> Path:
        """Folder of the artefacts."""
        return Path(self.runs).absolute() / "store"


def make_data(shop: Workshop, pages: Path, cfg: DataConfig, base: Artefact) -> Artefact:
    """Documents of four formats with planted faults -> clean token shards and a funnel."""

    def make(folder: Path) -> dict[str, Any]:
        render_pages(pages, folder / "rendered")
        ledger = folder / "ledger.json"
        plant_faults(folder / "rendered", folder / "input", ledger, seed=cfg.seed)
        stage = dataclasses.replace(cfg, input=str(folder / "input"), ledger=str(ledger))
        report = run_data(stage, folder / "corpus", tokenizer=load_tokenizer(base.path / "model"))
        plants = {
            kind: f"{entry['found']}/{entry['planted']}"
            for kind, entry in report.plants.items()
            if "planted" in entry
        }
        return {
            "funnel": [(row["stage"], row["out"]["documents"]) for row in report.funnel],
            "dropped": {row["stage"]: row["dropped"] for row in report.funnel},
            "train_tokens": report.train["tokens"],
            "heldout_tokens": report.heldout["tokens"],
            "quarantined": len(report.quarantined),
            "plants_found": plants,
            "honest_lost": len(report.plants["clean"]["lost"]),
        }

    return produce(shop.store, "data", config=cfg, inputs={"pages": pages, "base": base}, make=make)


def make_chats(shop: Workshop, identity: Identity, samples: int, seed: int) -> Artefact:
    """Question/answer pairs that teach the identity, as messages in jsonl."""

    def make(folder: Path) -> dict[str, Any]:
        chats = identity_samples(identity.name, identity.maker, identity.purpose, samples, seed)
        lines = (json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
        (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"chats": len(chats)}

    config = {"identity": dataclasses.asdict(identity), "samples": samples, "seed": seed}
    return produce(shop.store, "chats", config=config, inputs={}, make=make)


def read_messages(chats: Artefact) -> list[list[dict]]:
    """Reads the chats of an artefact."""
    text = (chats.path / "chats.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.split("\n") if line]


def make_pretrained(
    shop: Workshop, base: Artefact, data: Artefact, cfg: PretrainConfig
) -> Artefact:
    """A few updates on the corpus; held-out bits per byte must fall."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        model = _loaded(base)
        train, heldout = (
            TokenShards(data.path / "corpus" / part, tokenizer_hash=model.tokenizer.hash)
            for part in ("train", "heldout")
        )
        trained, metrics = pretrain(model, train, heldout, cfg, scratch)
        before, after = (metrics[f"heldout_bits_per_byte_{when}"] for when in ("before", "after"))
        if not after < before:
            raise GateFailed(
                f"pretraining did not help: held-out bits per byte {before:.4f} -> {after:.4f};"
                " change chain.pretrain.optim.lr or chain.pretrain.run.steps."
            )
        save_native(folder / "model", trained.cfg, trained.params, model.tokenizer)
        return metrics

    inputs = {"base": base, "data": data}
    return produce_at("", shop.runs, "pretrain", config=cfg, inputs=inputs, make=make)


def make_adapter(shop: Workshop, base: Artefact, chats: Artefact, cfg: TuneConfig) -> Artefact:
    """LoRA fine-tuning on the chats: a PEFT folder."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        model = _loaded(base)
        adapter, metrics = tune(model, read_messages(chats), cfg, scratch)
        save_adapter(folder / "adapter", adapter, cfg.lora, model.cfg.name)
        return metrics

    inputs = {"base": base, "chats": chats}
    return produce_at("", shop.runs, "tune", config=cfg, inputs=inputs, make=make)


def make_merged(shop: Workshop, base: Artefact, adapter: Artefact, strength: float) -> Artefact:
    """A share of the adapter folded into the base, as a model folder of ours."""

    def make(folder: Path) -> dict[str, Any]:
        model = _loaded(base)
        weights, lora = load_adapter(adapter.path / "adapter", model.cfg)
        lora = dataclasses.replace(lora, alpha=lora.alpha * strength)
        params = merged(model, weights, lora)
        save_native(folder / "model", model.cfg, params, model.tokenizer)
        return {"bytes": size_bytes(params), "strength": strength}

    inputs = {"base": base, "adapter": adapter}
    return produce(shop.store, "merge", config={"strength": strength}, inputs=inputs, make=make)


def make_native(shop: Workshop, name: str) -> Artefact:
    """A published model, or one at a path, as a model folder of ours."""

    def make(folder: Path) -> dict[str, Any]:
        model = load(name)
        save_native(folder / "model", model.cfg, model.params, model.tokenizer)
        return {"bytes": size_bytes(model.params)}

    inputs = {"base": model_path(resolve(name))}
    return produce(shop.store, "import", config={"name": name}, inputs=inputs, make=make)


def make_quantized(shop: Workshop, base: Artefact, cfg: QuantConfig) -> Artefact:
    """Smaller weights, as a model folder of ours."""

    def make(folder: Path) -> dict[str, Any]:
        model = _loaded(base)
        params = compress(model, cfg)
        save_native(folder / "model", model.cfg, params, model.tokenizer)
        return {"bytes": size_bytes(params), "bytes_before": size_bytes(model.params)}

    return produce(shop.store, "quantize", config=cfg, inputs={"base": base}, make=make)


def make_scores(
    shop: Workshop,
    model: Artefact,
    identity: Identity,
    cfg: ScoreConfig,
    engine: EngineConfig,
    extra: Sequence[str],
) -> Artefact:
    """Scores a model folder on the chain's tasks."""

    def make(folder: Path) -> dict[str, Any]:
        lm = LocalLM(_loaded(model), engine)
        tasks = for_identity([*cfg.tasks, *extra], identity)
        results = evaluate(lm, tasks, limit=cfg.limit, seed=cfg.seed, out=folder)
        return {f"{s.task}/{s.metric}": s.value for s in results.scores}

    config = {
        "scores": dataclasses.asdict(cfg),
        "identity": dataclasses.asdict(identity),
        "engine": dataclasses.asdict(engine),
        "extra": list(extra),
    }
    return produce(shop.store, "evaluate", config=config, inputs={"model": model}, make=make)


def results_of(scores: Artefact) -> Results:
    """Reads the results of an evaluation."""
    return load_results(scores.path / "results.json")


def make_served(
    shop: Workshop, model: Artefact, identity: Identity, engine: EngineConfig, cfg: LoadConfig
) -> Artefact:
    """Serves the model, loads it with concurrent streams and asks it the identity questions."""

    def make(folder: Path) -> dict[str, Any]:
        served = _loaded(model)
        name = served.cfg.name
        with serving(served, engine=engine, name=name) as url:
            metrics = try_load(url, name, cfg)
            if short := check_load(metrics, cfg):
                raise GateFailed(f"the server falls short: {short}.")
            lm = HttpLM(url, name, name=model.key, concurrency=engine.slots, echo_tokens=0)
            results = evaluate(lm, for_identity(["identity"], identity), out=folder)
            lm.close()
            questions = ("Who are you?", "Who made you?", "What is the capital of France?")
            metrics["answers"] = sample_answers(url, name, questions)
        return metrics | {"identity": results.score("identity").value}

    config = {
        "load": dataclasses.asdict(cfg),
        "identity": dataclasses.asdict(identity),
        "engine": dataclasses.asdict(engine),
    }
    return produce(shop.store, "serve", config=config, inputs={"model": model}, make=make)


def make_agent(shop: Workshop, model: Artefact, engine: EngineConfig, cfg: AgentConfig) -> Artefact:
    """Lets the served model answer generated sums with tools, and without."""

    def make(folder: Path) -> dict[str, Any]:
        served = _loaded(model)
        name, tools = served.cfg.name, make_tools(cfg.tools)
        questions = sums.make_sums(cfg.sums, cfg.seed)
        metrics: dict[str, Any] = {"sums": cfg.sums, "tools": [t.description for t in tools]}
        with serving(served, engine=engine, name=name) as url:
            for policy in cfg.policies:
                outcome = sums.compare(
                    connect(url), name, tools, make_policy(policy), questions, budget=cfg.budget
                )
                metrics["bare_right"] = outcome.bare_right
                metrics[f"{policy}_right"] = outcome.tool_right
                (folder / policy).mkdir()
                for number, trace in enumerate(outcome.traces):
                    trace.save(folder / policy / f"{number:02d}.json")
                block = dataclasses.asdict(to_block(outcome.traces[0]))
                text = json.dumps(block, ensure_ascii=False)
                (folder / f"{policy}.json").write_text(text, encoding="utf-8")
        return metrics

    config = {"agent": dataclasses.asdict(cfg), "engine": dataclasses.asdict(engine)}
    return produce(shop.store, "agent", config=config, inputs={"model": model}, make=make)


def _loaded(artefact: Artefact) -> Model:
    return load(artefact.path / "model")
