"""Laws of the decoder: cached decoding and packed rows equal the plain forward pass."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.models import rope
from internjax.models.cache import dequantize_nibbles, init_cache, quantize_nibbles
from internjax.models.config import ModelConfig, RopeConfig
from internjax.models.decoder import decode, forward, init_params, param_table, unembed
from internjax.models.internlm import CONFIGS
from internjax.tree import count, flatten, stack_layers, unstack_layers

CFG = ModelConfig(
    name="tiny",
    family="llama",
    num_layers=3,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    vocab_size=97,
    max_context=64,
    norm_eps=1e-5,
    dtype="float64",
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def setup(cfg: ModelConfig, rows: int = 3, length: int = 24):
    params = init_params(cfg, jax.random.key(0), jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, cfg.vocab_size, jnp.int32)
    return params, tokens


@pytest.mark.parametrize("variant", ["plain", "bias", "qk_norm", "tied"])
def test_cached_decode_equals_full_forward(variant: str):
    cfg = replace(
        CFG,
        qkv_bias=variant == "bias",
        output_bias=variant == "bias",
        qk_norm=variant == "qk_norm",
        tie_embeddings=variant == "tied",
    )
    params, tokens = setup(cfg)
    full = forward(params, tokens, cfg)
    cache = init_cache(cfg, 3, 40, "float64")
    pieces, start = [], 0
    for size in (10, 1, 1, 12):  # prompt, two steps, a second chunk
        at = jnp.full(3, start, jnp.int32)
        x, cache = decode(params, tokens[:, start : start + size], cache, at, cfg, attend=32)
        pieces.append(unembed(params, x, cfg))
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, rtol=0, atol=1e-12)


def test_rows_at_different_lengths_do_not_touch_each_other():
    params, tokens = setup(CFG)
    full = forward(params, tokens, CFG)
    cache = init_cache(CFG, 3, 40, "float64")
    lengths = np.array([4, 9, 15])
    padded = jnp.where(jnp.arange(15)[None] < lengths[:, None], tokens[:, :15], 96)
    _, cache = decode(params, padded, cache, jnp.zeros(3, jnp.int32), CFG)
    step = jnp.take_along_axis(tokens, jnp.asarray(lengths)[:, None], axis=1)
    x, _ = decode(params, step, cache, jnp.asarray(lengths, jnp.int32), CFG)
    expected = full[np.arange(3), lengths]
    np.testing.assert_allclose(unembed(params, x, CFG)[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("int4", 0.25)])
def test_a_rounded_cache_stays_near_the_exact_one(dtype, bound):
    params, tokens = setup(CFG)
    zero = jnp.zeros(3, jnp.int32)
    exact, _ = decode(params, tokens, init_cache(CFG, 3, 24, "float64"), zero, CFG)
    rounded, cache = decode(params, tokens, init_cache(CFG, 3, 24, dtype), zero, CFG)
    assert cache.k[0].dtype == {"int8": jnp.int8, "int4": jnp.uint8}[dtype]
    # A step of 1/127 of the largest entry moves a normed state by about a percent at most; one of
    # 1/15 of the range by ten times as much.
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < bound


def test_four_bits_round_by_half_a_step():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16)) * 3 + 1
    values, scales = quantize_nibbles(x)
    assert (values.shape, values.dtype, scales.shape) == ((2, 3, 4, 8), jnp.uint8, (2, 3, 4, 2))
    error = jnp.abs(dequantize_nibbles(values, scales, jnp.float32) - x)
    assert bool((error <= scales[..., :1] * 0.5001).all())
    assert float(error.max()) > 0


def test_packed_rows_equal_separate_documents():
    params, tokens = setup(CFG, rows=1, length=20)
    segments = jnp.asarray([[1] * 8 + [2] * 12], jnp.int32)
    positions = jnp.asarray([list(range(8)) + list(range(12))], jnp.int32)
    packed = forward(params, tokens, CFG, positions=positions, segment_ids=segments)
    apart = [forward(params, tokens[:, :8], CFG), forward(params, tokens[:, 8:], CFG)]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), rtol=0, atol=1e-12)


def test_unstacked_layers_give_the_same_numbers():
    params, tokens = setup(CFG)
    apart = unstack_layers(params)
    np.testing.assert_allclose(
        forward(apart, tokens, CFG), forward(params, tokens, CFG), rtol=0, atol=1e-12
    )
    again = flatten(stack_layers(apart))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf)


def test_dynamic_ntk_is_continuous_at_its_limit_and_differs_by_row():
    cfg = replace(CFG, rope=RopeConfig("dynamic", factor=2.0, original_context=16))
    np.testing.assert_array_equal(rope.inv_freq(cfg, 16), rope.inv_freq(cfg))
    assert (rope.inv_freq(cfg, 32)[1:] < rope.inv_freq(cfg)[1:]).all()
    # base' = base * (2 * 32/16 - 1) ** (8/6), written out from the rule
    base = 10000.0 * 3.0 ** (8 / 6)
    np.testing.assert_allclose(rope.inv_freq(cfg, 32), base ** -(np.arange(4) / 4), rtol=1e-14)
    params, tokens = setup(cfg, rows=2)
    freq = jnp.asarray(np.stack([rope.inv_freq(cfg), rope.inv_freq(cfg, 32)]))
    both = forward(params, tokens, cfg, inv_freq=freq)
    for row in range(2):
        alone = forward(params, tokens[row : row + 1], cfg, inv_freq=freq[row])
        np.testing.assert_allclose(both[row : row + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("internlm-7b", 7.3), ("internlm2-7b", 7.7), ("internlm2-20b", 19.9), ("internlm-104b", 104)],
)
def test_named_sizes_have_the_published_order_of_parameters(name: str, billions: float):
    table = param_table(CONFIGS[name])
    shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for k, v in table.items()}
    assert count(shapes) / 1e9 == pytest.approx(billions, rel=0.05)


def test_smollm2_has_exactly_the_parameters_of_its_checkpoint():
    table = param_table(CONFIGS["smollm2-135m-instruct"])
    shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for k, v in table.items()}
    assert count(shapes) == 134_515_008
