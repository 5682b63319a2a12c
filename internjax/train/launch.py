"""From one command on many hosts to one JAX program: who am I, start, and what if a peer dies.

`detect` reads the environment of Slurm, Open MPI, Kubernetes indexed jobs and torchrun-like
launchers. A worker runs below `supervise`, which says in one line how it ended and may start it
again: nothing inside a process survives JAX's own abort when the coordinator is gone.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from internjax.errors import UserError
from internjax.train.watch import EXIT_AGAIN

# A dead peer is noticed by its closed connections at once, by its missing heartbeats after this.
HEARTBEAT_SECONDS = 30
PAUSE_SECONDS = 5  # before a worker starts again: the others must have noticed, or be told by it
WORKER = "INTERNJAX_WORKER"  # set in a process that runs below `supervise`


@dataclass(frozen=True)
class LaunchInfo:
    """This process among all of a run.

    Fields:
      found: the launcher whose variables told it.
      coordinator: HOST:PORT of process 0; num_processes, process_id: of the whole run.
      local_id: place among the processes of this host, None if it has the host to itself.
    """

    found: str
    coordinator: str
    num_processes: int
    process_id: int
    local_id: int | None = None


def detect(env: Mapping[str, str]) -> LaunchInfo | None:
    """Returns what the environment says of a run of several processes; None for a single one.

    The first that speaks counts: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; torchrun's RANK, WORLD_SIZE, MASTER_ADDR; a Slurm step; Open MPI; a Kubernetes
    indexed job.

    Raises:
      UserError: a launcher is there but does not say enough; tells which variable to set.
    """
    for read in (_explicit, _torchrun, _slurm, _open_mpi, _kubernetes):
        info = read(env)
        if info is not None:
            if not 0 <= info.process_id < info.num_processes:
                raise UserError(
                    f"{info.found}: process {info.process_id} of {info.num_processes}: processes"
                    f" are numbered from 0 to {info.num_processes - 1}."
                )
            return info if info.num_processes > 1 else None
    return None


def _explicit(env: Mapping[str, str]) -> LaunchInfo | None:
    if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= env.keys():
        return None
    count, number = _int(env, "JAX_NUM_PROCESSES"), _int(env, "JAX_PROCESS_ID")
    address = _need(env, "JAX_COORDINATOR_ADDRESS", "HOST:PORT of process 0")
    return LaunchInfo("JAX_PROCESS_ID", address, count, number)


def _torchrun(env: Mapping[str, str]) -> LaunchInfo | None:
    if not {"RANK", "WORLD_SIZE"} <= env.keys():
        return None
    count = _int(env, "WORLD_SIZE")
    host = _need(env, "MASTER_ADDR", "the host of rank 0")
    # torchrun's own store listens at MASTER_PORT.
    port = _int(env, "MASTER_PORT", default=29500) + 1
    local = _shared(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return LaunchInfo("torchrun", f"{host}:{port}", count, _int(env, "RANK"), local)


def _slurm(env: Mapping[str, str]) -> LaunchInfo | None:
    # Of a step (srun) only: a batch script's own shell has SLURM_PROCID, too.
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= env.keys():
        return None
    nodes = _need(env, "SLURM_STEP_NODELIST", "the nodes of the step")
    port = 61440 + _int(env, "SLURM_JOB_ID") % 4096  # its own for every job of a host
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8(x2),4
    local = (
        _int(env, "SLURM_LOCALID")
        if set(re.findall(r"(\d+)(?:\(x\d+\))?", tasks)) - {"1"}
        else None
    )
    count = _int(env, "SLURM_STEP_NUM_TASKS")
    address = f"{first_host(nodes)}:{port}"
    return LaunchInfo("Slurm", address, count, _int(env, "SLURM_PROCID"), local)


def _open_mpi(env: Mapping[str, str]) -> LaunchInfo | None:
    if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= env.keys():
        return None
    count = _int(env, "OMPI_COMM_WORLD_SIZE")
    local = _shared(env, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    one_host = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(count)
    # Open MPI 4 names the host of mpirun; Open MPI 5 no longer does.
    uri = re.search(r"tcp://([\d.]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if one_host else uri and uri[1])
    if not host:
        raise UserError(
            "Open MPI does not say where rank 0 runs: start with `mpirun -x MASTER_ADDR=HOST ...`,"
            " HOST being the first host."
        )
    port = _int(env, "MASTER_PORT", default=29500) + 1
    rank = _int(env, "OMPI_COMM_WORLD_RANK")
    return LaunchInfo("Open MPI", f"{host}:{port}", count, rank, local)


def _kubernetes(env: Mapping[str, str]) -> LaunchInfo | None:
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys():
        return None
    count = int(_need(env, "JAX_NUM_PROCESSES", "the job's `completions`"))
    index = _int(env, "JOB_COMPLETION_INDEX")
    # Pods of an indexed job are called JOB-INDEX; a headless service makes JOB-0.SERVICE a name.
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        job = env.get("HOSTNAME", "").removesuffix(f"-{index}")
        service = _need(env, "JOB_SERVICE", "the job's headless service (its `subdomain`)")
        address = f"{job}-0.{service}:55527"
    return LaunchInfo("Kubernetes", address, count, index)


def first_host(nodes: str) -> str:
    """Returns the first host of a Slurm list: `a[003-007,9],b1` is a003, `x,y[1-2]` is x."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} is no list of hosts.")
    return match[1] + (match[2] or "") + (match[3] or "")


