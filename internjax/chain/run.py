"""The chain: stages in order, a gate before deployment, rounds back to tuning, one report.

The seeds' flow from model to application: choose a model, tune it if it does not fit the need,
evaluate, go back to tuning if it fails, deploy, let it use tools if the application needs them.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import internjax
from internjax.adapt.quantize import QuantConfig
from internjax.chain.gate import Check, GateConfig, gate, knows_itself, passed, reasons
from internjax.chain.online import LoadConfig
from internjax.chain.pretraining import PretrainConfig
from internjax.chain.stages import (
    AgentConfig,
    ScoreConfig,
    Workshop,
    make_adapter,
    make_agent,
    make_chats,
    make_data,
    make_merged,
    make_native,
    make_pretrained,
    make_quantized,
    make_scores,
    make_served,
    results_of,
)
from internjax.chain.tuning import TuneConfig
from internjax.data.executor import DataConfig
from internjax.data.identity import Identity
from internjax.errors import GateFailed, Missing, UserError
from internjax.evals.core import Results
from internjax.evals.tasks import load_samples, load_task
from internjax.lineage import Artefact, sweep, verify_chain
from internjax.serve.engine import EngineConfig

log = logging.getLogger(__name__)

# Seconds a stage may take on two quiet cores with an empty store; printed beside the real ones.
BUDGET_SECONDS = {
    "data": 40,
    "pretrain": 90,
    "base scores": 90,
    "tune": 180,
    "tuned scores": 75,
    "quantize": 15,
    "quantized scores": 75,
    "serve": 60,
    "agent": 120,
}


@dataclass(frozen=True)
class ChainConfig:
    """The whole chain; each key is explained in configs/chain.yaml.

    Fields:
      model: the base; models: candidates, of which the best by retention text becomes the base.
      pages: folder of Markdown pages that are rendered, spoiled and cleaned as the corpus; ""
        takes the project's own guide.
      identity: who the model is to become; samples: chats generated for it.
      tune: "always", or "auto": only when the gate does not pass without.
      strength: share of the trained adapter that is merged into the base.
      max_rounds: attempts at tuning before the chain gives up.
      runs: folder of the store and of the reports.
    """

    model: str = "smollm2-135m-instruct"
    models: tuple[str, ...] = ()
    pages: str = ""
    identity: Identity = field(default_factory=Identity)
    samples: int = 300
    tune: Literal["always", "auto"] = "always"
    strength: float = 0.7
    max_rounds: int = 2
    seed: int = 0
    tools: tuple[str, ...] = ("calculator", "python")
    runs: str = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    tuning: TuneConfig = field(default_factory=TuneConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    quantize: QuantConfig = field(default_factory=QuantConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(context=1024))
    load: LoadConfig = field(default_factory=LoadConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)

    def __post_init__(self):
        if self.max_rounds < 1:
            raise UserError(f"max_rounds={self.max_rounds}: the chain tunes at least once.")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength}: it is a share, above 0 and at most 1.")


@dataclass(frozen=True)
class Attempt:
    """How a round tunes.

    Fields:
      rounds: the updates, in multiples of the first round's.
      strength: share of the adapter that is merged. Weights between the base's and the tuned
        model's keep what both know (WiSE-FT, arXiv:2109.01903).
    """

    rounds: int = 1
    strength: float = 1.0

    def tuning(self, cfg: TuneConfig) -> TuneConfig:
        """The first round's settings, with this round's updates."""
        run = dataclasses.replace(cfg.run, steps=cfg.run.steps * self.rounds)
        return dataclasses.replace(cfg, run=run)

    def after(self, checks: list[Check]) -> "Attempt":
        """The next round: more updates where too little was learned, else less of the adapter."""
        learned = all(check.ok for check in checks if check.name == "identity")
        if not learned:
            return dataclasses.replace(self, rounds=self.rounds + 1)
        return dataclasses.replace(self, strength=self.strength * 0.75)


@dataclass
class Stage:
    """One line of the report: what ran, whether it held, how long, and its artefact."""

    name: str
    ok: bool
    seconds: float
    metrics: dict[str, Any]
    artefact: Artefact | None = None
    reused: bool = False
    why: str = ""


@dataclass
class Record:
    """Everything a report is made of; filled as the chain runs.

    Fields:
      stages: in order; checks: of the gates by name; scores: results by name of the scored model.
      error: why the chain stopped; "" when it did not.
    """

    cfg: ChainConfig
    started: datetime
    stages: list[Stage] = field(default_factory=list)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    scores: dict[str, Results] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the whole chain held."""
        return not self.error and all(stage.ok for stage in self.stages)

    def artefact(self, name: str) -> Artefact | None:
        """The artefact of the last stage of that name."""
        found = [s.artefact for s in self.stages if s.name == name and s.artefact]
        return found[-1] if found else None


type Tell = Callable[[str, Stage | None], None]
"""Called with a stage's name and None when it begins, with its record when it has ended."""


