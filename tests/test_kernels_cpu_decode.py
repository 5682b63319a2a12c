"""Packed weights through the model: files, trees, the decoding step and the engine."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import QuantConfig, quantize, quantize_array
from internjax.kernels.cpu import library
from internjax.models.cache import init_cache
from internjax.models.decoder import decode, forward, unembed
from internjax.models.gguf import load_gguf
from internjax.models.gguf_blocks import BLOCKS, INTEGERS, decode as expand, integers
from internjax.models.lm import SamplingParams
from internjax.serve.engine import Engine, EngineConfig, prepare_params
from internjax.serve.prepare import rows_stand_alone
from internjax.tree import flatten, unstack_layers
from internjax.weights import (
    LoraWeight,
    PackedFloats,
    PackedWeight,
    QuantWeight,
    einsum,
    einsums,
    num_weights,
    pack,
    plain,
    take,
    transposed,
)
from tests.fakes import tiny_model
from tests.reference.tiny_gguf import write_tiny_gguf
from tests.test_serve_engine import logprobs_of, make_model, run

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler at install")

SPECS = {  # spec -> shape of x, input and output dims of the weight
    "BTD,DNH->BTNH": ((2, 5, 64), (64,), (3, 8)),
    "BTNH,NHD->BTD": ((2, 5, 4, 16), (4, 16), (40,)),
}


def drawn(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("spec", SPECS)
def test_a_packed_weight_is_the_quantized_one(spec: str):
    shape, ins, outs = SPECS[spec]
    base = quantize_array(drawn(1, 3, *ins, *outs), len(ins), 32, lead=1)
    stack = pack(base, "f32")
    assert num_weights(stack) == num_weights(base)
    # Offsets are rounded to float16: of at most 15 steps, by 2^-11.
    steps = np.abs(plain(base, jnp.float32)).max() / 4
    np.testing.assert_allclose(plain(stack, jnp.float32), plain(base, jnp.float32), atol=steps / 99)
    one, x = stack.at_layer(2), drawn(0, *shape)
    want = einsum(spec, x, plain(one, jnp.float32))
    np.testing.assert_allclose(einsum(spec, x, one), want, rtol=0, atol=1e-4)
    lora = LoraWeight(one, drawn(2, *ins, 3), drawn(3, 3, *outs), 0.5)
    want = einsum(spec, x, plain(lora, jnp.float32))
    np.testing.assert_allclose(einsum(spec, x, lora), want, rtol=0, atol=1e-4)
    assert num_weights(lora) == num_weights(one) == num_weights(stack) // 3


def test_weights_side_by_side_are_each_alone():
    """Packed and alike they share a call; adapters, other groups and plain floats may be there."""
    pack_one = lambda seed, out, group=32: pack(  # noqa: E731
        quantize_array(drawn(seed, 64, *out), 1, group), "f32"
    )
    lora = LoraWeight(pack_one(3, (40,)), drawn(4, 64, 3), drawn(5, 3, 40), 0.5)
    x, names = drawn(0, 2, 5, 64), ("BTD,DNH->BTNH", "BTD,DF->BTF")
    for ws, calls in [
        ((pack_one(1, (3, 8)), pack_one(2, (40,))), 1),
        ((pack_one(1, (3, 8)), lora), 1),
        ((pack_one(1, (3, 8)), pack_one(2, (40,), 64)), 2),
        ((pack_one(1, (3, 8)), drawn(2, 64, 40)), 1),
    ]:
        run = jax.jit(lambda x, *ws: einsums(names, x, ws))
        assert run.lower(x, *ws).as_text().count("@internjax_quant_matmuls") == calls
        for got, name, w in zip(run(x, *ws), names, ws, strict=True):
            np.testing.assert_allclose(got, einsum(name, x, w), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_a_file_are_its_numbers(kind):
    """Random bytes, read as integers and expanded by hand, against the decoder of the format."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, 6 * BLOCKS[kind].fields.itemsize).astype(np.uint8)
    fields = raw.view(BLOCKS[kind].fields)
    for name in {"d", "m"} & set(fields.dtype.names):
        fields[name] = rng.normal(size=6)
    values, scales, offsets = integers(kind, raw, (2, 96))
    wide = lambda x: np.repeat(x.astype(np.float32), 32, axis=1)  # noqa: E731
    got = values * wide(scales) + (0 if offsets is None else wide(offsets))
    np.testing.assert_allclose(got, expand(kind, raw, (2, 96)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_a_packed_file_holds_the_weights_of_the_file(kind, bits, tmp_path):
    path = write_tiny_gguf("smollm2", kind, tmp_path / "tiny.gguf")
    cfg, params = load_gguf(path, np.float32, packed=True)
    params = jax.tree.map(jnp.asarray, params)
    assert cfg.tie_embeddings
    seen = 0
    for name, want in flatten(load_gguf(path, np.float32)[1]).items():
        weight = flatten(params)[name]
        if isinstance(weight, PackedWeight):
            assert weight.bits == bits
            got = np.asarray(plain(weight, jnp.float32))
            got = got.T if name == "embed" else got
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=name)
            seen += 1
        else:
            np.testing.assert_array_equal(weight, want, err_msg=name)
    assert seen == 8
    ids = jnp.asarray([[5, 0, cfg.vocab_size - 1]])
    table = plain(params["embed"], jnp.float32).T
    np.testing.assert_array_equal(take(params["embed"], ids, jnp.float32), table[ids])
    x = drawn(4, 1, 3, cfg.d_model)
    head = params["embed"].replace(activations="f32")
    want = einsum("BTD,DV->BTV", x, transposed(table))
    np.testing.assert_allclose(einsum("BTD,DV->BTV", x, transposed(head)), want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def rounded():
    """A tiny model with 4-bit weights in groups of 32."""
    cfg, params = tiny_model(d_model=64, head_dim=16, num_layers=3)
    return cfg, quantize(params, QuantConfig(group=32, rank=0))


def logits(params, cfg, tokens, config: EngineConfig):
    """Feeds tokens in two pieces: a prompt, then one token."""
    run = jax.jit(decode, static_argnames="cfg")
    tree = prepare_params(params, config, cfg.dtype)
    cache, start = init_cache(cfg, len(tokens), 32), jnp.zeros(len(tokens), jnp.int32)
    _, cache = run(tree, tokens[:, :-1], cache, start, cfg=cfg)
    x, _ = run(tree, tokens[:, -1:], cache, start + tokens.shape[1] - 1, cfg=cfg)
    return unembed(tree, x, cfg)[:, 0]


def test_decoding_with_packed_weights_is_the_forward_pass(rounded):
    cfg, params = rounded
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    want = forward(params, tokens, cfg)[:, -1]
    exact = logits(params, cfg, tokens, EngineConfig(activations="f32"))
    np.testing.assert_allclose(exact, want, rtol=0, atol=2e-3 * np.abs(want).max())
    close = logits(params, cfg, tokens, EngineConfig())
    assert 0 < np.linalg.norm(close - want) < 0.03 * np.linalg.norm(want)
    kept = logits(params, cfg, tokens, EngineConfig(weights="expand"))
    np.testing.assert_allclose(kept, want, rtol=0, atol=1e-5)


def test_a_decoding_step_copies_no_weights(rounded):
    cfg, params = rounded
    cfg = replace(cfg, d_ff=1024)
    big = {
        name: (64, 1024) if name != "w_down" else (1024, 64)
        for name in ("w_gate", "w_up", "w_down")
    }
    layers = {n: quantize_array(drawn(0, 3, *s), 1, 32, lead=1) for n, s in big.items()}
    params = {**params, "layers": params["layers"] | layers}
    tree = prepare_params(params, EngineConfig(), cfg.dtype)
    packed = [x for x in jax.tree.leaves(tree["layers"][0]) if x.dtype == jnp.uint8]
    assert len(packed) == 7 and all(x.shape[0] == 3 for x in packed)
    assert all(a["w_up"].tiles is tree["layers"][0]["w_up"].tiles for a in tree["layers"])
    args = jnp.zeros((1, 1), jnp.int32), init_cache(cfg, 1, 16), jnp.zeros(1, jnp.int32)
    step = jax.jit(decode, static_argnames="cfg").lower(tree, *args, cfg=cfg).compile()
    layer = sum(x.nbytes for x in packed) // 3
    assert step.memory_analysis().temp_size_in_bytes < layer // 4


def test_what_the_kernels_do_not_serve_is_expanded(rounded, monkeypatch):
    params = rounded[1]
    odd = quantize_array(drawn(0, 3, 64, 128), 1, 8, lead=1)
    tree = prepare_params(
        {**params, "layers": params["layers"] | {"w_up": odd}}, EngineConfig(), "float32"
    )
    first = tree["layers"][0]
    assert isinstance(first["w_up"], PackedFloats) and isinstance(first["w_gate"], PackedWeight)
    monkeypatch.setattr(library, "library", lambda: None)
    tree = prepare_params(params, EngineConfig(), "float32")
    assert not any(isinstance(x, (PackedWeight, QuantWeight)) for x in tree["layers"][0].values())
    with pytest.raises(ValueError, match="pack needs the CPU kernels"):
        EngineConfig(weights="pack")
    with pytest.raises(ValueError, match="legal are int8, bf16, f32"):
        EngineConfig(activations="int4")
    assert unstack_layers(params)["layers"][2]["wq"].values.ndim == 2


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def quantized(request):
    """What `quantize` makes by default, wide enough for norms whose sums have one order."""
    model = make_model(64, d_model=512, head_dim=16, num_layers=1, vocab_size=300)
    params = quantize(model.params, QuantConfig(group=32, rank=8, targets=("wq", "wo", "w_down")))
    edges = {"embed": params["embed"].astype(request.param)}
    return replace(model, params={**params, **edges})


def test_floats_beside_packed_weights_are_packed(quantized):
    """The embedding, the projections that were left out and both factors of residuals."""
    params = quantized.params
    tree = prepare_params(params, EngineConfig(), "float32")
    assert rows_stand_alone(tree)
    layer, table = tree["layers"][0], params["embed"]
    assert {n for n, w in layer.items() if isinstance(w, LoraWeight)} == {"wq", "wo", "w_down"}
    assert {n for n, w in layer.items() if isinstance(w, PackedFloats)} == {
        *("wk", "wv", "w_gate", "w_up")
    }
    assert layer["wo"].a.strips.dtype == layer["wo"].b.strips.dtype == jnp.float16
    assert tree["embed"].strips.dtype == table.dtype
    ids = jnp.asarray([[5, 0, 299]])
    np.testing.assert_array_equal(take(tree["embed"], ids, table.dtype), table[ids])
    np.testing.assert_array_equal(plain(tree["embed"], table.dtype), table.T)
    for name in ("wk", "wo"):
        want = plain(jax.tree.map(lambda x: x[0], params["layers"][name]), jnp.float32)
        got = plain(layer[name], jnp.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
        assert num_weights(layer[name]) == num_weights(params["layers"][name])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    want = forward(params, tokens, quantized.cfg)[:, -1]
    exact = logits(params, quantized.cfg, tokens, EngineConfig(activations="f32"))
    np.testing.assert_allclose(exact, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_plain_trees_are_packed_where_it_pays():
    """Of 16 bits by themselves, of float32 where that is asked for; experts never."""
    params = tiny_model(d_model=512, head_dim=16, num_layers=1)[1]
    auto, asked = EngineConfig(), EngineConfig(weights="pack")
    for dtype, config, alone in [
        ("float32", auto, False),
        ("float32", asked, True),
        ("bfloat16", auto, True),
        ("float16", auto, True),
    ]:
        cast = jax.tree.map(lambda x: x.astype(dtype), params)  # noqa: B023
        tree = prepare_params(cast, config, "float32")
        assert rows_stand_alone(tree) == alone
        assert isinstance(tree["layers"][0]["wo"], PackedFloats) == alone
        assert isinstance(tree["embed"], PackedFloats) == alone
    experts = {**params, "layers": params["layers"] | {"router": jnp.ones((1, 512, 4))}}
    assert isinstance(prepare_params(experts, asked, "float32")["embed"], jax.Array)


def test_a_quantized_model_answers_alike_in_steps_of_any_size(quantized):
    """A request alone runs steps of one row, beside 15 others steps of 16 rows: the same bits."""
    engine = Engine(quantized, EngineConfig(slots=16, context=64, block=16))
    assert engine.programs.sizes == (1, 4, 16)
    params = SamplingParams(max_tokens=6, logprobs=2, ignore_eos=True)
    job = [5, 6, 7, 250, 3], params
    others = [([i, 9, 2 * i], params) for i in range(15)]
    (alone,) = run(engine, [job])[1]
    (beside, *_) = run(engine, [job, *others])[1]
    assert logprobs_of(beside) == logprobs_of(alone)
    assert engine.stats.max_in_flight == 16
