"""Small true things for tests: a tiny model's shape, a byte tokenizer, a scripted LM.

Nothing here pretends to be a result: the tiny model computes, the tokenizer encodes every text,
and the scripted LM says that it is scripted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax

from internjax.data.tokenizer import Tokenizer
from internjax.data.tokenizer_engines import BpeEngine, byte_alphabet
from internjax.models.config import ModelConfig
from internjax.models.decoder import init_params
from internjax.models.lm import Generation, Loglik, Progress, Prompt, SamplingParams
from internjax.tree import Params

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTE_VOCAB = 256 + len(SPECIALS)

TINY = ModelConfig(
    name="tiny",
    family="smollm2",
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    vocab_size=BYTE_VOCAB,
    max_context=128,
    norm_eps=1e-5,
    tie_embeddings=True,
)


def tiny_model(seed: int = 0, **changes) -> tuple[ModelConfig, Params]:
    """Returns a random model over `byte_tokenizer`'s vocabulary, with changes to its shape."""
    cfg = replace(TINY, **changes)
    return cfg, init_params(cfg, jax.random.key(seed))


def byte_tokenizer(more: Sequence[str] = ()) -> Tokenizer:
    """Returns a byte-level BPE without merges: id = byte, then the markers of ChatML, and more."""
    added = [
        {
            "id": 256 + index,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, text in enumerate((*SPECIALS, *more))
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": byte_alphabet(), "merges": [], "byte_fallback": False},
    }
    engine = BpeEngine(spec)
    end = engine.special["<|im_end|>"]
    return Tokenizer(
        engine=engine,
        special_tokens=engine.special,
        bos_id=engine.special["<|endoftext|>"],
        eos_id=end,
        pad_id=engine.special["<|endoftext|>"],
        eos_ids=(end, engine.special["<|endoftext|>"]),
    )


class ScriptedLM:
    """An `LM` whose answers are written beforehand, in order, or made by a function of the prompt.

    `asked` keeps every prompt. Likelihood is 0 for what the script would say, -10 nats a character
    otherwise, so that multiple-choice code can be driven to any outcome.
    """

    name = "scripted"

    def __init__(self, script: Sequence[str] | Callable[[Prompt], str]):
        self._script = script if callable(script) else iter(script)
        self.asked: list[Prompt] = []

    def _answer(self, prompt: Prompt) -> str:
        self.asked.append(prompt)
        return self._script(prompt) if callable(self._script) else next(self._script)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        answers = []
        for done, prompt in enumerate(prompts, start=1):
            text = self._answer(prompt)
            for stop in params.stop:
                text = text.partition(stop)[0]
            answers.append(Generation(text, (), "stop", len(str(prompt)), None, len(text)))
            if progress:
                progress(done, len(prompts))
        return answers

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        yield from self.generate([prompt], params)[0].text

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Loglik]:
        scores = []
        for context, continuation in pairs:
            said = self._answer(context) == continuation.strip()
            length = max(1, len(continuation))
            scores.append(Loglik(0.0 if said else -10.0 * length, length, said))
        return scores

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        return [-float(len(text)) for text in texts]
