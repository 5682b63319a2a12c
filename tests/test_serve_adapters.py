"""Laws of adapters in one batch: each as its merged model, the others not touched by a bit."""

from dataclasses import replace

import httpx2 as httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from internjax.adapt.lora import attach, init_adapter, merge
from internjax.adapt.quantize import QuantConfig, quantize, quantize_array
from internjax.errors import Missing, UserError
from internjax.kernels.cpu import library
from internjax.models.lm import SamplingParams
from internjax.models.peft import LoraConfig, save_adapter
from internjax.serve import slots as device
from internjax.serve.adapters import put
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.score import prompt_logprobs
from internjax.serve.server import ServeConfig, serving
from internjax.weights import LoraWeight, StackedLora, einsum, einsums, pack
from tests.test_serve_engine import logprobs_of, make_model, prompts, run

CONFIG = EngineConfig(
    slots=4, context=128, block=16, prefill_tokens=64, activations="f32", adapters=3, adapter_rank=4
)
KERNELS = pytest.mark.skipif(library.library() is None, reason="no C++ compiler at install")
LORAS = {
    "a": LoraConfig(rank=4, alpha=8.0),
    "b": LoraConfig(rank=2, alpha=3.0, targets=("wq", "wo", "w_down")),
    "c": LoraConfig(rank=3, alpha=3.0),
}
GREEDY = SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True)


def make_adapter(model, name):
    """An adapter that changes texts: b = 0 would hide every mistake."""
    adapter = init_adapter(model.cfg, LORAS[name], jax.random.key(ord(name)))
    keys = iter(jax.random.split(jax.random.key(ord(name) + 1), 20))
    noisy = lambda x: x + 0.15 * jax.random.normal(next(keys), x.shape, x.dtype)  # noqa: E731
    return jax.tree.map(noisy, adapter), LORAS[name]


def make_engine(model, names="abc", **changes):
    engine = Engine(model, replace(CONFIG, **changes))
    for name in names:
        engine.adapters.add(name, *make_adapter(model, name))
    return engine


def jobs(*names):
    """One prompt for all: only the adapter tells the answers apart."""
    return [(prompts(40)[0], GREEDY, name) for name in names]


def play(engine, wanted):
    """Runs (prompt, params, adapter) together; returns what each heard, token by token."""
    news = [[] for _ in wanted]
    for (prompt, params, name), heard in zip(wanted, news, strict=True):
        engine.submit(prompt, params, heard.append, adapter=name)
    while engine.step():
        pass
    assert all(heard[-1].finish_reason == "length" for heard in news)
    return [logprobs_of(heard) for heard in news]


def packed_model():
    model = make_model(128, d_model=512, head_dim=16, tie_embeddings=True)
    params = quantize(model.params, QuantConfig(group=32, rank=0))
    params["embed"] = pack(quantize_array(params["embed"].T, 1, 32))
    return replace(model, params=params)


@pytest.fixture(scope="module")
def model():
    return make_model(128)


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(model, prefix_cache=False)


def alone(model, name, fold=merge):
    """What the model with one adapter says in an engine that has no places."""
    if name:
        model = replace(model, params=fold(attach(model.params, *make_adapter(model, name))))
    engine = Engine(model, replace(CONFIG, adapters=0))
    return logprobs_of(run(engine, [(prompts(40)[0], GREEDY)])[1][0])


def check_alike(got, want):
    assert [e.id for e in got] == [e.id for e in want]
    assert [e.logprob for e in got] == pytest.approx([e.logprob for e in want], abs=2e-3)


@pytest.mark.parametrize("places", [3, 6])  # fewer than rows, and more
def test_a_mixed_batch_says_what_the_merged_models_say(model, places):
    names = ["a", "", "b", "c", "", "a"]  # more than slots
    heard = play(make_engine(model, adapters=places), jobs(*names))
    for name, got in zip(names, heard, strict=True):
        check_alike(got, alone(model, name))
    assert len({tuple(e.id for e in h) for h in heard}) == 4  # they do differ


