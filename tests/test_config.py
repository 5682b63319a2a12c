"""`build`: mappings become frozen dataclasses, and every mistake is answered with its full path."""

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, strategies as st
from omegaconf import OmegaConf

from internjax.errors import UserError
from internjax.experiments.config import build, legal_paths, nearest


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Optim:
    lr: float
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Stage:
    optim: Optim
    name: str = "x"
    on: bool = True
    colour: Colour = Colour.RED
    kind: Literal["cosine", "linear", 3] = "cosine"
    limit: int | None = None
    model: str | int = "m"
    folder: Path = Path("runs")
    files: tuple[str, ...] = ()
    stages: tuple[Optim, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    groups: dict[str, Optim] = field(default_factory=dict)
    extra: Any = None
    second: Optim | None = None


def test_builds_nested_and_hashable():
    raw = {
        "optim": {"lr": 1, "betas": [0.5, 0.6]},
        "files": ["a", "b"],
        "stages": [{"lr": 2.0}],
        "weights": {"en": 1},
        "groups": {"first": {"lr": 3.0}},
        "folder": "there",
        "colour": "blue",
        "limit": 1e4,
        "extra": [1, [2]],
    }
    stage = build(Stage, raw)
    assert stage.optim == Optim(1.0, 10, (0.5, 0.6))
    assert isinstance(stage.optim.lr, float)
    assert stage.files == ("a", "b")
    assert stage.stages == (Optim(2.0),)
    assert stage.weights == {"en": 1.0}
    assert stage.groups == {"first": Optim(3.0)}
    assert stage.folder == Path("there")
    assert stage.colour is Colour.BLUE
    assert stage.limit == 10_000
    assert isinstance(stage.limit, int)
    assert stage.extra == (1, (2,))
    assert hash(stage.optim) == hash(Optim(1.0, 10, (0.5, 0.6)))
    assert raw["files"] == ["a", "b"]  # the argument is not written to


def test_takes_hydra_configs_and_resolves_them():
    raw = OmegaConf.create({"optim": {"lr": 0.1}, "name": "n-${optim.lr}", "second": None})
    stage = build(Stage, raw)
    assert (stage.name, stage.second) == ("n-0.1", None)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"optim": {"lrr": 1}}, "no key optim.lrr: did you mean optim.lr?"),
        ({"optin": {"lr": 1}}, "no key optin: did you mean optim?"),
        ({"optim": {"lr": 1}, "warmup_steps": 3}, "did you mean optim.warmup_steps?"),
        ({"optim": {"lr": 1}, "zzzz": 3}, "the keys here are optim, name, on"),
        ({"stages": [{"learning": 1}], "optim": {"lr": 1}}, "no key stages[0].learning"),
        ({}, "optim has no default: give it as optim=VALUE"),
        ({"optim": {}}, "optim.lr has no default: give it as optim.lr=VALUE (a number)"),
        ({"optim": {"lr": "???"}}, "optim.lr has no default"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast' is not a number"),
        ({"optim": {"lr": True}}, "optim.lr=True is not a number"),
        ({"optim": {"lr": None}}, "optim.lr=null is not a number"),
        ({"optim": 3}, "optim=3 is not a group of keys"),
        ({"optim": {"lr": 1, "warmup_steps": 1.5}}, "warmup_steps=1.5 is not a whole number"),
        ({"optim": {"lr": 1, "warmup_steps": True}}, "warmup_steps=True is not a whole number"),
        ({"optim": {"lr": 1, "betas": [0.9]}}, "optim.betas=[0.9] is not a list of 2 values"),
        ({"optim": {"lr": 1, "betas": [0.9, "b"]}}, "optim.betas[1]='b' is not a number"),
        ({"optim": {"lr": 1}, "name": 5}, "name=5 is not a text. Quote it: name='\"5\"'"),
        ({"optim": {"lr": 1}, "on": "yes"}, "on='yes' is not true or false"),
        ({"optim": {"lr": 1}, "colour": "green"}, "colour='green' is not one of RED, BLUE"),
        ({"optim": {"lr": 1}, "kind": "step"}, "kind='step' is not one of cosine, linear, 3"),
        ({"optim": {"lr": 1}, "kind": True}, "kind=True is not one of"),
        ({"optim": {"lr": 1}, "limit": "x"}, "limit='x' is not a whole number"),
        ({"optim": {"lr": 1}, "model": 1.5}, "model=1.5 is not a text or a whole number"),
        ({"optim": {"lr": 1}, "files": "a"}, "files='a' is not a list, each a text"),
        ({"optim": {"lr": 1}, "weights": [1]}, "weights=[1] is not a group of keys"),
        ({"optim": {"lr": 1}, "weights": {"en": "x"}}, "weights.en='x' is not a number"),
        ({"optim": {"lr": 1}, "groups": {"a": {"l": 1}}}, "no key groups.a.l"),
    ],
)
def test_a_mistake_is_answered_with_path_and_remedy(raw, message):
    with pytest.raises(UserError) as caught:
        build(Stage, raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_records_own_check_gets_its_path():
    @dataclass(frozen=True)
    class Part:
        steps: int

        def __post_init__(self):
            if self.steps < 1:
                raise ValueError(f"steps={self.steps} must be positive")

    @dataclass(frozen=True)
    class Whole:
        part: Part

    with pytest.raises(UserError, match=r"^part\.steps=0 must be positive$"):
        build(Whole, {"part": {"steps": 0}})


def test_legal_paths_names_every_key():
    paths = legal_paths(Stage)
    assert {"optim", "optim.lr", "second.betas", "weights", "stages.lr"} <= set(paths)


def test_nearest_prefers_the_same_last_part():
    legal = ["optim.lr", "optim.warmup_steps", "model", "data.folder"]
    assert nearest("lr", legal) == "optim.lr"
    assert nearest("optm.lr", legal) == "optim.lr"
    assert nearest("modle", legal) == "model"
    assert nearest("qqqq", legal) is None
    assert nearest("x", []) is None


@given(
    st.floats(allow_nan=False),
    st.integers(min_value=-(10**6), max_value=10**6),
    st.text(),
    st.lists(st.text(), max_size=3),
)
def test_what_is_legal_comes_back_unchanged(lr, steps, name, files):
    if name == "???" or "???" in files:
        return  # OmegaConf's mark for "no value"
    raw = {"optim": {"lr": lr, "warmup_steps": steps}, "name": name, "files": files}
    stage = build(Stage, raw)
    assert (stage.optim.lr, stage.optim.warmup_steps, stage.name) == (lr, steps, name)
    assert stage.files == tuple(files)
