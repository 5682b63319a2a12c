"""Laws of tensor parallel serving: many devices answer as one, each with its share of all."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import httpx2 as httpx
import jax
import numpy as np
import pytest

from internjax.adapt.quantize import QuantConfig, quantize
from internjax.errors import UserError
from internjax.models.decoder import param_table
from internjax.models.lm import SamplingParams
from internjax.models.native import save_native
from internjax.serve import slots as device
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.server import serving
from internjax.serve.tensor import check_cuts, on
from tests.fakes import byte_tokenizer
from tests.test_serve_engine import logprobs_of, make_model, run

VOCAB = 264  # what eight devices can share out
# Fewer blocks than the requests need: somebody is always computed anew.
CONFIG = EngineConfig(slots=3, context=64, block=8, blocks=10, prefill_tokens=32, weights="expand")


def many_headed(**changes):
    """A tiny model that eight devices can share out."""
    shape = {"num_layers": 1, "num_heads": 16, "num_kv_heads": 8, "vocab_size": VOCAB}
    tokenizer = byte_tokenizer([f"<|{i}|>" for i in range(VOCAB - 259)])
    return replace(make_model(128, **shape | changes), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model():
    return many_headed()


def jobs(count=4):
    """Prompts that begin alike, with all kinds of parameters."""
    rng = np.random.default_rng(1)
    draw = lambda n: rng.integers(0, 256, n).tolist()  # noqa: E731
    common = draw(17)
    kinds = [
        SamplingParams(max_tokens=14, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=16, temperature=1.0, seed=5, logprobs=0, ignore_eos=True),
        SamplingParams(max_tokens=15, repetition_penalty=1.5, logprobs=1, ignore_eos=True),
    ]
    return [(common + draw((0, 6, 20, 1)[i]), kinds[i % 3]) for i in range(count)]


def answers(model, config, draft=None):
    """Returns tokens, logprobs and the engine of jobs run twice, again over what is cached."""
    engine = Engine(model, config, draft=draft)
    tokens, logprobs = [], []
    for _ in range(2):
        requests, news = run(engine, jobs())
        tokens += [r.output for r in requests]
        logprobs += [entry.logprob for one in news for entry in logprobs_of(one)]
    return tokens, np.array(logprobs), engine


# A sum in another order may round a key to the next of 127 steps.
BOUNDS = {"float32": 1e-4, "int8": 2e-2}


@pytest.mark.parametrize(
    ("tensor", "kv_dtype"),
    [
        (8, "float32"),
        (2, "int8"),
        *(
            pytest.param(tensor, kv_dtype, marks=pytest.mark.slow)
            for tensor, kv_dtype in [(2, "float32"), (4, "float32"), (4, "int8"), (8, "int8")]
        ),
    ],
)
def test_many_devices_equal_one(model, tensor, kv_dtype):
    config = replace(CONFIG, kv_dtype=kv_dtype)
    tokens, logprobs, _ = answers(model, config)
    got, values, engine = answers(model, replace(config, tensor=tensor))
    assert got == tokens
    np.testing.assert_allclose(values, logprobs, atol=BOUNDS[kv_dtype])
    assert engine.stats.prefix_tokens > 0
    assert engine.stats.preempted > 0


def per_device(tree, tensor):
    """Bytes of a tree on each device; what is not there at all counts nothing."""
    sizes = dict.fromkeys(jax.devices()[:tensor], 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return set(sizes.values())


def pointers(cache):
    leaves = [s.data for x in jax.tree.leaves(cache) for s in x.addressable_shards]
    return [x.unsafe_buffer_pointer() for x in leaves]


def test_each_device_holds_its_share_and_keeps_it(model):
    engine = Engine(model, replace(CONFIG, tensor=8))
    cut = {"heads", "kv_heads", "ffn", "vocab"}
    share = lambda spec: 4 * math.prod(spec.shape) // (8 if cut & {*spec.axes} else 1)  # noqa: E731
    weights = sum(map(share, param_table(model.cfg).values()))
    assert per_device(engine.params, 8) == {weights}
    cached = sum(x.nbytes for x in jax.tree.leaves(engine.programs._slots.cache)) // 8
    assert per_device(engine.programs._slots.cache, 8) == {cached}
    engine.warm_up()
    compiled = [f._cache_size() for f in (device.step, device.prefill, device.seat, device.wipe)]
    before = pointers(engine.programs._slots.cache)
    run(engine, jobs())
    assert pointers(engine.programs._slots.cache) == before  # written in place
    engine.set_params(jax.tree.map(np.asarray, model.params))
    assert per_device(engine.params, 8) == {weights}
    run(engine, jobs())
    again = [f._cache_size() for f in (device.step, device.prefill, device.seat, device.wipe)]
    assert again == compiled  # neither state nor weights came in another layout
    engine.fail_all("test")
    run(engine, jobs(1))
    assert per_device(engine.programs._slots.cache, 8) == {cached}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True, "output_bias": True, "qk_norm": True},
        {"num_experts": 4, "experts_per_token": 2, "expert_d_ff": 32, "d_ff": 64},
    ],
    ids=["tied", "untied", "experts"],
)
def test_devices_tell_each_other_sums_and_logits_only(changes):
    model = many_headed(num_layers=2, **changes)
    programs = (engine := Engine(model, replace(CONFIG, tensor=4))).programs
    rows, masks = programs._rows((), 3), programs._no_mask[3]
    with on(programs._mesh):
        step = device.step.lower(
            engine.params, programs._slots, rows, *masks, cfg=model.cfg, attend=64
        )
    said = r"= (\S+?)\[([\d,]*)\]\S* (all-\w+|collective-permute|reduce-scatter)(?:-start)?\("
    told = [(op, kind, dims) for kind, dims, op in re.findall(said, step.compile().as_text())]
    gathers = [x for x in told if x[0] != "all-reduce"]
    assert gathers == [("all-gather", "f32", f"3,{VOCAB}")]  # of the logits
    sums = [dims for op, _, dims in told if op == "all-reduce"]
    assert len(sums) == 1 + 2 * model.cfg.num_layers  # the embedding; attention and feed-forward
    assert all(dims.endswith(f",{model.cfg.d_model}") for dims in sums)
    assert all(math.prod(map(int, dims.split(","))) <= 8 * model.cfg.d_model for dims in sums)


def test_integers_are_expanded_and_cut(model):
    whole = replace(model, params=quantize(model.params, QuantConfig(group=32, rank=0)))
    one = Engine(whole, CONFIG).params
    cut = Engine(whole, replace(CONFIG, tensor=8, weights="auto")).params
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(cut))
    jax.tree.map(np.testing.assert_array_equal, cut, one)
    with pytest.raises(UserError, match=r"is a QuantWeight: take weights=expand or auto"):
        Engine(whole, replace(CONFIG, tensor=8, weights="keep"))


def test_a_draft_on_one_device_guesses_for_many(model):
    tokens, _, _ = answers(model, CONFIG)
    config = replace(CONFIG, tensor=2, speculate=2)
    got, _, engine = answers(model, config, draft=model)
    assert got == tokens
    assert engine.stats.accepted > 0


def test_what_cannot_be_shared_out_is_refused_with_the_numbers(model):
    few = make_model(128)
    with pytest.raises(UserError, match=r"tensor=4.*kv_heads=2, vocab=259 must be.*: 1\.$"):
        Engine(few, replace(CONFIG, tensor=4))
    check_cuts(model.cfg, 8)
    with pytest.raises(UserError, match=r"heads=16, kv_heads=8, vocab=264 must.*: 1, 2, 4, 8\."):
        check_cuts(model.cfg, 5)
    with pytest.raises(UserError, match=r"tensor=16 needs as many devices, and 8 are there"):
        Engine(model, replace(CONFIG, tensor=16))
    with pytest.raises(UserError, match="tensor=0"):
        EngineConfig(tensor=0)
    for weights in ("pack", "turn"):
        with pytest.raises(UserError, match=rf"weights={weights} is for kernels, which tensor=2"):
            EngineConfig(tensor=2, weights=weights)


BODY = {
    "model": "tiny",
    "prompt": "ab" * 20,
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}


def test_a_server_over_eight_devices(model):
    """Over HTTP it says what one device says, scores and vectors included."""
    asked = [("completions", BODY | {"echo": True, "logprobs": 1})]
    asked += [("embeddings", {"model": "tiny", "input": ["abc", "a longer text"]})]
    heard = []
    for tensor in (1, 8):
        config = replace(CONFIG, tensor=tensor)
        with serving(model, name="tiny", engine=config) as url:
            made = [httpx.post(f"{url}/{path}", json=x, timeout=60).json() for path, x in asked]
        heard.append((made[0]["choices"][0], np.array([x["embedding"] for x in made[1]["data"]])))
    (one, vectors), (many, others) = heard
    assert many["text"] == one["text"]
    assert many["logprobs"]["tokens"] == one["logprobs"]["tokens"]
    wanted, values = (x["logprobs"]["token_logprobs"][1:] for x in (one, many))
    np.testing.assert_allclose(values, wanted, atol=1e-4)
    np.testing.assert_allclose(others, vectors, atol=1e-5)


@pytest.mark.slow
def test_the_command_over_two_devices(model, tmp_path):
    """`internjax serve` cuts the model and says what one device would."""
    save_native(tmp_path / "smollm2-tiny", model.cfg, model.params, model.tokenizer)
    with serving(model, name="tiny", engine=CONFIG) as url:
        want = httpx.post(url + "/completions", json=BODY, timeout=60).json()["choices"]
    options = ["serve.name=tiny", "serve.port=0", "serve.engine.tensor=2", "serve.engine.slots=3"]
    command = [sys.executable, "-m", "internjax.cli", "serve", str(tmp_path / "smollm2-tiny")]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    with subprocess.Popen(
        [*command, *options, "serve.engine.context=64", "serve.engine.block=8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    ) as server:
        url = re.search(r"(http://\S+)/v1", server.stdout.readline())[1]
        got = httpx.post(url + "/v1/completions", json=BODY, timeout=60).json()["choices"]
        server.terminate()
        said = server.communicate(timeout=60)[1]
    assert got == want
    assert server.returncode == 0
    assert "tensor=2: XLA cuts the programs" in said