@KERNELS
def test_integers_of_the_kernels_carry_adapters():
    model = packed_model()
    engine = make_engine(model, "a")
    assert Engine(model, replace(CONFIG, adapters=0)).programs.sizes == (1, 4)
    assert engine.programs.sizes == (4,)  # corrections are products of XLA
    base, adapted = play(engine, jobs("", "a"))
    check_alike(base, alone(model, ""))
    check_alike(adapted, alone(model, "a", fold=lambda params: params))  # folded in, none is left


def test_no_bit_depends_on_mates(model, engine):
    names = ["a", "", "b", "c", "", "a"]
    together = play(engine, jobs(*names))
    for name, heard in zip(names, together, strict=True):
        assert play(engine, jobs(name)) == [heard]
    # nor, for the model itself, on what is loaded
    assert play(make_engine(model, "", prefix_cache=False), jobs("")) == [together[1]]


def test_invariant_answers_stay_so_with_adapters(model):
    plain = make_engine(model, invariant=True, prefix_cache=False)
    names = ["a", "", "b", "a"]
    single = [play(plain, jobs(name))[0] for name in names]
    shared = make_engine(model, invariant=True, blocks=9)  # one request alone takes 4
    for _ in range(2):
        assert play(shared, jobs(*names)) == single
    assert shared.stats.prefix_tokens > 0
    assert shared.stats.preempted > 0


def test_no_places_change_nothing(model):
    engine = Engine(model, replace(CONFIG, adapters=0))
    stacked = lambda x: isinstance(x, StackedLora)  # noqa: E731
    assert not any(map(stacked, jax.tree.leaves(engine.params, is_leaf=stacked)))
    with pytest.raises(UserError, match="adapters=0"):
        engine.adapters.add("a", *make_adapter(model, "a"))


def test_loading_and_unloading_while_others_run(model):
    engine = make_engine(model, "", prefix_cache=False, adapters=2)
    engine.warm_up()
    programs = engine.stats.programs
    compiled = device.step._cache_size(), device.prefill._cache_size(), put._cache_size()
    want = {n: play(make_engine(model, n, prefix_cache=False, adapters=2), jobs(n)) for n in "abc"}
    base = play(engine, jobs(""))
    news = {name: [] for name in ("", "a", "b")}

    def start(name):
        prompt, params, _ = jobs(name)[0]
        return engine.submit(prompt, params, news[name].append, adapter=name)

    start("")
    engine.adapters.add("a", *make_adapter(model, "a"))
    running = start("a")
    for _ in range(5):
        engine.step()
    engine.adapters.add("b", *make_adapter(model, "b"))
    start("b")
    engine.step()
    engine.adapters.unload("a")
    assert engine.adapters.names() == ["b"]
    assert running.finish_reason is None
    with pytest.raises(UserError, match="adapter 'a' is not loaded; loaded: b"):
        start("a")
    with pytest.raises(UserError, match="still use"):
        engine.adapters.add("c", *make_adapter(model, "c"))
    while engine.step():
        pass
    said = {name: [logprobs_of(heard)] for name, heard in news.items()}
    assert said == {"": base, "a": want["a"], "b": want["b"]}
    engine.adapters.add("c", *make_adapter(model, "c"))  # takes the place of a
    assert play(engine, jobs("c")) == want["c"]
    assert engine.stats.programs == programs
    assert engine.stats.recompilations == 0
    now = device.step._cache_size(), device.prefill._cache_size(), put._cache_size()
    assert now == compiled


def test_prefixes_are_not_shared_across_adapters(model):
    engine = make_engine(model)
    heard = {name: play(engine, jobs(name)) for name in ("", "a", "b")}
    assert engine.stats.prefix_tokens == 0
    for name in heard:
        play(engine, jobs(name))
    assert engine.stats.prefix_tokens == 3 * 32
    engine.adapters.unload("a")
    engine.adapters.add("a", *make_adapter(model, "c"))  # other weights under the same name
    other = play(engine, jobs("a"))
    assert engine.stats.prefix_tokens == 3 * 32
    assert other == play(make_engine(model, "c", prefix_cache=False), jobs("c"))
    assert other != heard["a"]


def test_other_weights_keep_their_adapters(model, engine):
    before = play(engine, jobs("", "a"))
    engine.set_params(jax.tree.map(lambda x: x * 0.5 if x.ndim == 1 else x, model.params))
    assert all(x != y for x, y in zip(before, play(engine, jobs("", "a")), strict=True))
    engine.set_params(model.params)
    assert play(engine, jobs("", "a")) == before


