"""What a traced program will run on, and which of a kernel's implementations is taken there.

A kernel's own code for NVIDIA GPUs is for sm_90 only. It is no operation that XLA can cut: it needs
all axes of the mesh to be manual (`shard_map`), or a mesh of one device.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import jax

log = logging.getLogger(__name__)

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # sm_90, as `jax.Device.device_kind` names them
EXTRAS = {"tokamax": "tokamax"}  # implementation -> the extra that installs its package


_readable: ContextVar[bool] = ContextVar("readable", default=False)


@contextmanager
def readable() -> Iterator[None]:
    """Keeps what is traced inside free of opaque kernels, for who counts its FLOPs in HLO.

    A function that was jitted and traced before keeps what it took then: trace a new one.
    """
    token = _readable.set(True)
    try:
        yield
    finally:
        _readable.reset(token)


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Fields:
      platform: "cpu", "gpu" or "tpu"; kind: the device's own name.
      whole: arrays are whole on each device here, so that an opaque kernel may take them.
    """

    platform: str
    kind: str
    whole: bool

    @property
    def hopper(self) -> bool:
        """Whether it is an sm_90 GPU."""
        return self.platform == "gpu" and any(name in self.kind for name in HOPPER)


def target() -> Target:
    """Reads the mesh that is set, else the default device; works while a function is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = all(
        size == 1 or kind == jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    device = mesh.abstract_device
    if device is not None:
        return Target(device.platform, device.device_kind, whole)
    here = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(here, str):
        here = jax.devices(here)[0]
    return Target(here.platform, here.device_kind, whole)


def choose(
    kernel: str, implementation: str | None, legal: Mapping[str, str | None], *, best: str
) -> str:
    """Returns the implementation to take.

    Args:
      kernel: its name, for messages.
      implementation: what the caller wants; None leaves the choice to `best`.
      legal: the implementations there are, each with the reason why it cannot serve this call, or
        None where it can.
      best: what None means here.

    Raises:
      ValueError: for an explicit choice that cannot run.
    """
    if implementation is None:
        _say(kernel, best, target().kind, legal.get("pallas"))
        return best
    if implementation not in legal:
        names = ", ".join(["None", *map(repr, legal)])
        raise ValueError(f"{kernel}: implementation={implementation!r}; legal are {names}.")
    if legal[implementation] is not None:
        raise ValueError(f"{kernel}: implementation={implementation!r}: {legal[implementation]}")
    return implementation


def missing_extra(package: str) -> str | None:
    """Says that an optional package is not installed, or None."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install 'internjax[{EXTRAS[package]}]'."


def not_for_hopper(interpret: object = None) -> str | None:
    """Says why an sm_90 kernel cannot run here, or None; an interpreter runs it anywhere."""
    if interpret:
        return None
    here = target()
    if not here.hopper:
        return (
            f"its code is for sm_90 GPUs ({', '.join(HOPPER)}), this is {here.kind!r}: leave"
            " implementation at None or take 'xla'."
        )
    return not_opaque()


def not_opaque() -> str | None:
    """Says why no kernel that the compiler cannot look into may be taken here, or None."""
    if _readable.get():
        return "the program is compiled to be read, and this kernel's work cannot be read off it."
    if not target().whole:
        return (
            "arrays are cut over the mesh by the compiler here, which cannot cut this kernel: call"
            " it inside a jax.shard_map over all axes, or take 'xla'."
        )
    return None


@cache
def _say(kernel: str, chosen: str, kind: str, why: str | None) -> None:
    """Logs a choice once; on a GPU with the reason why the kernel was not taken.

    Nobody expects a GPU's kernel on a CPU.
    """
    reason = f" (pallas: {why})" if why and chosen != "pallas" and kind != "cpu" else ""
    log.info("%s on %s: %s%s", kernel, kind, chosen, reason)
