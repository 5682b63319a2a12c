"""What the other tests stand on: the fakes do what they say."""

import jax.numpy as jnp

from internjax.models.decoder import forward
from internjax.models.lm import LM, SamplingParams
from tests.fakes import BYTE_VOCAB, ScriptedLM, byte_tokenizer, tiny_model


def test_byte_tokenizer_returns_every_text():
    tokenizer = byte_tokenizer()
    text = "naïve 书生 \t\n🙂 <|im_start|>"
    assert tokenizer.vocab_size == BYTE_VOCAB
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("AB", specials=False) == [65, 66]
    assert tokenizer.encode("<|im_end|>") == [258]


def test_tiny_model_computes():
    cfg, params = tiny_model(num_layers=1)
    logits = forward(params, jnp.zeros((1, 4), jnp.int32), cfg)
    assert logits.shape == (1, 4, BYTE_VOCAB)


def test_scripted_lm_is_an_lm():
    lm = ScriptedLM(["one STOP two", "three"])
    assert isinstance(lm, LM)
    first, second = lm.generate(["a", "b"], SamplingParams(stop=(" STOP",)))
    assert (first.text, second.text, lm.asked) == ("one", "three", ["a", "b"])
