"""One engine over several devices: where its arrays lie, and the compiler that follows from that.

Tensor parallel as in Megatron-LM (arXiv:1909.08053): heads with their keys and values, feed-forward
columns and the vocabulary are cut; what goes from layer to layer is whole everywhere. No program is
written for it: XLA cuts each after the arrays that it is given, and adds up what devices have in
parts, twice a layer. It cannot cut a kernel, so none is taken here (`kernels.platform.Target`).
"""

import contextlib
import logging
import math
from contextlib import AbstractContextManager

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Float

from internjax.errors import UserError
from internjax.mesh import ShardingRules
from internjax.models.cache import KVCache
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.tree import Params

log = logging.getLogger(__name__)

AXIS = "tensor"
RULES = ShardingRules(
    batch=None, length=None, embed=None, edge_embed=None, experts=None, layers=None
)
HEADS = P(None, None, AXIS)
"""Of the cache's arrays `[P, C, K, ...]`: each device has the keys of its own heads."""


def make_tensor_mesh(tensor: int) -> Mesh | None:
    """Returns a mesh over the first `tensor` devices; None for one device, which needs none.

    Raises:
      UserError: there are fewer devices.
    """
    if tensor == 1:
        return None
    devices = jax.devices()
    if tensor > len(devices):
        raise UserError(
            f"tensor={tensor} needs as many devices, and {len(devices)} are there: give at most"
            " that."
        )
    log.info("tensor=%d: XLA cuts the programs, no kernel of our own is taken", tensor)
    return jax.make_mesh((tensor,), (AXIS,), (AxisType.Auto,), devices=devices[:tensor])


def check_cuts(cfg: ModelConfig, tensor: int) -> None:
    """Raises UserError, with the numbers, for a model that so many devices cannot share out."""
    sizes = {
        axis: size
        for spec in param_table(cfg).values()
        for size, axis in zip(spec.shape, spec.axes, strict=True)
        if axis and getattr(RULES, axis) == AXIS
    }
    wrong = [f"{axis}={size}" for axis, size in sizes.items() if size % tensor]
    if wrong:
        common = math.gcd(*sizes.values())
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"tensor={tensor} devices cannot share out {cfg.name}: {', '.join(sorted(wrong))}"
            f" must be multiples of it. Legal for this model: {legal}."
        )


def lay_out(params: Params, cfg: ModelConfig, mesh: Mesh | None) -> Params:
    """Sends every device its part of a prepared tree (layers one by one, all weights plain).

    Arrays on the host go nowhere else in between: no device needs room for the whole model.

    Raises:
      UserError: a weight that is no array.
    """
    if mesh is None:
        return params
    check_cuts(cfg, mesh.size)
    table = param_table(cfg)

    def put(path: str, x, axes: tuple) -> Array:
        if not hasattr(x, "shape"):
            raise UserError(
                f"tensor={mesh.size} cuts plain arrays, and {path} is a {type(x).__name__}: take"
                " weights=expand or auto."
            )
        return jax.device_put(x, NamedSharding(mesh, RULES.spec(*axes)))

    edges = {k: put(k, x, table[k].axes) for k, x in params.items() if k != "layers"}
    layers = [
        {k: put(f"layers/{k}", x, table[f"layers/{k}"].axes[1:]) for k, x in layer.items()}
        for layer in params["layers"]
    ]
    return {**edges, "layers": tuple(layers)}


def mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh that `lay_out` laid a tree on, or None."""
    sharding = getattr(params["final_norm"], "sharding", None)
    ours = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (AXIS,)
    return sharding.mesh if ours else None


def on(mesh: Mesh | None) -> AbstractContextManager:
    """Lets programs that are traced in this thread know that the compiler cuts their arrays."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def whole(tree):
    """While tracing: has every device hold all of the arrays of a tree."""
    return _pin(tree, P())


def by_heads(cache: KVCache) -> KVCache:
    """While tracing: leaves the cache where it is, so that its buffers are used again."""
    return _pin(cache, HEADS)


def gathered(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """While tracing: has every device make its own part of the vocabulary, and then hold all.

    Asked for the whole only, XLA gathers the weights of the head and multiplies with all of them.
    """
    return whole(_pin(logits, P(None, AXIS)))


def _pin(tree, spec: P):
    if AXIS not in jax.sharding.get_abstract_mesh().axis_names:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)
