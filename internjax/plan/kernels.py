"""Compiles Pallas kernels for GPUs that are not here, and reads what came out of the compiler.

Mosaic GPU writes PTX and the report of ptxas to a folder when MOSAIC_GPU_DUMP_TO names one
(jax/experimental/mosaic/gpu; jaxlib's mosaic/gpu/dump.cc). Needs jax's CUDA plugin, no GPU.
"""

import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.extend
import numpy as np

from internjax.plan.compile import OPTIONS
from internjax.plan.topology import Gpu, topology

DUMP = "MOSAIC_GPU_DUMP_TO"
LAUNCH = "mpmd_map"  # the primitive by which jax launches a Mosaic GPU kernel
WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+\.\w+\.\w+\.\w+)")
TMA_LOAD = re.compile(r"cp\.async\.bulk(?:\.tensor\.\dd|\.prefetch)?\S*\.shared::\w+\.global")
TMA_STORE = re.compile(r"cp\.async\.bulk(?:\.tensor\.\dd)?\.global\.shared::cta")
EXCHANGE = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32 (\d+)")
# In HLO: hash of a kernel, and the operation's name, of which the kernel's is the last but one.
CALL = re.compile(
    r'"mosaic_gpu_v2".*?op_name="[^"]*?([\w.]+)/\w+".*?kernel_hash = "((?:[^"\\]|\\.)*)"'
)
NOTE = re.compile(r"\(C75\d\d\)[^\n]*|C75\d\d[^\n]*")  # ptxas: "Potential Performance Loss"


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel takes of an SM, and which instructions it is made of.

    Fields:
      registers: of a thread, as ptxas allots them before `setmaxnreg` moves them between warps;
        exchanged: what the warpgroups have after that, if they do.
      spill_bytes: stored to and loaded from local memory, of a thread.
      smem_bytes: dynamic shared memory of a block.
      threads: of a block; blocks: of the grid.
      wgmma: by shape and types, how often it stands in the code; tma_loads, tma_stores: likewise.
      notes: performance notes of ptxas.
      ptx: the code, of which the program's positions are the only part that is not the kernel's.
    """

    name: str
    registers: int
    exchanged: tuple[int, ...]
    spill_bytes: int
    smem_bytes: int
    threads: int
    blocks: int
    wgmma: dict[str, int]
    tma_loads: int
    tma_stores: int
    notes: tuple[str, ...]
    ptx: str


@dataclass(frozen=True)
class CompiledKernels:
    """The kernels of a compiled function, and the bytes that XLA takes around them."""

    kernels: tuple[KernelReport, ...]
    temp_bytes: int


_SEEN: dict[str, KernelReport] = {}
"""Reports by the hash of a kernel: one process compiles the same kernel once only."""


def compile_kernels(fn: Callable, args: Sequence[Any], gpu: Gpu) -> CompiledKernels:
    """Compiles `fn` for one GPU and reports each Mosaic kernel in it.

    Args:
      fn: of arrays; its kernels have names of their own.
      args: shapes (trees of jax.ShapeDtypeStruct).
    """
    mesh, placed = _placed(args, gpu)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        before = os.environ.get(DUMP)
        os.environ[DUMP] = folder
        try:
            traced = jax.jit(fn).trace(*placed)
            compiled = traced.lower().compile(compiler_options=OPTIONS)
        finally:
            os.environ.pop(DUMP) if before is None else os.environ.update({DUMP: before})
        new = {kernel.name: kernel for kernel in _reports(Path(folder), traced.jaxpr.jaxpr)}
    kernels = tuple(
        _SEEN.setdefault(key, new[name] if key not in _SEEN else _SEEN[key])
        for name, key in sorted(set(CALL.findall(compiled.as_text())))
    )
    return CompiledKernels(kernels, int(compiled.memory_analysis().temp_size_in_bytes))


def compile_program(
    build: Callable[[], tuple[Callable, Sequence[Any]]], gpu: Gpu
) -> tuple[dict[str, int], int, str]:
    """Compiles a whole program for one GPU, in which kernels are taken as they would be there.

    Args:
      build: gives a function of arrays, its first argument donated, and shapes.

    Returns: Mosaic kernels and how often each is called, XLA's temporary bytes, scheduled HLO.
    """
    with jax.sharding.use_abstract_mesh(_mesh(gpu).abstract_mesh):  # it has nothing to run on
        fn, args = build()
    mesh, placed = _placed(args, gpu)
    with jax.set_mesh(mesh):
        lowered = jax.jit(fn, donate_argnums=0).lower(*placed)
        compiled = lowered.compile(compiler_options=OPTIONS)
    text = compiled.as_text()
    calls = Counter(name for name, _ in CALL.findall(text))
    return dict(calls), int(compiled.memory_analysis().temp_size_in_bytes), text


def _mesh(gpu: Gpu) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(topology(gpu, 1)), ("one",))


def _placed(args: Sequence[Any], gpu: Gpu) -> tuple[jax.sharding.Mesh, tuple]:
    """A mesh of one compile-only GPU, and the shapes on it."""
    mesh = _mesh(gpu)
    here = jax.sharding.NamedSharding(mesh, jax.P())
    return mesh, jax.tree.map(lambda x: x.update(sharding=here), tuple(args))


def launches(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Yields name and number of blocks of every Mosaic GPU kernel in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == LAUNCH:
            mesh = eqn.params["meshes"][0]
            yield eqn.params["name"], math.prod([*mesh.grid, *mesh.cluster])
            continue
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from launches(sub)


def _reports(folder: Path, jaxpr: Any) -> Iterator[KernelReport]:
    grids = dict(launches(jaxpr))
    found = Counter(_name(path) for path in folder.glob("*.ptx"))
    if twice := [name for name, times in found.items() if times > 1]:
        raise ValueError(f"{', '.join(twice)}: kernels that differ need names that differ.")
    for path in sorted(folder.glob("*.ptx")):
        name = _name(path)
        resources = sorted(folder.glob(f"{name}_*.resources.txt"))[0]
        yield report(
            name,
            path.read_text(encoding="utf-8"),
            path.with_suffix(".ptxas").read_text(encoding="utf-8"),
            resources.read_text(encoding="utf-8"),
            grids[name],
        )


def _name(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def report(name: str, ptx: str, ptxas: str, resources: str, blocks: int) -> KernelReport:
    """Reads the three texts that the compiler leaves of a kernel."""
    return KernelReport(
        name=name,
        registers=_number(r"Used (\d+) registers", ptxas),
        exchanged=tuple(sorted({int(n) for _, n in EXCHANGE.findall(ptx)})),
        spill_bytes=_number(r"(\d+) bytes spill stores", ptxas)
        + _number(r"(\d+) bytes spill loads", ptxas),
        smem_bytes=_number(r"smem_scratch_bytes=(\d+)", resources),
        threads=_number(r"\.maxntid (\d+)", ptx),
        blocks=blocks,
        wgmma=dict(Counter(WGMMA.findall(ptx))),
        tma_loads=len(TMA_LOAD.findall(ptx)),
        tma_stores=len(TMA_STORE.findall(ptx)),
        notes=tuple(NOTE.findall(ptxas)),
        ptx=ptx,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"a report of the compiler has nothing like {pattern!r}: {text[:80]}...")
    return int(found[1])
