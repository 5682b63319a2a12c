"""Laws of mixtures of experts: a plain loop, the dense model, and a mesh all say the same."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from omegaconf import OmegaConf

from internjax import configs
from internjax.adapt.lora import LoraConfig, init_adapter
from internjax.adapt.quantize import QuantConfig, quantize
from internjax.collectives import ALONE
from internjax.data.batch import Batch
from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.mesh import MeshConfig
from internjax.models.cache import init_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, forward, param_table, unembed
from internjax.models.gguf_export import save_gguf
from internjax.models.hf import save_hf
from internjax.models.moe import capacity, mixture
from internjax.models.native import load_native, save_native
from internjax.train.gradients import working_copy
from internjax.train.losses import next_token_loss
from internjax.train.place import placement
from internjax.tree import flatten, unflatten
from tests.test_laws_sharding import TOLERANCE, assert_close, batch, parts_and_grads

CFG = ModelConfig(
    name="tiny-moe",
    family="llama",
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=2 * 12,
    vocab_size=64,
    max_context=64,
    norm_eps=1e-5,
    num_experts=8,
    experts_per_token=2,
    expert_d_ff=12,
    balance_loss=0.1,
    router_z_loss=0.01,
    dtype="float64",
)
SHARED = replace(CFG, shared_experts=6, d_ff=2 * 12 + 6)
ROOM = replace(CFG, capacity_factor=4.0)  # 4 k / E = 1: an expert may take every token
TIGHT = replace(CFG, capacity_factor=0.75)
MESHES = {
    "ep4-dp2": MeshConfig(data=2, expert=4, zero=0),
    "ep4-dp2-zero1": MeshConfig(data=2, expert=4, zero=1),
    "ep4-dp2-zero3": MeshConfig(data=2, expert=4, zero=3),
    "ep2-tp2-dp2": MeshConfig(data=2, expert=2, tensor=2),
    "ep2-tp2-dp2-zero3": MeshConfig(data=2, expert=2, tensor=2, zero=3),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def layer(cfg: ModelConfig, seed: int = 0):
    """Random weights of one mixture, spread so that its router has opinions, and states."""
    rng = np.random.default_rng(seed)
    D, E, F = cfg.d_model, cfg.num_experts, cfg.expert_d_ff
    shapes = {"router": (D, E), "expert_gate": (E, D, F), "expert_up": (E, D, F)}
    shapes["expert_down"] = (E, F, D)
    w = {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}
    return w, jnp.asarray(rng.normal(size=(8, 16, D)))


def drawn(cfg: ModelConfig, seed: int = 0):
    """Random parameters of a model, drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)
    spread = lambda path: 0.3 if "router" in path else 0.1  # noqa: E731
    return unflatten(
        {
            path: jnp.asarray(rng.normal("norm" in path, spread(path), spec.shape), cfg.dtype)
            for path, spec in param_table(cfg).items()
        }
    )


def probabilities(x: np.ndarray, w) -> np.ndarray:
    odds = np.exp(x @ np.asarray(w["router"]))
    return odds / odds.sum(axis=-1, keepdims=True)


def plain_loop(x: np.ndarray, w, cfg: ModelConfig, slots: int) -> tuple[np.ndarray, int]:
    """One group of tokens `[N, D]`: first choices, then second ones, each in order of tokens."""
    p, k = probabilities(x, w), cfg.experts_per_token
    chosen = np.argsort(-p, axis=-1)[:, :k]
    taken, dropped, y = np.zeros(cfg.num_experts, int), 0, np.zeros_like(x)
    for choice in range(k):
        for n, e in enumerate(chosen[:, choice]):
            if taken[e] == slots:
                dropped += 1
                continue
            taken[e] += 1
            share = p[n, e] / (p[n, chosen[n]].sum() if cfg.normalize_gates else 1)
            gate, up = (x[n] @ np.asarray(w[f"expert_{name}"][e]) for name in ("gate", "up"))
            y[n] += share * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w["expert_down"][e])
    return y, dropped


