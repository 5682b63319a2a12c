"""The compiling process of `internjax plan`: one JSON request a line in, one answer a line out.

Runs in the environment that has jax's CUDA plugin. Builds the very step that training runs, or a
QLoRA step where the request has a rank, and compiles it for GPUs that are not here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from internjax.adapt.lora import LoraConfig, attach, init_adapter
from internjax.adapt.quantize import QuantConfig, quantize
from internjax.chain.pretraining import PretrainConfig, make_program
from internjax.experiments.config import build
from internjax.mesh import MeshConfig, make_mesh
from internjax.models.config import ModelConfig
from internjax.models.decoder import init_params, param_table
from internjax.models.remat import Remat
from internjax.plan.compile import answer_lines, compile_step
from internjax.plan.memory import Work
from internjax.plan.topology import gpu_named, topology
from internjax.train.gradients import make_gradients
from internjax.train.losses import next_token_loss
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.place import ONE_DEVICE, Placement
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import cast

STEPS = 1000  # of the schedule: a number in the program, without weight
QLORA_GROUP = 64  # weights that share a scale (arXiv:2305.14314)

type Parts = tuple[Callable, tuple, dict[str, Any]]  # step, its arguments, what is held by name


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what a request asks for; the text stays in the cache, under the key."""
    cfg = replace(build(ModelConfig, request["arch"], "arch"), dtype="bfloat16")
    mesh_cfg, work = build(MeshConfig, request["mesh"], "mesh"), build(Work, request["work"])
    gpu = gpu_named(request["gpu"])
    mesh = make_mesh(mesh_cfg, topology(gpu, request["gpus"], request["gpus_per_node"]))
    held: dict[str, Any] = {}

    def parts(mesh: jax.sharding.Mesh) -> tuple[Callable, tuple]:
        made = qlora(cfg, work, request["rank"], mesh) if "rank" in request else training(
            cfg, mesh_cfg, work, mesh)  # fmt: skip
        held.update(made[2])
        return made[:2]

    done = compile_step(parts, mesh, gpu, cache=Path(request["cache"]))
    return {
        "key": done.key,
        "memory": done.memory,
        "seconds": done.seconds,
        "cached": done.cached,
        "axes": dict(mesh.shape),
        "parameters": sum(_size(spec.shape) for spec in param_table(cfg).values()),
        "arguments": {name: local_bytes(tree) for name, tree in held.items()},
    }


def training(cfg: ModelConfig, mesh_cfg: MeshConfig, work: Work, mesh: jax.sharding.Mesh) -> Parts:
    """The step of `internjax pretrain`, and its arguments as shapes."""
    settings = PretrainConfig(
        batch_size=work.batch_size,
        length=work.length,
        micro_batches=work.micro_batches,
        dtype="bfloat16",
        reduce_dtype=work.reduce_dtype,
        remat=Remat("full", work.remat),
        optim=OptimConfig(name=work.optimizer),
    )
    place = Placement(mesh_cfg, mesh)
    place.check(cfg, work.batch_size, work.length, work.micro_batches)
    tx = make_optimizer(settings.optim, STEPS)
    with jax.set_mesh(mesh):  # the optimizer's state lies where its parameters lie
        state, batch = place.abstract_inputs(cfg, tx, work.batch_size, work.length)
    step = make_train_step(make_program(cfg, settings, place), tx)
    held = {"master weights": state.params, "optimizer": state.opt_state, "batch": batch}
    return step, (state, batch), held


def qlora(cfg: ModelConfig, work: Work, rank: int, mesh: jax.sharding.Mesh) -> Parts:
    """A QLoRA step on one GPU: int4 base, adapter in float32."""
    lora = LoraConfig(rank=rank, alpha=2.0 * rank)
    tx = make_optimizer(OptimConfig(name=work.optimizer), STEPS)

    def loss(adapter, batch, base):
        weights = attach(base, adapter, lora)
        return next_token_loss(weights, batch, cfg, remat=Remat("full", work.remat))

    def start(key):
        base = quantize(init_params(cfg, key), QuantConfig(QLORA_GROUP, rank=0))
        return init_state(init_adapter(cfg, lora, key), tx), cast(base, cfg.dtype)

    state, base = jax.eval_shape(start, jax.random.key(0))
    batch = ONE_DEVICE.abstract_batch(work.batch_size, work.length)
    held = {"base": base, "adapter": state.params, "optimizer": state.opt_state, "batch": batch}
    one = jax.sharding.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(lambda x: x.update(sharding=one), (state, batch, base))
    gradients = make_gradients(loss, micro_batches=work.micro_batches)
    return make_train_step(gradients, tx), placed, held


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        total += _size(shape) * jnp.dtype(x.dtype).itemsize
    return total


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


if __name__ == "__main__":
    answer_lines(answer)
