"""The layer rule: a module imports only from layers to its left; checked over the tree's syntax.

import-linter does not see through the mapped package folders, so this is a small reading of every
file's imports, wherever they stand in it. The planted violations are the test of the test.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Left to right: who may be imported by everything after it. One row is one layer.
LAYERS = [
    {"version", "errors", "tree", "mesh", "lineage", "telemetry", "sandbox", "catalog"}
    | {"report"},
    {"collectives"},
    {"kernels"},
    {"weights", "checkpoint"},
    {"models", "data"},
    {"adapt", "train", "plan", "serve"},
    {"evals", "agents"},
    {"chain", "chat"},
    {"experiments", "cli", "interrupts", "usage", "configs"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Beyond the order: pairs of one layer that must not know each other, although order allows it.
STRANGERS = {"adapt": {"train", "plan", "serve"}, "train": {"adapt", "plan", "serve"}}
STRANGERS |= {"plan": {"adapt", "train", "serve"}, "serve": {"adapt", "train", "plan"}}
STRANGERS |= {"evals": {"serve", "agents"}, "agents": {"serve", "evals"}, "data": {"models"}}

HYDRA_HOMES = {"experiments", "cli"}
# Where batches meet devices, and their record; the rest of data is NumPy only.
DATA_WITH_JAX = {"internjax/data/loader.py", "internjax/data/batch.py"}
FOLDERS = ("internjax", "kernels", "experiments", "configs")


def area_of(path: Path) -> str:
    """internjax/data/chat.py -> data; kernels/x.py -> kernels; internjax/tree.py -> tree."""
    parts = path.with_suffix("").parts
    return parts[0] if parts[0] != "internjax" else parts[1]


def imports_of(source: str, path: Path) -> Iterator[str]:
    """Yields every absolute module name that a file imports, also inside functions."""
    package = (
        path.parent.parts if path.parts[0] == "internjax" else ("internjax", *path.parent.parts)
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def violations(root: Path) -> list[str]:
    """Lists what breaks the rule below a tree laid out as this repository."""
    found = []
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    for file in files:
        path = file.relative_to(root)
        here = area_of(path)
        modules = set(imports_of(file.read_text(encoding="utf-8"), path))
        if here != "__init__" and here not in RANK:
            found.append(f"{path}: {here} stands in no layer")
            continue
        for module in sorted(modules):
            top, _, rest = module.partition(".")
            if top in ("hydra", "omegaconf") and here not in HYDRA_HOMES:
                found.append(f"{path}: Hydra ends in experiments/ and cli.py ({module})")
            if top in ("jax", "flax") and here == "data" and str(path) not in DATA_WITH_JAX:
                found.append(f"{path}: data is NumPy only ({module})")
            if top in ("torch", "tensorflow", "transformers"):
                found.append(f"{path}: {top} is no part of the program ({module})")
            area = rest.partition(".")[0]
            if top != "internjax" or here == "__init__" or area not in RANK or area == here:
                continue
            if RANK[area] > RANK[here]:
                found.append(f"{path}: {here} is left of {area} ({module})")
            if area in STRANGERS.get(here, ()):
                found.append(f"{path}: {here} must not know {area} ({module})")
    return sorted(set(found))


def test_the_tree_keeps_the_rule():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("internjax/tree.py", "import internjax.models.decoder", "tree is left of models"),
        ("kernels/attention.py", "from internjax import weights", "kernels is left of weights"),
        ("internjax/data/chat.py", "from internjax.models import lm", "data must not know models"),
        ("internjax/data/chat.py", "from ..models import lm", "data must not know models"),
        ("internjax/data/clean.py", "def f():\n  import jax.numpy", "data is NumPy only"),
        ("internjax/train/loop.py", "import internjax.adapt.lora", "train must not know adapt"),
        ("internjax/serve/engine.py", "from internjax.train import step", "must not know train"),
        ("internjax/agents/loop.py", "from internjax.serve import openai", "must not know serve"),
        ("internjax/evals/run.py", "from internjax.chain import run", "evals is left of chain"),
        ("internjax/models/load.py", "from hydra import compose", "Hydra ends in"),
        ("internjax/train/step.py", "from omegaconf import OmegaConf", "Hydra ends in"),
        ("internjax/models/hf.py", "import torch.nn as nn", "torch is no part of the program"),
        ("internjax/chain.py", "from internjax.experiments import config", "chain is left of"),
        ("internjax/helpers.py", "", "helpers stands in no layer"),
        (
            "internjax/tree.py",
            "import importlib\nimportlib.import_module('internjax.serve.engine')",
            "tree is left of serve",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, source, complaint):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source, encoding="utf-8")
    assert any(complaint in line for line in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("internjax/models/load.py", "from internjax.data import chat\nfrom internjax import tree"),
        ("internjax/data/loader.py", "import jax"),
        ("internjax/__init__.py", "def load():\n  from internjax.models.load import load"),
        ("experiments/tune.py", "import hydra\nfrom internjax.train import loop"),
        ("internjax/chain.py", "from internjax.serve import engine\nimport internjax.kernels.x"),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def test_every_package_folder_is_shipped():
    """An editable install shows folders that a wheel would lack: pyproject must name them all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = set(project["tool"]["setuptools"]["packages"])
    # Folders of data (YAML, jsonl) count too: setuptools takes every folder for a package.
    shipped = ("internjax", "kernels", "experiments", "configs")
    there = {
        ".".join([*(["internjax"] if folder != "internjax" else []), *path.parent.parts])
        for folder in shipped
        for path in (found.relative_to(ROOT) for found in (ROOT / folder).rglob("*.*"))
        if path.suffix in (".py", ".yaml", ".jsonl")
    }
    assert named == there


def test_modules_are_in_a_package():
    """A folder of modules without __init__.py imports here, but is not shipped."""
    folders = {path.parent for path in (ROOT / "internjax").rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()] == []