def test_adapters_that_do_not_fit_are_refused(model):
    engine = make_engine(model, "ab", adapters=2)
    adapter, lora = make_adapter(model, "c")
    with pytest.raises(UserError, match=r"all 2 places are taken \(a, b\)"):
        engine.adapters.add("c", adapter, lora)
    with pytest.raises(UserError, match="empty or taken"):
        engine.adapters.add("a", adapter, lora)
    engine.adapters.unload("a")
    with pytest.raises(UserError, match="adapter 'a' is not loaded"):
        engine.adapters.unload("a")
    wide = LoraConfig(rank=5, alpha=1.0)
    with pytest.raises(UserError, match=r"rank 5.*up to 4.*adapter_rank=5"):
        engine.adapters.add("c", init_adapter(model.cfg, wide, jax.random.key(0)), wide)
    with pytest.raises(UserError, match="targets=router"):
        engine.adapters.add("c", {"layers": {"router": adapter["layers"]["wq"]}}, lora)
    wrong = {"layers": {"wq": {x: y[..., 1:] for x, y in adapter["layers"]["wk"].items()}}}
    with pytest.raises(UserError, match="factor of wq is"):
        engine.adapters.add("c", wrong, lora)
    holes = jax.tree.map(lambda x: x.at[0].set(jnp.inf), adapter)
    with pytest.raises(UserError, match="NaN or infinite"):
        engine.adapters.add("c", holes, lora)
    with pytest.raises(UserError, match="adapter_rank=0"):
        replace(CONFIG, adapter_rank=0)
    with pytest.raises(UserError, match=r"engine.adapters=0.*at least 1"):
        ServeConfig(adapters={"a": "somewhere"})
    with pytest.raises(Missing, match="no such folder"):
        ServeConfig(adapters_dir="/nowhere/at/all", engine=CONFIG)


@pytest.mark.parametrize("sequences", [2, 5])  # fewer than the 3 corrections, and more
def test_products_are_those_of_the_chosen_adapters(sequences):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    N, H, D, A, R, T = 2, 3, 6, 3, 2, 4
    x, base = draw(0, sequences, T, N, H), draw(1, N, H, D)
    a, b = draw(2, N, H, A, R), draw(3, A, R, D)
    chosen = np.array([1, -1, 0, 2, 1], np.int32)[:sequences]
    w = StackedLora(base, a, b, jnp.asarray(chosen))
    spec = "BTNH,NHD->BTD"
    got = einsum(spec, x, w)
    plain = einsum(spec, x, base)
    for i, which in enumerate(chosen):
        one = LoraWeight(base, a[:, :, which], b[which], 1.0) if which >= 0 else base
        np.testing.assert_allclose(got[i], einsum(spec, x[i : i + 1], one)[0], atol=1e-5)
    np.testing.assert_array_equal(got[1], plain[1])
    np.testing.assert_array_equal(einsum(spec, x, w.replace(chosen=None)), plain)
    every = einsum(spec, x, w.replace(chosen=jnp.int32(1)))
    want = einsum(spec, x, LoraWeight(base, a[:, :, 1], b[1], 1.0))
    np.testing.assert_allclose(every, want, atol=1e-5)
    both = einsums((spec, spec), x, (w, base))
    np.testing.assert_array_equal(both[0], got)
    np.testing.assert_array_equal(both[1], plain)


# Over HTTP --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """A folder that clients may load from, and one beside it that they may not."""
    root = tmp_path_factory.mktemp("adapters")
    for name, folder in {"a": "open/a", "b": "open/deep/b", "c": "closed/c"}.items():
        save_adapter(root / folder, *make_adapter(model, name), "tiny")
    (root / "open" / "link").symlink_to(root / "closed" / "c")
    (root / "open" / "bad").mkdir()
    (root / "open" / "bad" / "adapter_config.json").write_text("{}")
    (root / "open" / "bad" / "adapter_model.safetensors").write_bytes(b"x" * 20)
    return root