def run_chain(cfg: ChainConfig, *, tell: Tell = lambda name, stage: None) -> Record:
    """Runs every stage; a failed gate ends the chain and stands in the record, not as an exception.

    Raises:
      UserError: a bad setting, a missing file: nothing that a report could tell better.
    """
    return _Run(cfg, tell).go()


class _Run:
    """The state of one run: the record so far and where its stages work."""

    def __init__(self, cfg: ChainConfig, tell: Tell):
        self.cfg, self.tell = cfg, tell
        self.shop = Workshop(cfg.runs)
        self.record = Record(cfg, datetime.now().astimezone())
        sweep(self.shop.store)

    def go(self) -> Record:
        """Runs to the end or to the first gate that fails."""
        try:
            self.deploy(self.adapt(self.pretrain(self.choose())))
            verify_chain([s.artefact.card for s in self.record.stages if s.artefact])
        except GateFailed as error:
            self.record.error = str(error)
        return self.record

    def stage(
        self, name: str, make: Callable[[], Artefact], show: tuple[str, ...] = ()
    ) -> Artefact:
        """Runs one stage and keeps its line for the report; `show` names metrics of the table."""
        self.tell(name, None)
        begin = time.perf_counter()
        try:
            artefact = make()
        except GateFailed as error:
            stage = Stage(name, False, time.perf_counter() - begin, {}, why=str(error))
            self.record.stages.append(stage)
            self.tell(name, stage)
            raise
        metrics = {key: artefact.metrics[key] for key in show if key in artefact.metrics}
        seconds = time.perf_counter() - begin
        stage = Stage(name, True, seconds, metrics, artefact, artefact.reused)
        self.record.stages.append(stage)
        self.tell(name, stage)
        return artefact

    def judge(self, name: str, checks: list[Check]) -> bool:
        """Keeps the verdict of a gate as a line of its own; tells whether it passed."""
        self.record.checks[name] = checks
        ok = passed(checks)
        stage = Stage(name, ok, 0.0, {c.name: c.told for c in checks}, why=reasons(checks))
        self.record.stages.append(stage)
        self.tell(name, stage)
        return ok

    def choose(self) -> Artefact:
        """Returns the base model; with several candidates the best on the retention texts."""
        names = self.cfg.models or (self.cfg.model,)
        found = {
            name: self.stage(f"import {name}", lambda name=name: make_native(self.shop, name))
            for name in names
        }
        if len(names) == 1:
            self.scores("base", found[names[0]])
            return found[names[0]]
        scores = {name: self.scores(name, found[name]) for name in names}
        bits = {name: results.score("retention_text").value for name, results in scores.items()}
        best = min(bits, key=bits.__getitem__)
        self.record.scores["base"] = scores[best]
        stage = Stage("choice of base", True, 0.0, {"chosen": best, "bits_per_byte": bits})
        self.record.stages.append(stage)
        self.tell(stage.name, stage)
        return found[best]

    def scores(self, name: str, model: Artefact, *, kv_dtype: str = "") -> Results:
        engine = self.cfg.engine
        if kv_dtype:
            engine = dataclasses.replace(engine, kv_dtype=kv_dtype)
        extra = tuple(task for task in self.cfg.scores.extra if _at_hand(task))
        make = lambda: make_scores(  # noqa: E731
            self.shop, model, self.cfg.identity, self.cfg.scores, engine, extra
        )
        shown = ("identity/identity", "retention_text/bits_per_byte", "retention_choices/acc")
        results = results_of(self.stage(f"{name} scores", make, shown))
        self.record.scores[name] = results
        return results

    def pretrain(self, chosen: Artefact) -> Artefact:
        """Makes the corpus and goes on with the model's training on it."""
        cfg, shop = self.cfg, self.shop
        pages = find_pages(cfg.pages)
        data = self.stage(
            "data",
            lambda: make_data(shop, pages, cfg.data, chosen),
            ("train_tokens", "heldout_tokens", "plants_found"),
        )
        return self.stage(
            "pretrain",
            lambda: make_pretrained(shop, chosen, data, cfg.pretrain),
            ("heldout_bits_per_byte_before", "heldout_bits_per_byte_after", "tokens_per_second"),
        )

    def adapt(self, base: Artefact) -> Artefact:
        """Tunes and quantizes until every gate passes or the rounds are used up."""
        cfg, before = self.cfg, self.record.scores["base"]
        if cfg.tune == "auto":
            checks = gate(before, self.scores("untuned", base), cfg.gate)
            if self.judge("gate without tuning", checks):
                small, checks = self.quantize(base)
                if passed(checks):
                    return small
            self.record.stages[-1].ok = True  # tuning is the answer to this verdict
        chats = self.stage(
            "chats", lambda: make_chats(self.shop, cfg.identity, cfg.samples, cfg.seed)
        )
        attempt = Attempt(strength=cfg.strength)
        for number in range(1, cfg.max_rounds + 1):
            mark = "" if number == 1 else f" (round {number})"
            model, checks = self.tune(base, chats, attempt, mark)
            if passed(checks):
                model, checks = self.quantize(model, mark)
            if passed(checks):
                return model
            attempt = attempt.after(checks)
            # A failed round is not a failed chain while rounds are left.
            self.record.stages[-1].ok = number < cfg.max_rounds
        raise GateFailed(
            f"the model may not go online after {cfg.max_rounds} rounds: {reasons(checks)}."
            " Raise chain.max_rounds, chain.tuning.run.steps or chain.samples, or lower"
            " chain.strength."
        )

    def tune(
        self, base: Artefact, chats: Artefact, attempt: "Attempt", mark: str
    ) -> tuple[Artefact, list[Check]]:
        """One attempt at tuning, and what the gate says of it."""
        tuning = attempt.tuning(self.cfg.tuning)
        adapter = self.stage(
            f"tune{mark}",
            lambda: make_adapter(self.shop, base, chats, tuning),
            ("steps", "trained_tokens", "tokens_per_second"),
        )
        model = self.stage(
            f"merge{mark}",
            lambda: make_merged(self.shop, base, adapter, attempt.strength),
            ("strength",),
        )
        results = self.scores(f"tuned{mark}", model)
        self.record.scores["tuned"] = results
        checks = gate(self.record.scores["base"], results, self.cfg.gate)
        self.judge(f"gate{mark}", checks)
        return model, checks

    def quantize(self, model: Artefact, mark: str = "") -> tuple[Artefact, list[Check]]:
        """Rounds to int4 and puts the result through the same gate, with an int8 cache."""
        small = self.stage(
            f"quantize{mark}",
            lambda: make_quantized(self.shop, model, self.cfg.quantize),
            ("bytes_before", "bytes"),
        )
        results = self.scores(f"quantized{mark}", small, kv_dtype="int8")
        self.record.scores["quantized"] = results
        checks = gate(self.record.scores["base"], results, self.cfg.gate)
        self.judge(f"gate quantized{mark}", checks)
        return small, checks

    def deploy(self, model: Artefact) -> None:
        """Serves, asks the endpoint what was asked of the model, and lets it use tools."""
        cfg = self.cfg
        engine = dataclasses.replace(cfg.engine, kv_dtype="int8")
        served = self.stage(
            "serve",
            lambda: make_served(self.shop, model, cfg.identity, engine, cfg.load),
            ("max_in_flight", "tokens_per_second_one", "tokens_per_second_all", "speedup"),
        )
        endpoint = results_of(served)
        self.record.scores["endpoint"] = endpoint
        if not self.judge("gate online", [knows_itself(endpoint, cfg.gate)]):
            raise GateFailed(
                f"the deployed endpoint fails: {reasons(self.record.checks['gate online'])}."
            )
        if not cfg.tools:
            return
        agent_cfg = dataclasses.replace(cfg.agent, tools=cfg.tools)
        agent = self.stage(
            "agent",
            lambda: make_agent(self.shop, model, engine, agent_cfg),
            ("bare_right", *(f"{p}_right" for p in agent_cfg.policies), "sums"),
        )
        for policy in agent_cfg.policies:
            right = agent.metrics[f"{policy}_right"]
            if right < agent_cfg.least_right:
                self.record.stages[-1].ok = False
                raise GateFailed(
                    f"with tools ({policy}) {right} of {agent_cfg.sums} sums are right,"
                    f" {agent_cfg.least_right} asked."
                )


