"""The same plan on fewer GPUs: the points of weak and strong scaling curves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from internjax.mesh import MeshConfig
from internjax.plan.hlo import Collective, Loop, Program, Step, group_of
from internjax.plan.memory import Work

type Case = tuple[MeshConfig, Work]


def sizes(mesh: MeshConfig, gpus_per_node: int) -> list[int]:
    """Data-parallel ways by halving: from one node, or one copy of the model, up to `mesh`."""
    model = mesh.tensor * mesh.pipe * mesh.context * mesh.expert
    ways = [mesh.data]
    while ways[0] % 2 == 0 and ways[0] // 2 * model >= gpus_per_node:
        ways.insert(0, ways[0] // 2)
    return ways


def resized(mesh: MeshConfig, data: int) -> MeshConfig:
    """The mesh with other data-parallel ways; its ZeRO groups shrink where they must."""
    if data == mesh.data:
        return mesh
    group = 0 if mesh.zero_group in (0, mesh.data) or mesh.zero_group >= data else mesh.zero_group
    return replace(mesh, data=data, zero_group=group)


def weak(mesh: MeshConfig, work: Work, ways: Sequence[int]) -> list[Case]:
    """The same rows for each device at every size."""
    return [
        (resized(mesh, data), replace(work, batch_size=work.batch_size * data // mesh.data))
        for data in ways
    ]


def strong(mesh: MeshConfig, work: Work, ways: Sequence[int]) -> list[Case]:
    """The same global batch at every size, in micro-batches of the same rows."""
    return [
        (resized(mesh, data), replace(work, micro_batches=work.micro_batches * mesh.data // data))
        for data in ways
    ]


def at_size(program: Program, mesh_shape: Mapping[str, int], gpus_per_node: int) -> Program:
    """The program of a weak-scaling curve at another size, without compiling it.

    With the same rows for each device only the groups of the collectives change; their values do
    not, as long as the ZeRO group is the same or is all of the data-parallel devices (but for the
    optimizer's share of memory traffic, which is left as it was).

    Args:
      mesh_shape: mesh axis -> size, outermost first, at the other size.
    """

    def moved(step: Step) -> Step:
        if isinstance(step, Loop):
            return replace(step, body=tuple(moved(inner) for inner in step.body))
        if not isinstance(step, Collective) or step.kind == "collective-permute":
            return step
        group = group_of(step.axes, mesh_shape)
        nodes = len(set(group // gpus_per_node))
        return replace(step, size=len(group), per_node=-(-len(group) // nodes))

    return replace(program, steps=tuple(moved(step) for step in program.steps))
