"""Laws of the paged cache: what was cached, cut, shared or given back changes no bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.adapt.quantize import QuantConfig, quantize
from internjax.errors import UserError
from internjax.kernels.cpu import library
from internjax.models.lm import SamplingParams
from internjax.serve.budget import block_bytes, count_blocks
from internjax.serve.engine import Engine, EngineConfig
from tests.test_serve_engine import logprobs_of, make_model, run

CONFIG = EngineConfig(slots=4, context=128, block=16, prefill_tokens=64)
KERNELS = pytest.mark.skipif(library.library() is None, reason="no C++ compiler at install")


@pytest.fixture(scope="module", params=["xla", pytest.param("kernels", marks=KERNELS)])
def model(request):
    """Plain weights, for which a step has one size; and such as `quantize` makes, with several."""
    if request.param == "xla":
        return make_model(128)
    model = make_model(128, d_model=512, head_dim=16, tie_embeddings=True)
    return replace(model, params=quantize(model.params, QuantConfig(group=32, rank=4)))


def invariant(model, **changes) -> Engine:
    return Engine(model, replace(CONFIG, invariant=True, **changes))


def jobs(count=6):
    """Prompts that begin alike, some by blocks, with all kinds of parameters."""
    rng = np.random.default_rng(1)
    draw = lambda n: rng.integers(0, 256, n).tolist()  # noqa: E731
    common = draw(20)
    kinds = [
        SamplingParams(max_tokens=40, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=44, temperature=1.0, seed=5, logprobs=0, ignore_eos=True),
        SamplingParams(max_tokens=36, repetition_penalty=1.5, logprobs=1, ignore_eos=True),
    ]
    sizes = (0, 9, 30, 1, 24, 41)
    return [(common + draw(sizes[i % 6]), kinds[i % 3]) for i in range(count)]


def heard(news):
    return [logprobs_of(one) for one in news]


@pytest.fixture(scope="module")
def alone(model):
    """Each request by itself in an engine that remembers nothing."""
    engine = invariant(model, prefix_cache=False)
    return [heard(run(engine, [job])[1])[0] for job in jobs()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 8},  # of 16 positions: one request alone may need 7
        {"prefill_tokens": 1000},
        {"slots": 3, "blocks": 16, "block": 8, "prefill_tokens": 32},
    ],
    ids=str,
)
def test_no_bit_depends_on_the_cache(model, alone, changes):
    engine = invariant(model, **changes)
    for _ in range(2):  # the second time all prompts are there, if there was room
        requests, news = run(engine, jobs())
        assert heard(news) == alone
    assert engine.stats.prefix_tokens > 0
    assert (engine.stats.preempted > 0) == ("blocks" in changes)
    assert sum(r.preempted for r in requests) <= engine.stats.preempted
    pool = engine.scheduler.pool
    assert (pool.held, pool.free + pool.cached) == (0, pool.total)
    assert engine.stats.cached_blocks == pool.cached > 0


def test_eight_bits_are_read_back_from_the_cache_by_all(model):
    """What a prompt attends to is what later steps will see."""
    engine = invariant(model, kv_dtype="int8", prefix_cache=False)
    alone = [heard(run(engine, [job])[1])[0] for job in jobs(3)]
    engine = invariant(model, kv_dtype="int8", blocks=8)
    for _ in range(2):
        assert heard(run(engine, jobs(3))[1]) == alone


def test_the_size_of_a_step_follows_the_requests(model):
    engine = Engine(model, CONFIG)
    sizes = engine.programs.sizes
    assert sizes == ((1, 4) if model.cfg.d_model >= 512 else (4,))
    names = engine.warm_up()
    assert sum(name.startswith("step") for name in names) == len(sizes) * len(
        engine.programs.attends
    )
    before = engine.stats.programs
    run(engine, jobs(1))
    run(engine, jobs(6))
    assert engine.stats.programs == before
    assert engine.stats.recompilations == 0


def test_other_weights_forget_what_was_cached(model):
    engine = Engine(model, CONFIG)
    (job,) = jobs(1)
    first = run(engine, [job])[1]
    cached = engine.stats.prefix_tokens
    half = jax.tree.map(lambda x: x * 0.5 if x.ndim == 1 else x, model.params)
    engine.set_params(half)
    other = run(engine, [job])[1]
    assert engine.stats.prefix_tokens == cached
    assert heard(other) != heard(first)
    engine.set_params(model.params)
    assert heard(run(engine, [job])[1]) == heard(first)


def test_who_waits_finds_nothing_of_the_old_weights(model):
    """Though one that runs goes on naming blocks that the old ones filled."""
    half = jax.tree.map(lambda x: x * 0.5 if x.ndim == 1 else x, model.params)
    prompt, params = jobs(1)[0]
    engine = Engine(model, replace(CONFIG, slots=1))
    running = engine.submit(prompt, params, lambda _: None)
    while len(running.output) < 3:
        engine.step()
    news = []
    waiting = engine.submit(prompt, params, news.append)
    engine.set_params(half)
    while engine.step():
        pass
    assert waiting.reused == 0
    changed = Engine(replace(model, params=half), replace(CONFIG, slots=1))
    assert logprobs_of(news) == heard(run(changed, [(prompt, params)])[1])[0]


def test_a_poisoned_prefix_is_not_found_again():
    model = make_model(128, tie_embeddings=False)
    embed = model.params["embed"].at[200].set(jnp.nan)
    engine = Engine(replace(model, params={**model.params, "embed": embed}), CONFIG)
    bad = ([1] * 20 + [200] + [2] * 30, SamplingParams(max_tokens=4))
    good = ([1] * 60, SamplingParams(max_tokens=8, ignore_eos=True))
    (fine,), _ = run(engine, [good])
    for _ in range(3):
        (failed, again), _ = run(engine, [bad, good])
        assert failed.finish_reason == "error"
        assert again.output == fine.output
    assert failed.reused == 16  # the block before the poison is the good one's
    assert engine.stats.poisoned == 3
    assert all(bool(jnp.isfinite(x).all()) for x in engine.programs._slots.cache.k)


def test_blocks_are_counted():
    cfg = make_model(128).cfg
    assert block_bytes(cfg, 16, "int8") * 2 < block_bytes(cfg, 16, "float32")
    assert count_blocks(CONFIG, cfg, 128) == 32
    assert count_blocks(replace(CONFIG, blocks=9.0), cfg, 128) == 9
    assert count_blocks(replace(CONFIG, blocks=0.5), cfg, 128) == 32  # memory holds far more
    with pytest.raises(UserError, match=r"come to 7 of 16 positions, but one request.* needs 8"):
        count_blocks(replace(CONFIG, blocks=7), cfg, 128)
    with pytest.raises(UserError, match="give a share below 1 or a whole number"):
        EngineConfig(blocks=1.5)
