"""Pipelines: the layers in stages on the mesh axis `pipe`, micro-batches passing through them.

Every step of the schedule is one forward, then one backward, on every stage (1F1B). With P stages
of C parts each and M micro-batches, forward number k of stage p runs in step k + p, and backward
number j in step D + j + (P - 1 - p); D = C P - 1 is the least delay at which every message arrives
one step before it is needed. GPipe is the same with all forwards first: D = M + P - 1.

The time of the F + B of M micro-batches is (M + (P - 1) / C) (f + b): the bubble is
(P - 1) / (C M) (arXiv:2104.04473, section 2.2). A stage keeps the inputs of at most 2 C P - 1
micro-batch parts, whatever M (GPipe: M), and recomputes its forward in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from internjax.collectives import regather, rescatter
from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.train.gradients import (
    Gradients,
    Layout,
    Parts,
    add_copies,
    cut_rows,
    on_mesh,
    scatter,
    working_copy,
)
from internjax.train.losses import Stages, add_parts
from internjax.tree import Params, wide

PIPE = "pipe"


@dataclass(frozen=True)
class Schedule:
    """When which part of which micro-batch runs.

    Fields:
      stages: P; chunks: C, parts of a stage; micro_batches: M; delay: D.
    """

    stages: int
    chunks: int
    micro_batches: int
    delay: int

    @property
    def num_passes(self) -> int:
        """Forwards (and backwards) of one stage."""
        return self.chunks * self.micro_batches

    @property
    def num_steps(self) -> int:
        """Steps until the first stage has done its last backward."""
        return self.delay + self.num_passes + self.stages - 1

    @property
    def num_kept(self) -> int:
        """Inputs that a stage keeps at one time, at most: from forward k to its backward."""
        return min(self.num_passes, self.delay + self.chunks * self.stages)

    @property
    def bubble(self) -> float:
        """Share of the ideal time that is added by filling and emptying the pipeline."""
        return (self.stages - 1) / self.num_passes

    def forward(self, step: Array | int, stage: Array | int) -> tuple[Array | int, ...]:
        """Returns number, part and micro-batch of a stage's forward in a step."""
        k = step - stage
        return k, *self._place(k, lambda chunk: chunk)

    def backward(self, step: Array | int, stage: Array | int) -> tuple[Array | int, ...]:
        """Returns number of the forward it undoes, part and micro-batch of a backward."""
        j = step - self.delay - (self.stages - 1 - stage)
        chunk, micro = self._place(j, lambda chunk: self.chunks - 1 - chunk)
        group = micro // self.stages * self.stages * self.chunks
        k = group + chunk * self.stages + micro % self.stages
        return jnp.where((j >= 0) & (j < self.num_passes), k, -1), chunk, micro

    def _place(self, number: Array | int, order: Callable) -> tuple:
        """Micro-batches go in groups of P through the parts of all stages in turn."""
        round_, rest = number // (self.stages * self.chunks), number % (self.stages * self.chunks)
        return order(rest // self.stages), round_ * self.stages + rest % self.stages


def make_schedule(cfg: MeshConfig, micro_batches: int) -> Schedule:
    """Makes the schedule of a mesh; refuses micro-batches that its parts cannot share."""
    if cfg.chunks > 1 and micro_batches % cfg.pipe:
        raise UserError(
            f"micro_batches={micro_batches} is not a multiple of mesh.pipe={cfg.pipe}: with"
            f" mesh.chunks={cfg.chunks} micro-batches pass in groups of that many."
        )
    delay = cfg.pipe * cfg.chunks - 1
    if cfg.schedule == "gpipe":
        delay = micro_batches + cfg.pipe - 1
    return Schedule(cfg.pipe, cfg.chunks, micro_batches, delay)


def make_pipeline_gradients(
    stages: Stages,
    cfg: MeshConfig,
    layout: Layout,
    *,
    micro_batches: int,
    dtype: str | None = None,
    reduce_dtype: str | None = None,
) -> Gradients:
    """Makes what `gradients.make_gradients` makes, for a mesh with `pipe` stages."""
    schedule = make_schedule(cfg, micro_batches)

    def local(params: Params, batch: Batch, frozen: Any) -> tuple[Parts, Params]:
        work = jax.tree.map(regather, working_copy(params, dtype), layout.rest, layout.use)
        batch = jax.tree.map(lambda x: cut_rows(x, micro_batches), batch)
        run = _Run(stages, schedule, layout, work, batch)
        parts, grads = run.train()
        if layout.scatter_each:  # of the layers: that was done as they came
            rest, use = ({**t, "layers": layout.rest["layers"]} for t in (layout.rest, layout.use))
        else:
            rest, use = layout.rest, layout.use
        grads = scatter(grads, replace(layout, rest=rest, use=use), reduce_dtype)
        grads = add_copies(grads, layout, reduce_dtype)
        parts = jax.tree.map(lambda x: lax.psum(x, layout.mesh.axis_names), parts)
        return parts, jax.tree.map(lambda g, p: g.astype(wide(p.dtype)), grads, params)

    return on_mesh(local, layout, (P(), layout.rest))


def make_pipeline_parts(
    stages: Stages, cfg: MeshConfig, layout: Layout, *, dtype: str | None = None
) -> Callable[[Params, Batch, Any], Parts]:
    """Makes what `gradients.make_parts` makes, every row of a device a micro-batch."""

    def local(params: Params, batch: Batch, frozen: Any) -> Parts:
        work = jax.tree.map(regather, working_copy(params, dtype), layout.rest, layout.use)
        rows = batch.tokens.shape[0]
        schedule = make_schedule(cfg, rows)
        batch = jax.tree.map(lambda x: cut_rows(x, rows), batch)
        parts = _Run(stages, schedule, layout, work, batch).evaluate()
        return jax.tree.map(lambda x: lax.psum(x, layout.mesh.axis_names), parts)

    return on_mesh(local, layout, P())


@dataclass(frozen=True)
class _Run:
    """One device's part in a pass over all micro-batches; batch fields are `[M, b, T]`.

    Branches differ between stages and agree within one, so a collective in a branch always meets
    all of its group; see `_when` for the one kind of collective that has no groups.
    """

    stages: Stages
    schedule: Schedule
    layout: Layout
    work: Params
    batch: Batch

    def train(self) -> tuple[Parts, Params]:
        """Returns the parts that this device counts and the gradients of its working copy."""
        blank = self._blank()
        kept = jnp.zeros((self.schedule.num_kept, *blank.shape), blank.dtype)
        parts, grads = self.stages.zero_parts(), self._zero_grads()

        def step(carry, t: Array):
            kept, grads, parts, arrived, returned = carry
            kept, y = self._forward(t, kept, arrived)
            grads, parts, gx = self._backward(t, kept, grads, parts, returned)
            return (kept, grads, parts, self._send(y, 1), self._send(gx, -1)), None

        carry = (kept, grads, parts, blank, blank)
        (_, grads, parts, _, _), _ = lax.scan(step, carry, jnp.arange(self.schedule.num_steps))
        return parts, grads

    def evaluate(self) -> Parts:
        """Returns the parts that this device counts, forwards only."""
        blank, zeros = self._blank(), self.stages.zero_parts()

        def step(carry, t: Array):
            parts, arrived = carry
            k, chunk, micro = self.schedule.forward(t, lax.axis_index(PIPE))

            def go() -> tuple[Array, Parts]:
                batch = self._micro(micro)
                x, more = self.stages.run(
                    self._layers(chunk), self._input(chunk, batch, arrived), batch
                )
                end = lambda: add_parts(zeros, self.stages.finish(self.work, x, batch))  # noqa: E731
                return x, add_parts(lax.cond(self._is_last(chunk), end, lambda: zeros), more)

            y, more = self._when(self._valid(k), go, lambda: (blank, zeros))
            return (add_parts(parts, more), self._send(y, 1)), None

        steps = jnp.arange(self.schedule.num_passes + self.schedule.stages - 1)
        (parts, _), _ = lax.scan(step, (zeros, blank), steps)
        return parts

    def _forward(self, t: Array, kept: Array, arrived: Array) -> tuple[Array, Array]:
        """Keeps the input of this step's forward and returns its output for the next stage."""
        k, chunk, micro = self.schedule.forward(t, lax.axis_index(PIPE))

        def go() -> tuple[Array, Array]:
            batch = self._micro(micro)
            x = self._input(chunk, batch, arrived)
            # The last part of all is run in its backward, which follows at once.
            run = lambda: self.stages.run(self._layers(chunk), x, batch)[0]  # noqa: E731
            y = self._when(~self._is_last(chunk), run, lambda: jnp.zeros_like(x))
            return lax.dynamic_update_index_in_dim(kept, x, k % len(kept), 0), y

        return self._when(self._valid(k), go, lambda: (kept, jnp.zeros_like(arrived)))

    def _backward(self, t: Array, kept: Array, grads: Params, parts: Parts, returned: Array):
        """Adds this step's gradients and returns that of its input for the stage before."""
        k, chunk, micro = self.schedule.backward(t, lax.axis_index(PIPE))

        def go():
            batch = self._micro(micro)
            x = lax.dynamic_index_in_dim(kept, k % len(kept), 0, keepdims=False)
            layers, ends = self._layers(chunk), _ends(self.work)
            (y, more), pull = jax.vjp(lambda w, x: self.stages.run(w, x, batch), layers, x)
            finish = lambda: self._finish(ends, y, batch)  # noqa: E731
            middle = lambda: self._middle(ends, returned)  # noqa: E731
            new_parts, g_ends, gy = lax.cond(self._is_last(chunk), finish, middle)
            one = {name: jnp.asarray(name == "loss_sum", v.dtype) for name, v in more.items()}
            g_layers, gx = pull((gy, one))
            more = add_parts(new_parts, more)
            new = self._add(grads, chunk, g_layers, g_ends)
            enter = lambda: self._enter(new, batch, gx)  # noqa: E731
            new = lax.cond(self._is_first(chunk), enter, lambda: new)
            return new, add_parts(parts, more), gx

        return self._when(self._valid(k), go, lambda: (grads, parts, jnp.zeros_like(returned)))

    def _middle(self, ends: Params, returned: Array) -> tuple[Parts, Params, Array]:
        """What `_finish` returns, on other parts than the last: the next stage's gradient."""
        g_ends = jax.tree.map(jnp.zeros_like, self._used_ends(ends))
        return self.stages.zero_parts(), g_ends, returned

    def _finish(self, ends: Params, y: Array, batch: Batch) -> tuple[Parts, Params, Array]:
        """Returns parts of the loss, gradients of the ends, and that of the last states."""

        def loss(used: Params, y: Array) -> tuple[Array, Parts]:
            parts = add_parts(self.stages.zero_parts(), self.stages.finish(used, y, batch))
            return parts["loss_sum"], parts

        (g_ends, gy), parts = jax.grad(loss, (0, 1), has_aux=True)(self._used_ends(ends), y)
        return parts, g_ends, gy

    def _enter(self, grads: Params, batch: Batch, gx: Array) -> Params:
        """Adds the gradient of the embedding, which only the first stage looks up."""
        table = self.work["embed"]
        _, pull = jax.vjp(lambda table: self.stages.embed({"embed": table}, batch), table)
        total = grads["embed"]
        return {**grads, "embed": total + pull(gx)[0].astype(total.dtype)}

    def _add(self, grads: Params, chunk: Array, g_layers: Params, g_ends: Params) -> Params:
        if self.layout.scatter_each:
            g_layers = jax.tree.map(
                lambda g, rest, use: rescatter(g, self._of_chunk(rest), self._of_chunk(use)),
                g_layers,
                self.layout.rest["layers"],
                self.layout.use["layers"],
            )
        put = lambda a, g: a + g.astype(a.dtype)  # noqa: E731
        if self.schedule.chunks > 1:
            put = lambda a, g: a.at[chunk].add(g.astype(a.dtype))  # noqa: E731
        layers = jax.tree.map(put, grads["layers"], g_layers)
        ends = {k: grads[k] + g.astype(grads[k].dtype) for k, g in g_ends.items()}
        return {**grads, **ends, "layers": layers}

    def _input(self, chunk: Array, batch: Batch, arrived: Array) -> Array:
        embed = lambda: self.stages.embed(self.work, batch)  # noqa: E731
        return lax.cond(self._is_first(chunk), embed, lambda: arrived)

    def _layers(self, chunk: Array) -> Params:
        layers = self.work["layers"]
        return layers if self.schedule.chunks == 1 else jax.tree.map(lambda x: x[chunk], layers)

    def _micro(self, number: Array | int) -> Batch:
        return jax.tree.map(lambda x: x[number], self.batch)

    def _send(self, x: Array, direction: int) -> Array:
        """Passes `x` to the next stage, round from the last to the first if it has parts."""
        P, ring = self.schedule.stages, self.schedule.chunks > 1
        pairs = [(p, (p + direction) % P) for p in range(P) if ring or 0 <= p + direction < P]
        return lax.ppermute(x, PIPE, pairs)

    def _used_ends(self, ends: Params) -> Params:
        """What the last stage needs beside its layers."""
        head = "embed" if self.stages.model.tie_embeddings else "head"
        return {name: ends[name] for name in ("final_norm", head)}

    def _of_chunk(self, spec: P) -> P:
        return spec if self.schedule.chunks == 1 else P(*spec[1:])

    def _when(self, valid: Array, go: Callable, idle: Callable) -> Any:
        """Returns `go()` on the stages where `valid`, `idle()` on the others.

        A ring's messages count every device of the mesh in, whatever its stage: XLA's
        collective-permute has no groups, and one stage alone would wait for ever. There all stages
        run and drop what is not valid; they would otherwise wait for those that do.
        """
        par = self.stages.par
        if par.context is None or par.context_mode != "ring":
            return lax.cond(valid, go, idle)
        return jax.tree.map(lambda a, b: jnp.where(valid, a, b), go(), idle())

    def _valid(self, number: Array) -> Array:
        return (number >= 0) & (number < self.schedule.num_passes)

    def _is_first(self, chunk: Array) -> Array:
        return (lax.axis_index(PIPE) == 0) & (chunk == 0)

    def _is_last(self, chunk: Array) -> Array:
        end = (self.schedule.stages - 1, self.schedule.chunks - 1)
        return (lax.axis_index(PIPE) == end[0]) & (chunk == end[1])

    def _blank(self) -> Array:
        shape = jax.eval_shape(lambda: self.stages.embed(self.work, self._micro(0)))
        return jnp.zeros(shape.shape, shape.dtype)

    def _zero_grads(self) -> Params:
        zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))  # noqa: E731
        grads = jax.tree.map(zeros, self.work)
        if not self.layout.scatter_each:
            return grads
        shard = lambda x, rest, use: jax.eval_shape(lambda x: rescatter(x, rest, use), x)  # noqa: E731
        specs = (self.layout.rest["layers"], self.layout.use["layers"])
        layers = jax.tree.map(shard, grads["layers"], *specs)
        return {**grads, "layers": jax.tree.map(zeros, layers)}


def _ends(params: Params) -> Params:
    """The embedding, the last norm and the head."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}
