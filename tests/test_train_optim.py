"""Schedules at their corners, clipping, what decays, every optimizer alone and on a mesh."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from internjax.errors import UserError
from internjax.models.decoder import param_table
from internjax.train.adam8 import (
    block_shape,
    dequantize,
    dynamic_table,
    nearest,
    quantize,
    scale_by_adam8,
)
from internjax.train.mup import rescale_start
from internjax.train.optim import OptimConfig, make_optimizer, make_schedule, optimizer_facts
from internjax.train.schedule import beta2_at
from internjax.tree import flatten, size_bytes, unflatten
from tests.fakes import tiny_model


def rates(steps: int, **changes) -> np.ndarray:
    schedule = make_schedule(OptimConfig(lr=1.0, **changes), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    got = rates(100, warmup_fraction=0.1, final_lr_fraction=0.2)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)  # never 0, peak reached
    cosine = 0.2 + 0.8 * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(got[10:], cosine, rtol=1e-5)


def test_linear_and_constant_schedules():
    got = rates(10, warmup_fraction=0.2, final_lr_fraction=0.0, schedule="linear")
    np.testing.assert_allclose(got, [0.5, 1, *(1 - np.arange(9) / 8)], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rates(10, schedule="constant"), np.ones(11))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_has_a_positive_rate_everywhere(steps: int):
    for schedule in ("cosine", "wsd", "linear", "constant"):
        got = rates(steps, schedule=schedule, warmup_fraction=1.0, decay_fraction=0.0)
        assert (got[:steps] > 0).all()


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="at least one step"):
        make_schedule(OptimConfig(), 0)


def test_decay_falls_on_matrices_only():
    cfg, _ = tiny_model(qkv_bias=True, output_bias=True, qk_norm=True, tie_embeddings=False)
    params = unflatten({path: jnp.ones(spec.shape) for path, spec in param_table(cfg).items()})
    tx = make_optimizer(OptimConfig(lr=1.0, schedule="constant", weight_decay=0.5), 4)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    moved = {path for path, update in flatten(updates).items() if (update != 0).any()}
    matrices = {"embed", "head"}
    matrices |= {f"layers/{n}" for n in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")}
    assert moved == matrices


def test_clipping_bounds_the_whole_gradient():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 30.0), "b": jnp.full(4, -40.0)}
    moved = {}
    for clip in (0.0, 1.0):
        cfg = OptimConfig(lr=1.0, schedule="constant", clip_norm=clip, eps=1.0, b1=0.0, b2=0.0)
        tx = make_optimizer(cfg, 4)
        updates, _ = tx.update(grads, tx.init(params), params)
        moved[clip] = float(-updates["a"][0])
    # Adam without memory moves by g / (|g| + eps): the clipped gradient shows in the ratio.
    norm = float(optax.tree.norm(grads))
    np.testing.assert_allclose(moved[0.0], 30 / 31, rtol=1e-5)
    np.testing.assert_allclose(moved[1.0], (30 / norm) / (30 / norm + 1), rtol=1e-5)


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    changes = {"warmup_fraction": 0.1, "decay_fraction": 0.25, "final_lr_fraction": 0.2}
    got = rates(20, schedule="wsd", **changes)
    np.testing.assert_allclose(got[:15], [0.5, *np.ones(14)], rtol=1e-6)
    np.testing.assert_allclose(got[15:], 1 - 0.8 * np.arange(6) / 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"warmup_fraction": 1.5}, "a share lies between 0 and 1"),
        ({"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.6}, "must add up to 1"),
        ({"name": "lion", "b2_power": 0.8}, "lion keeps its b2 fixed"),
        ({"no_decay": ("(",)}, "is no regular expression of parameter paths"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, complaint: str):
    with pytest.raises(UserError, match=complaint):
        OptimConfig(**changes)


def test_beta2_rises_as_internevo_has_it():
    updates = np.array([1, 2, 10, 100, 1000])
    got = [float(beta2_at(0.95, 0.8, k - 1)) for k in updates]
    np.testing.assert_allclose(got, np.maximum(0.95, 1 - updates**-0.8), rtol=1e-6)
    assert got[0] == np.float32(0.95) and got[-1] > 0.995


def test_the_log_can_tell_every_steps_rate_and_beta2():
    cfg = OptimConfig(lr=1.0, warmup_fraction=0.5, schedule="constant", b2=0.5, b2_power=0.8)
    facts = optimizer_facts(cfg, 4)
    assert [facts(k)["lr"] for k in range(4)] == [0.5, 1.0, 1.0, 1.0]
    want = [max(0.5, 1 - k**-0.8) for k in (1, 2, 3, 4)]
    assert [facts(k)["adam_beta2"] for k in range(4)] == pytest.approx(want, rel=1e-6)
    assert optimizer_facts(OptimConfig(name="lion"), 2)(1).keys() == {"lr"}


def problem(seed: int = 0):
    """Weights under the decoder's names and gradients that differ a lot in size."""
    shapes = {"embed": (264, 32), "layers/attn_norm": (2, 32), "layers/wq": (2, 32, 4, 8)}
    shapes |= {"layers/wo": (2, 4, 8, 32), "layers/w_up": (2, 32, 64)}
    rng = np.random.default_rng(seed)

    def draw(spread: float):
        sizes = {path: np.exp(spread * rng.normal(size=s)) for path, s in shapes.items()}
        signed = {path: size * rng.choice([-1, 1], size.shape) for path, size in sizes.items()}
        return unflatten({path: jnp.asarray(x, jnp.float32) for path, x in signed.items()})

    return draw(0.1), draw(2.0)


