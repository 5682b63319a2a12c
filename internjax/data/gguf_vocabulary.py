"""Rebuilds a tokenizer engine from the vocabulary that a GGUF file carries.

`gpt2` vocabularies (tokens + merges) become a `tokenizer.json`, `llama` ones (pieces + scores) a
SentencePiece model, so that only two engines exist. The file names its pre-tokenizer in
`tokenizer.ggml.pre`; the names are llama.cpp's (src/llama-vocab.cpp), the patterns those of the
`tokenizer.json` files the models were released with.
"""

from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm_proto

from internjax.data.tokenizer_engines import BpeEngine, SentencePieceEngine
from internjax.errors import Corrupt, UserError

# tokenizer.ggml.token_type, numbered as in SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _GPT4.replace("DIGITS", "{1,3}")
_QWEN2 = _GPT4.replace("DIGITS", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
_DIGIT = r"\p{N}"

# Name -> the patterns applied one after another; each splits what the ones before left whole.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = (
    dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo", "jina-en", "roberta-bpe", "exaone4"], (_GPT2,))
    | dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], (_DIGIT, _GPT2))
    | dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"], (_LLAMA3,))
    | dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"], (_QWEN2,))
    | {
        "qwen35": (_QWEN35,),
        "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
        # What llama.cpp does where a file names nothing better.
        "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    }
)
# A word that is a token as a whole is taken without merging.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
_NFC = ("qwen2", "deepseek-r1-qwen")


def engine_from_metadata(metadata: dict[str, Any]) -> BpeEngine | SentencePieceEngine:
    """Builds the engine from a GGUF file's keys.

    Raises:
        UserError: the vocabulary is of a kind that is not read, or its pre-tokenizer is unknown.
        Corrupt: its arrays are missing or do not fit each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"The GGUF vocabulary is of kind {kind!r}; 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are read."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise Corrupt("The GGUF file has no tokenizer.ggml.tokens: it holds no vocabulary.")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise Corrupt(f"The GGUF file has {len(tokens)} tokens but {len(types)} token types.")
    if not set(map(int, types)) <= set(range(7)):
        raise Corrupt("The GGUF file has token types beyond 0..6: it is damaged.")
    build = _byte_level if kind == "gpt2" else _sentencepiece
    return build(metadata, tokens, [int(each) for each in types])


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> BpeEngine:
    merges = metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise Corrupt("The GGUF file has a gpt2 vocabulary but no tokenizer.ggml.merges.")
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"The GGUF pre-tokenizer {name!r} is not known; known are {', '.join(PRE_TOKENIZERS)}. "
            "Put the model's own tokenizer.json beside it and load that."
        )
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in PRE_TOKENIZERS[name]
    ]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, text, types[index] == _CONTROL)
            for index, text in enumerate(tokens)
            if types[index] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if name in _NFC else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, byte_level | {"add_prefix_space": prefix}],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in _WHOLE_WORDS,
            "vocab": {text: index for index, text in enumerate(tokens)},
            "merges": [_split_merge(merge) for merge in merges],
        },
    }
    return BpeEngine(spec)


def _split_merge(merge: str) -> list[str]:
    left, _, right = merge[1:].partition(" ")  # the first letter may itself be a blank
    return [merge[0] + left, right]


def _added_token(index: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": index, "content": text, **flags, "special": special}


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> SentencePieceEngine:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise Corrupt("The GGUF file has a llama vocabulary without one score for each token.")
    proto = spm_proto.ModelProto()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    for index, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind == _UNKNOWN and index != unknown:  # SentencePiece wants one; files mark several
            kind = _CONTROL
        proto.pieces.add(piece=text, score=float(score), type=kind)
    proto.trainer_spec.model_type = spm_proto.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(tokens)
    proto.trainer_spec.byte_fallback = spm_proto.ModelProto.SentencePiece.BYTE in types
    proto.normalizer_spec.name = "identity"
    for key, default in (("add_dummy_prefix", True), ("remove_extra_whitespaces", False)):
        name = "add_space_prefix" if key == "add_dummy_prefix" else key
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        setattr(proto.normalizer_spec, key, bool(value))
    return SentencePieceEngine(proto.SerializeToString())