@pytest.mark.parametrize("cfg", [CFG, ROOM, replace(CFG, normalize_gates=False)], ids=str)
def test_no_token_is_dropped_with_enough_slots_or_without_slots(cfg: ModelConfig):
    w, h = layer(cfg)
    y, _ = mixture(h, w, cfg, ALONE)
    want, dropped = plain_loop(np.asarray(h).reshape(-1, 16), w, cfg, slots=128)
    assert dropped == 0
    np.testing.assert_allclose(y.reshape(-1, 16), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ways", [(1, 2), (2, 4), (4, 1)], ids=str)
def test_over_capacity_the_last_choices_of_a_device_are_dropped(ways: tuple[int, int]):
    """Every device has its own tokens and slots: 8 rows among data x expert devices."""
    w, h = layer(TIGHT)
    mesh = MeshConfig(data=ways[0], expert=ways[1])
    groups = np.asarray(h).reshape(mesh.num_devices, -1, 16)
    slots = capacity(TIGHT, groups.shape[1])
    assert slots == math.ceil(0.75 * 2 * groups.shape[1] / 8)
    wants, dropped = zip(*(plain_loop(x, w, TIGHT, slots) for x in groups), strict=True)
    assert all(0 < count < groups.shape[1] for count in dropped)
    with placement(mesh, jax.devices()[: mesh.num_devices]) as place:
        rows, own = P(("data", "fsdp", "expert")), {name: P("expert") for name in w}
        lie = jax.tree.map(lambda spec: NamedSharding(place.mesh, spec), own | {"router": P()})
        run = jax.shard_map(
            lambda h, w: mixture(h, w, TIGHT, place.par)[0], out_specs=rows, check_vma=False
        )
        h, w = jax.device_put(h, NamedSharding(place.mesh, rows)), jax.device_put(w, lie)
        y = np.asarray(jax.jit(run)(h, w))
    np.testing.assert_allclose(y.reshape(groups.shape), wants, rtol=0, atol=1e-12)


def test_auxiliary_losses_are_those_of_the_papers():
    w, h = layer(CFG)
    x = np.asarray(h).reshape(-1, 16)
    p = probabilities(x, w)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    f = np.bincount(chosen.reshape(-1), minlength=8) / chosen.size
    balance = 8 * np.sum(f * p.mean(axis=0))
    z = np.mean(np.log(np.exp(x @ np.asarray(w["router"])).sum(axis=-1)) ** 2)
    for one in (CFG, TIGHT):  # what is dropped counts as chosen
        _, aux = mixture(h, w, one, ALONE)
        assert float(aux) == pytest.approx(0.1 * balance + 0.01 * z, rel=1e-13)
    even = {**w, "router": jnp.zeros_like(w["router"])}
    all_chosen = replace(CFG, router_z_loss=0.0, experts_per_token=8, d_ff=8 * 12)
    _, aux = mixture(h, even, all_chosen, ALONE)
    assert float(aux) == pytest.approx(0.1, rel=1e-13)


def test_one_expert_is_the_dense_model():
    plain = replace(CFG, balance_loss=0.0, router_z_loss=0.0)
    one = replace(plain, num_experts=1, experts_per_token=1, expert_d_ff=24)
    dense = replace(plain, num_experts=0, experts_per_token=0, expert_d_ff=0)
    params = drawn(dense)
    layers = dict(params["layers"])
    for name in ("gate", "up", "down"):
        layers[f"expert_{name}"] = layers.pop(f"w_{name}")[:, None]
    layers["router"] = jnp.ones((2, 16, 1))
    data = batch(64)

    def grads(params, cfg):
        return jax.jit(jax.grad(lambda p: next_token_loss(p, Batch(**data), cfg)[0]))(params)

    want = flatten(grads(params, dense))
    named = {path: path.replace("/w_", "/expert_") for path in want}
    for factor in (0.0, 1.0):
        cfg = replace(one, capacity_factor=factor)
        got = flatten(grads({**params, "layers": layers}, cfg))
        for path, leaf in want.items():
            other = got[named[path]].reshape(leaf.shape)
            np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-13)


def test_gradients_are_those_of_all_experts_with_masks():
    """Against plain einsums over every expert, few blocks and many, experts without tokens."""
    w, h = layer(CFG)
    w["router"] = w["router"].at[:, 5].set(0).at[:, 2].mul(4)

    def masked(w, h):
        p = jax.nn.softmax(h @ w["router"])
        top = jax.lax.top_k(p, 2)[0]
        share = jnp.where(p >= top[..., 1:], p, 0) / top.sum(axis=-1, keepdims=True)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", h, w["expert_gate"]))
        hidden = hidden * jnp.einsum("btd,edf->btef", h, w["expert_up"])
        return jnp.einsum("btef,efd,bte->btd", hidden, w["expert_down"], share)

    weight = jnp.cos(jnp.arange(h.size, dtype=h.dtype)).reshape(h.shape)
    want = jax.grad(lambda w, h: jnp.sum(weight * masked(w, h)), (0, 1))(w, h)
    for cfg in (CFG, ROOM):
        run = lambda w, h, cfg=cfg: jnp.sum(weight * mixture(h, w, cfg, ALONE)[0])  # noqa: E731
        assert_close(jax.grad(run, (0, 1))(w, h), want, 1e-12, cfg.name)


@pytest.mark.parametrize("cfg", [CFG, replace(SHARED, capacity_factor=0.5)], ids=str)
def test_cached_decode_equals_full_forward(cfg: ModelConfig):
    """Also where training would drop: scoring and decoding give every token its experts."""
    params = drawn(cfg)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 24)), jnp.int32)
    full = jax.jit(forward, static_argnums=2)(params, tokens, cfg)
    run = jax.jit(decode, static_argnums=4)
    cache, pieces, start = init_cache(cfg, 3, 40, "float64"), [], 0
    for size in (10, 1, 1, 12):
        at = jnp.full(3, start, jnp.int32)
        x, cache = run(params, tokens[:, start : start + size], cache, at, cfg)
        pieces.append(unembed(params, x, cfg))
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, rtol=0, atol=1e-12)


