"""Where parameters and batches lie: on one device as they are, or on a mesh by the one table.

`with placement(cfg) as place:` is all that a training program knows of devices.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.mesh import MeshConfig, ShardingRules, make_mesh
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.params import param_shardings
from internjax.tree import Params


@dataclass(frozen=True)
class Placement:
    """A mesh and its rules; both None for one device, where nothing is moved."""

    mesh: Mesh | None = None
    rules: ShardingRules | None = None

    @property
    def batch_ways(self) -> int:
        """Parts into which the rows of a batch are cut."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in self.rules.batch)

    def check_rows(self, batch_size: int, micro_batches: int) -> None:
        """Refuses a batch whose parts do not give every device as many rows."""
        if batch_size % (micro_batches * self.batch_ways):
            raise UserError(
                f"batch_size={batch_size} is not a multiple of micro_batches={micro_batches} times"
                f" the {self.batch_ways} devices of mesh.data and mesh.fsdp: every device must get"
                " as many rows."
            )

    def params(self, params: Params, cfg: ModelConfig) -> Params:
        """Lays out a whole model."""
        if self.mesh is None:
            return params
        return jax.device_put(params, param_shardings(param_table(cfg), self.mesh, self.rules))

    def batch(self, batch: Batch) -> Batch:
        """Lays out a batch by rows."""
        if self.mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, self.rules.spec("batch", "length")))


ONE_DEVICE = Placement()


@contextmanager
def placement(cfg: MeshConfig) -> Iterator[Placement]:
    """Yields the placement of `cfg`, its mesh in use while the block runs.

    Raises: UserError when more devices are asked than there are.
    """
    if math.prod(astuple(cfg)) == 1:
        yield ONE_DEVICE
        return
    mesh = make_mesh(cfg)
    with jax.set_mesh(mesh):
        yield Placement(mesh, ShardingRules())
