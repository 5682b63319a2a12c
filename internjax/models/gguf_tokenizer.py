"""A Tokenizer as the `tokenizer.*` keys of a GGUF file: inverse of `data.gguf_vocabulary`."""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm_proto

from internjax.data.gguf_vocabulary import PRE_TOKENIZERS
from internjax.data.tokenizer import Tokenizer, load_tokenizer
from internjax.data.tokenizer_engines import BpeEngine
from internjax.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_GPT2 = PRE_TOKENIZERS["gpt-2"][0]


def metadata_of(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Reads a checkpoint folder's tokenizer into GGUF keys.

    Args:
      vocab_size: rows of the embedding; ids beyond the vocabulary become unused tokens.

    Raises: UserError when GGUF has no name for the tokenizer's way of splitting text.
    """
    tokenizer = load_tokenizer(folder)
    engine = tokenizer.engine
    if isinstance(engine, BpeEngine) and _byte_level(engine.spec):
        vocabulary = _from_bpe(engine.spec, vocab_size)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _from_sentencepiece((folder / "tokenizer.model").read_bytes(), vocab_size)
    else:
        raise UserError(
            f"{folder}: tokenizer.json is no byte-level BPE; put the tokenizer.model it was made"
            " from beside it to write a GGUF."
        )
    for text, index in tokenizer.special_tokens.items():
        vocabulary["tokens"][index] = text
        if vocabulary["token_type"][index] in (_NORMAL, _USER_DEFINED, _UNUSED):
            vocabulary["token_type"][index] = _CONTROL
    named = {f"tokenizer.ggml.{k}": v for k, v in (vocabulary | _roles(tokenizer)).items()}
    if tokenizer.chat_template is not None:
        named["tokenizer.chat_template"] = tokenizer.chat_template
    return named


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "padding_token_id": tokenizer.pad_id,
        "eot_token_id": next((i for i in tokenizer.eos_ids if i != tokenizer.eos_id), None),
    }
    return {k: i for k, i in ids.items() if i is not None} | {"add_bos_token": tokenizer.adds_bos}


def _from_bpe(spec: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model, added = spec["model"], spec.get("added_tokens") or []
    tokens, types = _unused(vocab_size)
    for text, index in model["vocab"].items():
        tokens[index], types[index] = text, _NORMAL
    for token in added:
        kind = _CONTROL if token["special"] else _USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    name, prefix = _pre_tokenizer(spec.get("pre_tokenizer"))
    vocabulary = {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types}
    return vocabulary | {"merges": merges, "add_space_prefix": prefix}


def _from_sentencepiece(serialized: bytes, vocab_size: int) -> dict[str, Any]:
    proto = spm_proto.ModelProto.FromString(serialized)
    if proto.trainer_spec.model_type != spm_proto.TrainerSpec.BPE:
        raise UserError("tokenizer.model is no BPE model, and GGUF's llama vocabulary holds BPE.")
    tokens, types = _unused(vocab_size)
    scores = [-1e6] * vocab_size  # never chosen
    for i, each in enumerate(proto.pieces):
        tokens[i], types[i], scores[i] = each.piece, each.type, each.score
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "unknown_token_id": proto.trainer_spec.unk_id,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
    }


def _unused(vocab_size: int) -> tuple[list[str], list[int]]:
    return [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size


def _byte_level(spec: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(spec.get("pre_tokenizer")))


def _pre_tokenizer(part: dict[str, Any] | None) -> tuple[str, bool]:
    """Finds GGUF's name for a byte-level pre-tokenizer, and whether it puts a blank in front."""
    patterns: list[str] = []
    prefix = False
    for step in _steps(part):
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step["type"] == "Split":
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel":
            prefix = bool(step.get("add_prefix_space"))
            patterns += [_GPT2] if step.get("use_regex", True) else []
        else:
            patterns.append(step["type"])
    for name, known in PRE_TOKENIZERS.items():
        if known == tuple(patterns):
            return name, prefix
    raise UserError(f"tokenizer.json splits text by {patterns}, for which GGUF has no known name.")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part["pretokenizers"] if part["type"] == "Sequence" else [part]