def check_meshes(cfg: ModelConfig, *meshes: MeshConfig, micro: int = 1) -> None:
    params = drawn(cfg)
    data = batch(cfg.vocab_size)
    want = parts_and_grads(params, data, cfg, micro=micro)
    assert want[0]["aux_sum"] > 0
    for mesh in meshes:
        with placement(mesh) as place:
            got = parts_and_grads(params, data, cfg, place, micro=micro)
        assert_close(got, want, TOLERANCE[cfg.dtype], str(mesh))


@pytest.mark.parametrize(
    ("cfg", "names"),
    [
        (SHARED, ("ep4-dp2-zero1", "ep2-tp2-dp2-zero3")),
        (ROOM, ("ep4-dp2-zero3", "ep2-tp2-dp2")),
        pytest.param(SHARED, ("ep4-dp2", "ep4-dp2-zero3", "ep2-tp2-dp2"), marks=pytest.mark.slow),
        pytest.param(ROOM, ("ep4-dp2", "ep2-tp2-dp2-zero3"), marks=pytest.mark.slow),
    ],
    ids=["dropless", "room", "dropless, more", "room, more"],
)
def test_a_mesh_changes_nothing(cfg: ModelConfig, names: tuple[str, ...]):
    check_meshes(cfg, *(MESHES[name] for name in names))


@pytest.mark.parametrize(
    "cfg", [pytest.param(SHARED, marks=pytest.mark.slow), ROOM], ids=["dropless", "room"]
)
def test_a_pipeline_with_experts_changes_nothing(cfg: ModelConfig):
    check_meshes(cfg, MeshConfig(pipe=2, data=2, expert=2), micro=2)


@pytest.mark.parametrize(
    "cfg", [SHARED, pytest.param(ROOM, marks=pytest.mark.slow)], ids=["dropless", "room"]
)
def test_a_mesh_changes_nothing_in_float32(cfg: ModelConfig):
    with jax.enable_x64(False):
        check_meshes(replace(cfg, dtype="float32"), MESHES["ep2-tp2-dp2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 32}, r"d_ff=32 is not the width .* = 24\."),
        ({"experts_per_token": 9}, r"experts_per_token=9 and .* num_experts=8 a token is given"),
        ({"capacity_factor": -1.0}, "-1.0 is negative"),
        ({"num_experts": 0}, r"num_experts=0 is a dense model, which has no \{'experts_per_token"),
    ],
)
def test_impossible_mixtures_are_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(CFG, **changes)


def test_experts_that_devices_cannot_share_are_refused():
    with (
        placement(MeshConfig(expert=3), jax.devices()[:3]) as place,
        pytest.raises(UserError, match="experts has 8 entries, which mesh expert=3 does not"),
    ):
        place.check(CFG, 6, 16, 1)


def test_a_mixture_goes_to_our_folder_and_is_refused_by_others(tmp_path: Path):
    with jax.enable_x64(False):
        cfg = replace(CFG, dtype="float32")
        params = drawn(cfg)
        save_native(tmp_path / "own", cfg, params)
        again, read = load_native(tmp_path / "own")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, read, params)
    with pytest.raises(UserError, match="tiny-moe is a mixture of 8 experts"):
        save_hf(tmp_path / "hf", cfg, params)
    with pytest.raises(UserError, match="tiny-moe is a mixture of 8 experts"):
        save_gguf(tmp_path / "m.gguf", cfg, params)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("smoke-moe-6m", 0.0058, 0.00513), ("internlm2-moe-8x7b", 46.9, 13.4)],
)
def test_named_mixtures_have_the_stated_sizes(name: str, billions: float, active: float):
    raw = OmegaConf.load(Path(configs.__file__).parent / "arch" / f"{name}.yaml")
    cfg = build(ModelConfig, raw)
    assert cfg.name == name
    sizes = {path: math.prod(spec.shape) for path, spec in param_table(cfg).items()}
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=0.01)
    idle = 1 - cfg.experts_per_token / cfg.num_experts
    unused = idle * sum(size for path, size in sizes.items() if "expert_" in path)
    assert (sum(sizes.values()) - unused) / 1e9 == pytest.approx(active, rel=0.01)


def test_the_router_keeps_its_precision_in_a_working_copy():
    params = drawn(replace(CFG, dtype="float32"))["layers"]
    work = working_copy(params, "bfloat16")
    assert work["router"].dtype == jnp.float32
    assert work["expert_up"].dtype == jnp.bfloat16


def test_projections_that_a_mixture_lacks_are_refused():
    with pytest.raises(UserError, match=r"targets=w_gate: tiny-moe has none; legal are wq, wk, wv"):
        init_adapter(CFG, LoraConfig(targets=("wq", "w_gate")), jax.random.key(0))
    with pytest.raises(UserError, match=r"targets=w_gate,w_up,w_down: the model has none"):
        quantize(drawn(CFG), QuantConfig(group=4))