def updated(cfg: OptimConfig, params, grads, count: int = 2):
    tx = make_optimizer(cfg, 10)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for i in range(count):
        scale = 1.0 + i
        updates, state = update(jax.tree.map(lambda g: g * scale, grads), state, params)  # noqa: B023
        params = optax.apply_updates(params, updates)
    return params, state


def test_a_rising_beta2_is_that_of_an_adam_told_every_step():
    params, grads = {"w": jnp.arange(1.0, 5.0)}, {"w": jnp.array([1.0, -2.0, 3.0, 0.5])}
    cfg = OptimConfig(lr=0.1, schedule="constant", b2=0.5, b2_power=0.8, clip_norm=0)
    got, _ = updated(cfg, params, grads, 4)
    w, m, v = np.arange(1.0, 5.0), 0.0, 0.0
    for k in range(1, 5):
        g, b2 = np.array([1.0, -2.0, 3.0, 0.5]) * k, max(0.5, 1 - k**-0.8)
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g * g
        w = w - 0.1 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - b2**k)) + 1e-8)
    np.testing.assert_allclose(got["w"], w, rtol=1e-5)


NAMES = ("adamw", "adam8bit", "lion", "muon", "adafactor")


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_the_same_on_a_mesh(name: str):
    """Adam in 8 bits too: its blocks are cut by the shape alone, not by how it is sharded."""
    params, grads = problem()
    cfg = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    want, _ = updated(cfg, params, grads)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Explicit,) * 2)

    def lay(path: str, leaf):
        spec = {"wq": (None, "fsdp", "tensor"), "w_up": (None, "fsdp", "tensor")}
        spec |= {"wo": (None, "tensor", None, "fsdp"), "embed": ("tensor", "fsdp")}
        spec = P(*spec.get(path.rpartition("/")[2], ()))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    laid, laid_grads = ({p: lay(p, x) for p, x in flatten(t).items()} for t in (params, grads))
    with jax.set_mesh(mesh):
        got, state = updated(cfg, laid, laid_grads)
    for path, leaf in flatten(want).items():
        error = np.linalg.norm(np.asarray(got[path]) - leaf)
        assert error <= 2e-5 * np.linalg.norm(leaf), path
        assert got[path].sharding.is_equivalent_to(laid[path].sharding, leaf.ndim), path
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def test_muon_moves_every_layer_along_an_orthogonal_matrix():
    params, grads = problem()
    cfg = OptimConfig(name="muon", lr=1.0, schedule="constant", clip_norm=0)
    new, _ = updated(cfg, params, grads, 1)
    for name, rows in (("wq", 1), ("wo", 2), ("w_up", 1)):  # dims of a layer on the input's side
        moved = np.asarray(new["layers"][name] - params["layers"][name])
        for layer in moved:
            fan_in = np.prod(layer.shape[:rows])
            matrix = layer.reshape(fan_in, -1)
            singular = np.linalg.svd(matrix / (0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
            # Five Newton-Schulz steps bring all but the smallest into about [0.7, 1.2].
            assert singular.max() < 1.3 and np.mean(singular > 0.6) > 0.8, (name, singular)
    adam, _ = updated(OptimConfig(lr=1.0, schedule="constant", clip_norm=0), params, grads, 1)
    np.testing.assert_array_equal(new["embed"], adam["embed"])  # no matrix of a layer


def test_muon_without_a_matrix_is_refused():
    tx = make_optimizer(OptimConfig(name="muon"), 3)
    with pytest.raises(UserError, match="none of the parameters is a matrix of a layer"):
        tx.init({"layers": {"wq": {"a": jnp.ones((2, 4, 2)), "b": jnp.ones((2, 2, 4))}}})


def test_multipliers_scale_the_step_of_the_paths_they_match():
    params = {"embed": jnp.ones(3), "layers": {"w_up": jnp.ones((1, 3, 3))}}
    grads = jax.tree.map(jnp.ones_like, params)
    plain = {"lr": 0.5, "schedule": "constant"}
    one, _ = updated(OptimConfig(**plain), params, grads, 1)
    cfg = OptimConfig(**plain, lr_multipliers={"embed": 0.1, "layers/.*": 2.0, ".*up": 3.0})
    two, _ = updated(cfg, params, grads, 1)
    np.testing.assert_allclose(1 - two["embed"], 0.1 * (1 - one["embed"]), rtol=1e-5)
    w_up = 1 - one["layers"]["w_up"]
    np.testing.assert_allclose(1 - two["layers"]["w_up"], 6 * w_up, rtol=1e-5)


def test_which_paths_decay_is_a_setting():
    params = {"embed": jnp.ones(3), "head": jnp.ones(3)}
    cfg = OptimConfig(lr=1.0, schedule="constant", weight_decay=0.5, no_decay=("embed",))
    new, _ = updated(cfg, params, jax.tree.map(jnp.zeros_like, params), 1)
    assert new["embed"][0] == 1.0 and new["head"][0] == 0.5


# --- Adam in 8 bits ---


@pytest.mark.parametrize("signed", [True, False])
def test_the_index_by_arithmetic_is_that_of_the_nearest_value(signed: bool):
    table, rng = dynamic_table(signed=signed), np.random.default_rng(0)
    far, small = rng.uniform(-1, 1, 2000), 10 ** rng.uniform(-9, 0, 2000)
    x = np.concatenate([far, small, -small, table, [0.0]]).astype(np.float32)
    x = x if signed else np.abs(x)
    off = np.abs(x[:, None].astype(np.float64) - table)
    got = np.asarray(nearest(jnp.asarray(x), signed=signed)).astype(int)
    np.testing.assert_array_equal(off[np.arange(len(x)), got], off.min(axis=1))


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_of_the_code_comes_back_as_itself_and_others_nearly(signed: bool):
    table = dynamic_table(signed=signed)
    assert len(np.unique(table)) == 256 and table.max() == 1
    exact = jnp.asarray(np.tile(table, (3, 1))) * jnp.array([[0.5], [1.0], [8.0]])
    there_and_back = jax.jit(lambda x: dequantize(quantize(x, table), table))
    np.testing.assert_array_equal(there_and_back(exact), exact)
    rng = np.random.default_rng(0)
    x = np.exp(-3 * np.abs(rng.normal(size=(4, 1000))))
    x = jnp.asarray(x * rng.choice([-1, 1] if signed else [1], x.shape), jnp.float32)
    back = there_and_back(x)
    # The widest gap of the code is 0.9 / 64 (signed) or 0.9 / 128 of a block's largest value.
    assert (
        np.abs(np.asarray(back) - np.asarray(x)).max() <= 0.9 / (64 if signed else 128) / 2 + 1e-6
    )
    # From a hundredth of it on, a decade holds at least 32 (64) values: half a gap at its foot.
    big = np.abs(x) > 0.011
    off = np.abs(np.asarray(back)[big] / np.asarray(x)[big] - 1).max()
    assert off <= 0.45 / (32 if signed else 64) / 0.1


def test_blocks_are_equal_parts_of_the_trailing_dims():
    assert block_shape((3, 576, 1536)) == ((3, 576), 6, 256)
    assert block_shape((24, 576)) == ((24,), 3, 192)
    assert block_shape((24, 2048, 16, 128)) == ((24, 2048), 8, 256)
    assert block_shape((2, 259)) == ((2,), 2, 130)
    x = jax.random.normal(jax.random.key(0), (2, 259))
    stored = quantize(x, dynamic_table(signed=True))
    assert stored.codes.shape == (2, 259) and stored.scales.shape == (2, 2)


def byte_bigram(tx: optax.GradientTransformation, steps: int):
    """Learns which byte follows which in the project's readme; returns the losses and the state."""
    text = np.frombuffer((Path(__file__).parent.parent / "README.md").read_bytes(), np.uint8)
    now, after = (
        jnp.asarray(text[:2000].astype(np.int32)),
        jnp.asarray(text[1:2001].astype(np.int32)),
    )
    one, two = jax.random.split(jax.random.key(0))
    params = {"embed": jax.random.normal(one, (256, 32)), "head": jax.random.normal(two, (32, 256))}

    def loss(params):
        logits = jnp.take(params["embed"], now, axis=0) @ params["head"] * 32**-0.5
        picked = jnp.take_along_axis(logits, after[:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    def update(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(update, carry, None, length=steps))
    (_, state), losses = run((params, tx.init(params)))
    return np.asarray(losses), state


def test_adam_in_8_bits_learns_as_adam_in_a_quarter_of_the_memory():
    wide, state = byte_bigram(optax.adam(0.02, 0.9, 0.95), 150)
    eight = optax.chain(
        scale_by_adam8(0.9, lambda done: jnp.float32(0.95), 1e-8), optax.scale(-0.02)
    )
    narrow, small = byte_bigram(eight, 150)
    assert wide[-1] < 0.5 * wide[0]
    np.testing.assert_allclose(narrow, wide, rtol=0.02)  # the whole curve, not the end alone
    assert size_bytes(small) < 0.27 * size_bytes(state)


# --- width scaling ---


def coordinates(width: int, base: int, steps: int = 4) -> float:
    """How far the logits of a small residual network move in a few steps, root mean square."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"embed": (64, width), "layers/w_up": (1, width, 2 * width)}
    shapes |= {"layers/w_down": (1, 2 * width, width), "head": (width, 64)}
    # Drawn at the base width's own deviation, as the table of weights does for every width.
    std = {"embed": 1.0, "layers/w_up": 32**-0.5, "layers/w_down": 64**-0.5, "head": 32**-0.5}
    drawn = {p: jax.random.normal(k, s) * std[p] for k, (p, s) in zip(keys, shapes.items())}
    params = unflatten(drawn)
    if base:
        params = rescale_start(params, width, base)
    cfg = OptimConfig(lr=3e-2, schedule="constant", base_width=base, clip_norm=0)
    tx = make_optimizer(cfg, steps, width=width)
    tokens, targets = jnp.arange(64), jnp.roll(jnp.arange(64), 7)

    def norm(x):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    def logits(params):
        x = jnp.take(params["embed"], tokens, axis=0)
        layers = params["layers"]
        x = x + jax.nn.relu(norm(x) @ layers["w_up"][0]) @ layers["w_down"][0]
        return norm(x) @ params["head"]

    def loss(params):
        logp = jax.nn.log_softmax(logits(params))
        return -jnp.mean(jnp.take_along_axis(logp, targets[:, None], axis=-1))

    @jax.jit
    def trained(params):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    return float(jnp.sqrt(jnp.mean((logits(trained(params)) - logits(params)) ** 2)))


def test_with_width_scaling_every_width_moves_as_far():
    """The coordinate check of arXiv:2203.03466, appendix D.1."""
    scaled = [coordinates(width, 32) for width in (32, 128, 512)]
    plain = [coordinates(width, 0) for width in (32, 128, 512)]
    assert scaled[0] == pytest.approx(plain[0], rel=1e-5)  # nothing changes at the base width
    # What the head's random start adds fades with the width; what was learned stays.
    assert 0.75 < scaled[2] / scaled[1] < 1.1 and 0.5 < scaled[1] / scaled[0] < 1.1
    assert plain[2] > 2 * plain[1] > 4 * plain[0]


def test_width_scaling_refuses_a_tied_head_and_an_unknown_width():
    with pytest.raises(UserError, match="tie_embeddings=false"):
        rescale_start({"embed": jnp.ones((2, 2))}, 64, 32)
    with pytest.raises(UserError, match="the width of the model is not known here"):
        make_optimizer(OptimConfig(base_width=32), 3)