def _shared(env: Mapping[str, str], number: str, size: str) -> int | None:
    return _int(env, number) if env.get(size, "1") != "1" else None


def _need(env: Mapping[str, str], name: str, meaning: str) -> str:
    if not env.get(name):
        raise UserError(f"a run of several processes needs {name} in the environment: {meaning}.")
    return env[name]


def _int(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = env.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is no whole number.")
    return int(text)


@contextmanager
def joined(info: LaunchInfo | None, *, timeout_seconds: int = 300) -> Iterator[None]:
    """Makes this process one of the run while the block lasts; to be entered before any device is.

    A process that shares its host takes the GPU of its local number, unless its launcher has
    already left it a single one. When a peer dies, or never comes, the process says so in one line
    and exits with `EXIT_AGAIN`: leaving by an exception would wait for the dead at JAX's farewell.
    """
    if info is None:
        yield
        return
    narrowed = len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    ids = None if info.local_id is None or narrowed else [info.local_id]
    me = f"process {info.process_id} of {info.num_processes} ({info.found})"
    try:
        jax.distributed.initialize(
            info.coordinator,
            info.num_processes,
            info.process_id,
            local_device_ids=ids,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        _leave(
            f"{me} did not meet the others at {info.coordinator} within {timeout_seconds} seconds:"
            f" start all of them and open this port ({_cause(error)})"
        )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _PEER.search(str(error)):
            raise
        _leave(f"{me}: a peer process is gone ({_cause(error)})")


_PEER = re.compile(r"gloo|nccl|unavailable|coordination service|heartbeat", re.IGNORECASE)


def _cause(error: Exception) -> str:
    return str(error).splitlines()[0][:160]


def _leave(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_AGAIN)


def supervise(command: Sequence[str], *, restarts: int = 0) -> int:
    """Runs `command` as a worker and returns its exit code, in one line saying why if not 0.

    A worker that lost its peers, stalled, or was killed is started again up to `restarts` times,
    and goes on from the newest checkpoint; every host's supervisor does so, so the run meets again.
    SIGTERM and SIGINT are handed down: the worker saves and ends.
    """
    for again in range(restarts + 1):
        worker = subprocess.Popen(command, env={**os.environ, WORKER: "1"})
        asked = []

        def hand_down(number: int, _: object, worker=worker, asked=asked) -> None:
            asked.append(number)
            worker.send_signal(number)

        before = {s: signal.signal(s, hand_down) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = worker.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        lost = code == EXIT_AGAIN or code == -signal.SIGABRT
        if asked or not (lost or code == -signal.SIGKILL):
            return code if code >= 0 else 128 - code
        why = "a peer process died" if lost else "the worker was killed (out of memory?)"
        last = again == restarts
        then = "the same command goes on from the newest checkpoint" if last else "starting again"
        print(f"internjax: {why}: {then}.", file=sys.stderr, flush=True)
        time.sleep(0 if last else PAUSE_SECONDS)
    return EXIT_AGAIN


def first_says(value: bool) -> bool:
    """What process 0 found, told to every process: what each sees on its own disk may differ."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def is_worker() -> bool:
    """Whether this process runs below `supervise`, or as a submitit job, which has its own."""
    return bool({WORKER, "SUBMITIT_EXECUTOR"} & os.environ.keys())
