"""A tokenizer trained from documents: SentencePiece BPE with byte fallback, as InternLM's own.

Made for a mixture of languages: characters that did not get a piece are written as bytes, so no
text is unknown, and decoding gives back every text but the letter U+2581, SentencePiece's blank.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from internjax.data.files import folder_whole
from internjax.data.special_tokens import INTERNLM2
from internjax.data.tokenizer import Tokenizer, load_tokenizer
from internjax.errors import UserError

CONTROL = tuple(INTERNLM2)  # <|im_start|> and the others, so that chats can be trained later
LINE_CHARACTERS = 1000  # SentencePiece silently leaves out lines above 4,192 bytes
SAMPLE_LINES = 2_000_000  # drawn from larger corpora; more take memory and change little


def train_tokenizer(
    texts: Iterable[str], out: Path, *, vocab_size: int, coverage: float = 0.9995, seed: int = 0
) -> Tokenizer:
    """Writes a folder that `load_tokenizer` reads, and returns its tokenizer.

    Its ids are `<unk>` 0, `<s>` 1, `</s>` 2, the chat markers, 256 bytes, and the pieces learned.

    Args:
      texts: documents, in the proportions of languages that the vocabulary shall serve.
      out: appears whole or not at all.
      vocab_size: ids in all.
      coverage: share of the characters of the texts that get a piece; rarer ones become bytes.
      seed: of the sample of lines. The same texts and seed give the same tokenizer.

    Raises:
      UserError: too little text for so many ids, or so few ids that the characters do not fit.
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage={coverage} must lie in 0 < x <= 1.")
    model, lines = io.BytesIO(), _Lines(texts)
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            control_symbols=list(CONTROL),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            input_sentence_size=SAMPLE_LINES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error:  # SentencePiece makes text of it, traceback and all
            raise lines.error from None
        raise UserError(_advice(str(error), vocab_size)) from error
    with folder_whole(out) as folder:
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        load_tokenizer(folder).save(folder)
    return load_tokenizer(out)


class _Lines:
    """The lines of texts, none too long; keeps the error that reading the texts ended with."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.error = texts, None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                for line in text.splitlines():
                    for start in range(0, len(line), LINE_CHARACTERS):
                        yield line[start : start + LINE_CHARACTERS]
        except UserError as error:
            self.error = error
            raise


def _advice(message: str, vocab_size: int) -> str:
    words = " ".join(message.split())
    if "smaller than required_chars" in words:
        return (
            f"vocab_size={vocab_size} does not hold the bytes, markers and characters of these "
            f"texts: raise it, or lower coverage. ({words})"
        )
    if "Vocabulary size too high" in words:
        return f"vocab_size={vocab_size} is more than these texts give: lower it. ({words})"
    if "!sentences_.empty()" in words:
        return "there is no text to train a tokenizer on."
    return f"no tokenizer can be trained on these texts: {words}"
