"""Traces as for a device that is not here."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

H100 = "NVIDIA H100 80GB HBM3"


def on(kind: str, sizes: tuple[int, ...] = (), axis: AxisType = AxisType.Auto):
    """Gives a context in which `platform.target` sees a device of that kind, or a mesh of them."""
    platform = "cpu" if kind == "cpu" else "gpu"
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    names = tuple("xyz"[: len(sizes)])
    mesh = AbstractMesh(sizes, names, axis_types=(axis,) * len(sizes), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
