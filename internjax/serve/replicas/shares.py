"""What of the machine each replica gets: its own cores, its own GPUs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from internjax.errors import UserError

_GPUS = "CUDA_VISIBLE_DEVICES"
_NVIDIA = Path("/proc/driver/nvidia/gpus")


def cores_of(index: int, replicas: int, cores: Sequence[int]) -> tuple[int, ...]:
    """Returns the cores of one replica: neighbours, so that they share caches and memory.

    With fewer cores than replicas nobody has one of his own: all get all.
    """
    if len(cores) < replicas:
        return tuple(cores)
    return tuple(cores[index * len(cores) // replicas : (index + 1) * len(cores) // replicas])


def gpus_of(index: int, replicas: int, gpus: Sequence[str]) -> tuple[str, ...]:
    """Returns the GPUs of one replica; all get as many.

    Raises:
      UserError: they cannot be divided evenly.
    """
    if len(gpus) % replicas:
        raise UserError(
            f"replicas={replicas}: {len(gpus)} GPUs cannot be divided evenly among them; give a "
            f"divisor of {len(gpus)}, or name other GPUs in {_GPUS}."
        )
    each = len(gpus) // replicas
    return tuple(gpus[index * each : (index + 1) * each])


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Lists the NVIDIA GPUs of this process, without loading a driver."""
    named = environ.get(_GPUS)
    if named is not None:
        return tuple(gpu for gpu in named.split(",") if gpu.strip() and gpu.strip() != "-1")
    count = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
    return tuple(str(index) for index in range(count))


def environment(index: int, replicas: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a replica's process."""
    gpus = visible_gpus(environ)
    mine = {_GPUS: ",".join(gpus_of(index, replicas, gpus))} if gpus else {}
    return {**environ, **mine}


def own_cores(index: int, replicas: int) -> tuple[int, ...]:
    """Returns a replica's part of the cores that this process may use; () where none can be set."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return cores_of(index, replicas, sorted(os.sched_getaffinity(0)))