def find_pages(given: str) -> Path:
    """Returns the folder of Markdown pages: the given one, or the guide of this checkout."""
    folder = Path(given) if given else Path(internjax.__file__).parents[1] / "docs" / "en"
    if not folder.is_dir():
        raise Missing(
            f"{folder}: no such folder. chain.pages= names a folder of Markdown pages; the guide"
            " itself is part of a checkout, not of the installed package."
        )
    return folder


def _at_hand(task: str) -> bool:
    """Whether the mirror has a task's rows; without a mirror none is, and nothing is downloaded."""
    if not os.environ.get("INTERNJAX_MIRROR"):
        return False
    try:
        load_samples(load_task(task), 1)
    except Missing:
        return False
    return True


def summary(record: Record) -> Mapping[str, Any]:
    """Returns the record as plain values: report.json."""
    return {
        "ok": record.ok,
        "error": record.error,
        "started": record.started.isoformat(timespec="seconds"),
        "seconds": sum(stage.seconds for stage in record.stages),
        "stages": [
            {
                "name": stage.name,
                "ok": stage.ok,
                "seconds": stage.seconds,
                "reused": stage.reused,
                "metrics": stage.metrics | (stage.artefact.metrics if stage.artefact else {}),
                "artefact": stage.artefact.key if stage.artefact else None,
            }
            for stage in record.stages
        ],
    }
