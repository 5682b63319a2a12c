"""Law: several processes train what one trains, and go on where another number of them stopped."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from internjax.models.decoder import init_params
from internjax.models.native import save_native
from tests.fakes import TINY, byte_tokenizer
from tests.test_chain_pretraining import VOCAB, write_corpus

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 4


def together(command: list[str], processes: int, cwd: Path = ROOT) -> None:
    """Runs a command as this many processes of one run, DEVICES devices in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = (
        f"--xla_force_host_platform_device_count={DEVICES // processes}",
        "--xla_backend_optimization_level=0",
    )
    env = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env | (many | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            cwd=cwd,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)


def train(folder: Path, processes: int, steps: int = 3) -> tuple[dict, dict]:
    """Runs the program and returns its metrics and parameters."""
    folder.mkdir(exist_ok=True)
    together(["-m", "tests.processes", str(folder), str(steps)], processes)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics, dict(np.load(folder / "params.npz"))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_what_one_trains(tmp_path: Path, processes: int):
    metrics, params = train(tmp_path / "one", 1)
    got, many = train(tmp_path / "many", processes)
    # float64: only the order in which sums travel differs.
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-12)
    key = "heldout_bits_per_byte_after"
    assert got[key] == pytest.approx(metrics[key], rel=1e-12)
    for path, want in params.items():
        assert np.linalg.norm(many[path] - want) <= 1e-11 * np.linalg.norm(want), path


@pytest.mark.slow
def test_the_verb_as_two_processes_makes_one_artefact_and_finds_it_again(tmp_path: Path):
    write_corpus(tmp_path / "corpus")
    cfg = replace(TINY, vocab_size=VOCAB)
    save_native(tmp_path / "model", cfg, init_params(cfg, jax.random.key(0)), byte_tokenizer())
    verb = ["-m", "internjax.cli", "pretrain", "model", "shards=corpus", "out=out", "length=48"]
    verb += ["batch_size=8", "run.steps=2", "mesh.data=4", "mesh.zero=1"]
    together(verb, 2, tmp_path)
    card = json.loads((tmp_path / "out/card.json").read_text(encoding="utf-8"))
    assert set(card["inputs"]) == {"model", "train", "heldout"} and card["metrics"]["steps"] == 2
    together(verb, 2, tmp_path)  # nobody waits for a training that nobody else does
    assert json.loads((tmp_path / "out/card.json").read_text(encoding="utf-8")) == card
