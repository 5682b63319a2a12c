"""Where parameters and batches lie: on one device as they are, or on a mesh by the one table.

`with placement(cfg) as place:` is all that a training program knows of devices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from internjax.collectives import ALONE, Parallel, parallel_of
from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.mesh import MeshConfig, make_mesh, rules_at_rest, rules_in_use
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.params import ParamSpec, check_table, cut_layers, cut_table, param_specs
from internjax.train.gradients import Gradients, Layout, Parts, make_gradients, make_parts
from internjax.train.losses import Stages
from internjax.train.pipeline import make_pipeline_gradients, make_pipeline_parts, make_schedule
from internjax.train.state import TrainState, init_state
from internjax.tree import Params, unflatten


@dataclass(frozen=True)
class Placement:
    """A mesh and how the work is cut on it; no mesh for one device, where nothing is moved."""

    cfg: MeshConfig = MeshConfig()
    mesh: Mesh | None = None

    @property
    def par(self) -> Parallel:
        """What the model's code has to say to other devices."""
        return ALONE if self.mesh is None else parallel_of(self.cfg)

    @property
    def rows_spec(self):
        """Where the rows and positions of a batch lie."""
        return rules_at_rest(self.cfg).spec("batch", "length")

    def check(self, model: ModelConfig, batch_size: int, length: int, micro_batches: int) -> None:
        """Refuses sizes that the mesh does not cut evenly, with the numbers."""
        cfg = self.cfg
        if self.mesh is not None:
            check_table(self.table(model), self.mesh, rules_at_rest(cfg))
        if cfg.pipe > 1:
            make_schedule(cfg, micro_batches)
        ways = micro_batches * cfg.row_ways
        if batch_size % ways:
            raise UserError(
                f"batch_size={batch_size} is not a multiple of micro_batches={micro_batches} times"
                f" the {cfg.row_ways} parts of mesh.data and mesh.expert: every device must get as"
                " many rows."
            )
        shares = cfg.tensor * cfg.context
        if cfg.context > 1 and cfg.context_mode == "ulysses" and model.num_kv_heads % shares:
            raise UserError(
                f"{model.name}: {model.num_kv_heads} KV heads ({model.num_heads} heads) cannot be"
                f" shared out over mesh.context={cfg.context} times mesh.tensor={cfg.tensor}"
                " devices, as mesh.context_mode=ulysses does: choose ring, or smaller ways."
            )
        cuts = cfg.tensor * cfg.context * (2 if cfg.context > 1 else 1)
        if length % cuts:
            raise UserError(
                f"length={length} is not a multiple of {cuts}: mesh.tensor={cfg.tensor} and"
                f" mesh.context={cfg.context} cut every row (context twice, to share out the work)."
            )

    def table(self, model: ModelConfig) -> dict[str, ParamSpec]:
        """The model's weights in the shapes that the mesh wants."""
        return cut_table(param_table(model), self.cfg.chunks)

    def layout(self, model: ModelConfig) -> Layout | None:
        """Where a whole model and its gradients lie."""
        if self.mesh is None:
            return None
        table, zero = self.table(model), self.cfg.zero
        return Layout(
            self.mesh,
            rest=param_specs(table, rules_at_rest(self.cfg)),
            use=param_specs(table, rules_in_use(self.cfg)),
            batch=self.rows_spec,
            scatter_each=zero == 2,
        )

    def params(self, params: Params, model: ModelConfig) -> Params:
        """Lays out a whole model."""
        layout = self.layout(model)
        if layout is None:
            return params
        put = lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec))  # noqa: E731
        return jax.tree.map(put, cut_layers(params, self.cfg.chunks), layout.rest)

    def joined(self, params: Params) -> Params:
        """Returns laid-out parameters (or their gradients) with layers as `[L, ...]` again."""
        if self.cfg.chunks == 1:
            return params

        def join(x: jax.Array) -> jax.Array:
            rest = jax.typeof(x).sharding.spec[2:]
            x = jax.reshard(x, P(None, None, *rest))  # layers of a stage are not neighbours
            return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=P(None, *rest))

        return {**params, "layers": jax.tree.map(join, params["layers"])}

    def whole(self, params: Params) -> Params:
        """Returns laid-out parameters as every process can read them, layers joined."""
        params = self.joined(params)
        if jax.process_count() == 1:
            return params
        return multihost_utils.process_allgather(params, tiled=True)

    def gradients(self, stages: Stages, **options: Any) -> Gradients:
        """Makes the gradients of a model's loss; options as in `make_gradients`."""
        layout = self.layout(stages.model)
        if self.cfg.pipe > 1:
            return make_pipeline_gradients(stages, self.cfg, layout, **options)
        return make_gradients(stages.whole, layout=layout, **options)

    def parts(self, stages: Stages, **options: Any) -> Callable[[Params, Batch, Any], Parts]:
        """Makes the sums of a model's loss, without gradients."""
        layout = self.layout(stages.model)
        if self.cfg.pipe > 1:
            return make_pipeline_parts(stages, self.cfg, layout, **options)
        return make_parts(stages.whole, layout=layout, **options)

    def batch(self, batch: Batch) -> Batch:
        """Lays out a batch by rows and length."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        order = balanced_order(batch.tokens.shape[1], self.cfg.context)
        place = NamedSharding(self.mesh, self.rows_spec)

        def put(rows: Any) -> jax.Array:
            rows = np.ascontiguousarray(np.asarray(rows)[:, order])
            return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])

        return jax.tree.map(put, batch)

    def abstract_params(self, model: ModelConfig, dtype=jnp.float32) -> Params:
        """Shapes and places of a model's parameters at rest, for compiling without any."""
        layout, table = self.layout(model), self.table(model)
        shapes = unflatten({p: jax.ShapeDtypeStruct(s.shape, dtype) for p, s in table.items()})
        if layout is None:
            return shapes
        place = lambda s, spec: s.update(sharding=NamedSharding(self.mesh, spec))  # noqa: E731
        return jax.tree.map(place, shapes, layout.rest)

    def abstract_inputs(
        self, model: ModelConfig, tx: optax.GradientTransformation, batch_size: int, length: int
    ) -> tuple[TrainState, Batch]:
        """Shapes and places of a training step's arguments, to lower it without any array."""
        state = jax.eval_shape(lambda p: init_state(p, tx), self.abstract_params(model))
        return state, self.abstract_batch(batch_size, length)

    def abstract_batch(self, batch_size: int, length: int) -> Batch:
        """Shapes and places of a batch."""
        place = None if self.mesh is None else NamedSharding(self.mesh, self.rows_spec)
        field = lambda dtype: jax.ShapeDtypeStruct((batch_size, length), dtype, sharding=place)  # noqa: E731
        i32 = jnp.int32
        return Batch(field(i32), field(i32), field(i32), field(i32), field(jnp.float32))


ONE_DEVICE = Placement()


def balanced_order(length: int, ways: int) -> np.ndarray:
    """Order of positions in which `ways` equal parts have the same causal work.

    A row is cut into 2 n pieces; part i gets pieces i and 2 n - 1 - i, as in zigzag attention.
    """
    if ways == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * ways, -1)
    return np.concatenate([pieces[[i, 2 * ways - 1 - i]].reshape(-1) for i in range(ways)])


@contextmanager
def placement(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Iterator[Placement]:
    """Yields the placement of `cfg`, its mesh in use while the block runs.

    Raises: UserError when more devices are asked than there are.
    """
    cfg = cfg.resolve(len(jax.devices() if devices is None else devices))
    if cfg.num_devices == 1 and devices is None:
        yield ONE_DEVICE
        return
    mesh = make_mesh(cfg, devices)
    with jax.set_mesh(mesh):
        yield Placement(cfg, mesh)