@pytest.fixture(scope="module")
def url(model, folders):
    options = {"adapters": {"first": str(folders / "closed/c")}}
    options |= {"adapters_dir": str(folders / "open"), "name": "tiny", "engine": CONFIG}
    with serving(model, **options) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def post(url, path, **body):
    return httpx.post(f"{url}/{path}", json=body, timeout=60)


def test_adapters_are_models_of_the_api(model, client, url):
    ids = prompts(40)[0]

    def said(name):
        options = {"max_tokens": 12, "temperature": 0, "logprobs": 0}
        made = client.completions.create(
            model=name, prompt=ids, extra_body={"ignore_eos": True}, **options
        )
        assert made.model == name
        return made.choices[0].logprobs.token_logprobs

    logprobs = lambda name: [e.logprob for e in alone(model, name)]  # noqa: E731
    assert said("first") == pytest.approx(logprobs("c"), abs=2e-3)
    for name, path in (("a", "a"), ("b", "deep/b")):
        assert post(url, "load_lora_adapter", lora_name=name, lora_path=path).status_code == 200
        assert said(name) == pytest.approx(logprobs(name), abs=2e-3)
    assert said("tiny") == pytest.approx(logprobs(""), abs=2e-3)
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert {n: c["parent"] for n, c in cards.items()} == {"tiny": None} | dict.fromkeys(
        ("first", "a", "b"), "tiny"
    )
    full = post(url, "load_lora_adapter", lora_name="d", lora_path="a")
    assert full.status_code == 400
    assert "all 3 places are taken" in full.json()["error"]["message"]
    for name in "ab":
        assert post(url, "unload_lora_adapter", lora_name=name).status_code == 200
        with pytest.raises(openai.NotFoundError, match="served: tiny, first"):
            said(name)


def test_scores_and_embeddings_are_the_adapters(model, client):
    ids = prompts(30)[0]
    made = client.completions.create(model="first", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    merged = merge(attach(model.params, *make_adapter(model, "c")))
    want = [e.logprob for e in prompt_logprobs(merged, model.cfg, ids, 0)[1:]]
    assert made.choices[0].logprobs.token_logprobs[1:] == pytest.approx(want, abs=2e-3)
    one, other = (
        client.embeddings.create(model=name, input=["abc", "d" * 20]).data[0].embedding
        for name in ("tiny", "first")
    )
    assert np.abs(np.array(one) - np.array(other)).max() > 1e-3


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"lora_name": "x", "lora_path": "../closed/c"}, 403, "must lie in"),
        ({"lora_name": "x", "lora_path": "../nothing"}, 403, "must lie in"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "must lie in"),
        ({"lora_name": "x", "lora_path": "link"}, 403, "must lie in"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "no path"),
        ({"lora_name": "x", "lora_path": "nothing"}, 400, "no PEFT adapter"),
        ({"lora_name": "x", "lora_path": "bad"}, 400, "no whole safetensors"),
        ({"lora_name": "tiny", "lora_path": "a"}, 400, "served already"),
        ({"lora_name": "first", "lora_path": "a"}, 400, "served already"),
        ({"lora_name": "", "lora_path": "a"}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "a", "more": 1}, 400, "more"),
    ],
)
def test_loads_that_are_refused(url, client, body, status, says):
    answer = post(url, "load_lora_adapter", **body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert [card.id for card in client.models.list()] == ["tiny", "first"]


def test_unloads_that_are_refused(url):
    assert post(url, "unload_lora_adapter", lora_name="x").status_code == 404
    answer = post(url, "unload_lora_adapter", lora_name="tiny")
    assert answer.status_code == 400
    assert "the model itself" in answer.json()["error"]["message"]


def test_clients_load_nothing_unless_a_folder_is_named(model):
    with serving(model, name="tiny", engine=replace(CONFIG, adapters=0)) as url:
        for path, body in (("load", {"lora_path": "a"}), ("unload", {})):
            answer = post(url, f"{path}_lora_adapter", lora_name="x", **body)
            assert answer.status_code == 403
            assert "serve.adapters_dir" in answer.json()["error"]["message"]
    options = {"adapters": {"tiny": "somewhere"}, "engine": CONFIG}
    with pytest.raises(UserError, match="the model itself"), serving(model, name="tiny", **options):
        pass
