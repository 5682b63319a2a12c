"""Launching: who a process is by its environment, and what survivors do when a peer is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internjax.errors import UserError
from internjax.train.launch import LaunchInfo, detect, first_host, supervise
from internjax.train.watch import EXIT_AGAIN
from tests.launching import train_together

ROOT = Path(__file__).resolve().parent.parent

SLURM = {"SLURM_JOB_ID": "5000", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
SLURM |= {"SLURM_LOCALID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
KUBERNETES |= {"HOSTNAME": "run-2", "JAX_NUM_PROCESSES": "4", "JOB_SERVICE": "pods"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "a0", "MASTER_PORT": "1000"}


@pytest.mark.parametrize(
    ("env", "info"),
    [
        ({}, None),
        (SLURM, LaunchInfo("Slurm", "gpu003:62344", 16, 9, 1)),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"},
            LaunchInfo("Slurm", "gpu003:62344", 16, 9, None),
        ),
        ({"SLURM_JOB_ID": "5000", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, None),  # no srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "15.0;tcp://10.96.0.1,10.148.0.1:34911"},
            LaunchInfo("Open MPI", "10.96.0.1:29501", 4, 3, 1),
        ),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            LaunchInfo("Open MPI", "127.0.0.1:29501", 4, 3, 1),
        ),
        (KUBERNETES, LaunchInfo("Kubernetes", "run-0.pods:55527", 4, 2)),
        (TORCHRUN, LaunchInfo("torchrun", "a0:1001", 8, 5, 1)),
        (
            SLURM
            | {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            LaunchInfo("JAX_PROCESS_ID", "h:1", 2, 1),
        ),
    ],
)
def test_a_process_knows_itself_by_its_environment(env, info):
    assert detect(env) == info


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (MPI, "mpirun -x MASTER_ADDR=HOST"),
        ({k: v for k, v in KUBERNETES.items() if k != "JOB_SERVICE"}, "needs JOB_SERVICE"),
        ({k: v for k, v in KUBERNETES.items() if k[:3] != "JAX"}, "needs JAX_NUM_PROCESSES"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "needs MASTER_ADDR"),
        (TORCHRUN | {"RANK": "8"}, "process 8 of 8: processes are numbered from 0 to 7"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment is no whole number"),
    ],
)
def test_a_launcher_that_says_too_little_is_told_what_to_set(env, complaint):
    with pytest.raises(UserError, match=complaint):
        detect(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a[003-007,9],b1", "a003"),
        ("x,y[1-2]", "x"),
        ("n[1,3]m,z", "n1m"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, host: str):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(2)", 2, ""),  # a user's error is not tried again
        (f"raise SystemExit({EXIT_AGAIN})", EXIT_AGAIN, "a peer process died: the same command"),
        ("import os; os.abort()", EXIT_AGAIN, "a peer process died"),
        ("import os; os.kill(os.getpid(), 9)", EXIT_AGAIN, "was killed (out of memory?)"),
    ],
)
def test_a_supervisor_tells_how_its_worker_ended(capfd, program: str, code: int, said: str):
    assert supervise([sys.executable, "-c", program]) == code
    lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith("internjax:")]
    assert len(lines) == bool(said) and said in "".join(lines)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launched(folder: Path, count: int) -> list[subprocess.Popen]:
    folder.mkdir()
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.launching", str(folder), "400", "3"]
    processes = []
    for i in range(count):
        with (folder / f"err{i}").open("w") as errors:
            own = env | {"JAX_PROCESS_ID": str(i)}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stderr=errors))
    return processes


def steps_in(folder: Path) -> list[dict]:
    log = folder / "steps.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition, seconds: float, what: str) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what} took more than {seconds} seconds"
        time.sleep(0.02)
    return time.monotonic() - start


@pytest.mark.parametrize(
    "killed", [1, pytest.param(0, marks=pytest.mark.slow, id="the coordinator")]
)
def test_survivors_notice_a_killed_peer_and_the_run_goes_on_by_itself(tmp_path: Path, killed: int):
    folder = tmp_path / "run"
    processes = launched(folder, 2)
    try:
        wait_for(lambda: len(steps_in(folder)) >= 7, 120, "the first steps")
        before = {i: int((folder / f"worker{i}").read_text()) for i in range(2)}
        os.kill(before[killed], signal.SIGKILL)
        survivor = folder / f"err{1 - killed}"
        line = "internjax: a peer process died: starting again."
        wait_for(lambda: line in survivor.read_text(), 60, "noticing")
        wait_for(
            lambda: all(int((folder / f"worker{i}").read_text()) != before[i] for i in range(2)),
            120,
            "meeting again",
        )
        seen = len(steps_in(folder))
        wait_for(lambda: len(steps_in(folder)) > max(seen, 10), 120, "going on")
        (folder / "STOP").touch()  # seen by one first, obeyed by both after the same step
        assert [p.wait(60) for p in processes] == [3, 3]
    finally:
        for process in processes:
            process.kill()
    stops = {(folder / f"err{i}").read_text().splitlines()[-1].split(" after ")[1] for i in (0, 1)}
    records = steps_in(folder)
    assert stops == {f"step {len(records)} of 400, which is saved; the same command goes on."}
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))  # none lost, none twice
    _, alone = train_together(tmp_path / "alone", len(records))
    # Two processes add the same gradients in another order.
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in alone], rel=1e-5)
