"""Another program reads our 4-bit folders: vLLM on CPU, beside us, on the same text.

    .venv/bin/python benchmarks/packed_readers.py [MODEL] [methods=awq] [tokens=128]

Quantizes MODEL by each method (8 rows of calibration: what is tested is the layout), writes it as a
Hugging Face folder in the packed layout of that method (`convert to=hf quant=METHOD`), lets vLLM
serve the folder and asks for the log-probabilities of an echoed text. vLLM 0.32 refuses GPTQ with
zeros ("bits=4, sym=False"), which ours has; tests/test_models_hf_packed.py holds it to the bytes.
Our log-probabilities are those of the same folder, read back by `internjax.load`, in float32.
Prints a line a method,

    READER vllm METHOD ok|differs: mean log-probability ours ..., theirs ..., float32's ...

and exits with 1 when the two means differ by more than `NEAR`, with 3 when vLLM is not there
(`make serve-peers`). vLLM computes in bfloat16; weights in a wrong order would cost whole nats.
"""

import itertools
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from peer_servers import MODEL, Running, running, vllm

from internjax.adapt.quantize import QuantConfig, compress
from internjax.adapt.texts import CalibrationConfig, read_texts, text_path
from internjax.models.convert import convert
from internjax.models.load import Model, load
from internjax.models.native import save_native
from internjax.models.score import token_logprobs

NEAR = 0.05  # nats a token; bfloat16 moves the mean by about a hundredth
CALIBRATION = CalibrationConfig(text="raw-web:wiki_demo", sequences=8, tokens=256)


def packed_folder(model: Model, method: str, folder: Path) -> Path:
    """Quantizes and writes the layout that others publish; returns its folder."""
    params = compress(model, QuantConfig(method=method, calibration=CALIBRATION))
    save_native(folder / "native", model.cfg, params, model.tokenizer)
    convert(folder / "native", folder / method, to="hf", quant=method, dtype="bfloat16")
    return folder / method


def ours(model: Model, ids: list[int]) -> float:
    """Mean log-probability of all tokens but the first."""
    logprobs, _ = token_logprobs(model.params, np.asarray([ids], np.int32), model.cfg)
    return float(logprobs.mean())


def theirs(server: Running, ids: list[int]) -> float:
    """The same, as the server answers."""
    body = {"model": MODEL, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body | {"temperature": 0}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        (choice,) = json.load(answer)["choices"]
    return float(np.mean(choice["logprobs"]["token_logprobs"][1 : len(ids)]))


def read_by_vllm(model: Model, method: str, ids: list[int]) -> bool | None:
    """Compares; returns whether both read the same weights, None without vLLM."""
    with tempfile.TemporaryDirectory() as kept:
        folder = packed_folder(model, method, Path(kept))
        here = ours(load(folder), ids)
        with running([vllm("bfloat16", folder)], Path(kept)) as started:
            if not started:
                return None
            (server,) = started.values()
            server.resume()
            there = theirs(server, ids)
    alike = abs(here - there) <= NEAR
    exact = ours(model, ids)
    print(
        f"READER vllm {method} {'ok' if alike else 'differs'}: mean log-probability"
        f" ours {here:.4f}, theirs {there:.4f}, float32's {exact:.4f}",
        flush=True,
    )
    return alike


def main(args: list[str]) -> int:
    """One method after the other."""
    options = dict(arg.split("=", 1) for arg in args if "=" in arg)
    if unknown := options.keys() - {"methods", "tokens"}:
        sys.exit(f"unknown option {', '.join(unknown)}: legal are methods, tokens")
    model = load(next((arg for arg in args if "=" not in arg), "smollm2-135m-instruct"))
    text = "\n".join(itertools.islice(read_texts(text_path("raw-web:c4_demo")), 8))
    ids = model.tokenizer.encode(text)[: int(options.get("tokens", 128))]
    methods = options.get("methods", "awq").split(",")
    said = [read_by_vllm(model, method, ids) for method in methods]
    return 1 if False in said else 3 if None in said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
