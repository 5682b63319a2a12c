"""Our decoder on every family's checkpoint = torch's logits (tests/reference/make_goldens.py)."""

import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.data.chat import render, template_for
from internjax.data.tokenizer import load_tokenizer
from internjax.models.convert import convert
from internjax.models.decoder import forward
from internjax.models.gguf import load_gguf
from internjax.models.hf import load_hf
from internjax.models.rope import inv_freq
from tests.reference.tiny import VARIANTS, write_tiny

LENGTHS = (12, 40)
SMOLLM2 = [  # question, prompt tokens, three largest first logits, whole greedy answer
    (
        "What is the capital of France?",
        37,
        (25.325, 25.243, 24.942),
        "The capital of France is Paris.",
    ),
    (
        "Tom has 3 apples and buys 4 more. How many apples does he have?",
        48,
        (29.381, 28.726, 28.507),
        "Tom has 3 apples and 4 more apples, so he has 3 + 4 = 7 apples.",
    ),
]
TOLERANCE = 2e-4  # float32; measured 4e-6, so a wrong rotation, bias or epsilon does not hide


@partial(jax.jit, static_argnames="cfg")
def _forward(params, tokens, freq, cfg):
    return forward(params, tokens, cfg, inv_freq=freq)


def _logits(cfg, params, tokens):
    """Dynamic NTK chooses its base by the length of the request, as a server would.

    Short rows are padded behind, so that both lengths run one compiled program.
    """
    freq = jnp.asarray(inv_freq(cfg, length=len(tokens)), jnp.float32)
    row = np.zeros((1, max(LENGTHS)), np.int32)
    row[0, : len(tokens)] = tokens
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(_forward(params, row, freq, cfg)[0])[: len(tokens)]


@pytest.fixture(scope="module")
def goldens(request):
    return np.load(request.path.parent / "goldens" / "logits.npz")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_torch(variant, goldens, tmp_path):
    cfg, params = load_hf(write_tiny(variant, tmp_path / variant))
    for length in LENGTHS:
        logits = _logits(cfg, params, goldens[f"tokens-{length}"])[goldens["kept"]]
        assert np.abs(logits - goldens[f"{variant}-{length}"]).max() <= TOLERANCE


def test_goldens_tell_the_variants_apart(goldens):
    """Each rule of a variant moves the logits by far more than the tolerance."""
    pairs = [
        ("internlm", "internlm-dynamic"),
        ("internlm2", "internlm2-dynamic"),
        ("qwen2", "qwen2-yarn"),
    ]
    for plain, other in pairs:
        distance = np.abs(goldens[f"{plain}-40"] - goldens[f"{other}-40"]).max()
        assert distance > 20 * TOLERANCE, (plain, distance)


@pytest.mark.needs_model
def test_smollm2_reproduces_the_reference(smollm2_gguf):
    """Greedy answers and first logits of a float32 NumPy run over the same GGUF.

    The answer is fed after its prompt: it is the greedy one if every token is the best of the
    position before it.
    """
    cfg, params = load_gguf(smollm2_gguf, dtype="float32")
    tokenizer, template = load_tokenizer(smollm2_gguf), template_for(smollm2_gguf)
    rows = np.zeros((len(SMOLLM2), 80), np.int32)  # causal: padding behind the answer is not seen
    spans = []
    for row, (question, num_tokens, _, answer) in zip(rows, SMOLLM2, strict=True):
        message = {"role": "user", "content": question}
        ids = tokenizer.encode(render(template, [message], add_generation_prompt=True))
        assert len(ids) == num_tokens
        out = [*tokenizer.encode(answer), tokenizer.eos_id]
        row[: len(ids) + len(out)] = ids + out
        spans.append((len(ids), len(out)))
    freq = jnp.asarray(inv_freq(cfg), jnp.float32)
    logits = np.asarray(_forward(jax.tree.map(jnp.asarray, params), rows, freq, cfg))
    for row, got, (start, num_out), (*_, top, _) in zip(rows, logits, spans, SMOLLM2, strict=True):
        np.testing.assert_allclose(np.sort(got[start - 1])[:-4:-1], top, atol=2e-3)
        best = got[start - 1 : start + num_out - 1].argmax(-1)
        assert best.tolist() == row[start : start + num_out].tolist()


@pytest.mark.slow
def test_transformers_reads_what_we_export(request, tmp_path):
    """Every family's export, in the real transformers, computes the goldens."""
    root = request.path.parents[1]
    python = root / ".venv-peers" / "bin" / "python"
    if not python.is_file():
        pytest.skip("no peers' environment: make peers")
    for variant, (family, _) in VARIANTS.items():
        if variant == "internlm3-bias":  # Llama cannot hold biases on q, k, v alone
            continue
        layout = "llama" if family.startswith("internlm") else ""
        src = write_tiny(variant, tmp_path / "src" / variant)
        convert(src, tmp_path / "out" / variant, to="hf", family=layout)
    command = [python, "-m", "tests.reference.check_exports", tmp_path / "out"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) == 2 * (len(VARIANTS) - 1)
