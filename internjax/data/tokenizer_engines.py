"""The two engines that turn plain text into ids: Hugging Face `tokenizers` and `sentencepiece`.

An engine never makes a special token out of text; `data.tokenizer` puts those in. Both engines have
`encode`, `encode_batch`, `pieces`, `special`, `strips_space`, `prefix_after_special`, `dump`.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as spm_proto

from internjax.data.special_tokens import is_markup
from internjax.errors import Corrupt, UserError

_SPACE = "\u2581"  # SentencePiece writes a blank as this letter


def byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable Latin-1 stands for itself, others move to 256+.

    Source: the GPT-2 encoder (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    moved = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


class BpeEngine:
    """A `tokenizer.json` whose model is BPE: byte-level (GPT-2, Llama 3, Qwen, SmolLM) or with
    SentencePiece's blanks and byte fallback (Llama 2).

    Attributes:
        spec: the parsed `tokenizer.json`; never written to.
        pieces: the bytes of every id; None where the vocabulary has a hole.
        special: text -> id of the tokens that only a template or the caller may put in.
        eats_left, eats_right: special tokens that swallow the blanks beside them.
        strips_space: decoding drops one leading blank, which encoding had put there.
        prefix_after_special: that blank also comes after a special token, not only at the start.
    """

    file_name = "tokenizer.json"

    def __init__(self, spec: dict[str, Any]):
        model = spec.get("model") or {}
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise UserError(
                f"tokenizer.json holds a {model.get('type')} model; BPE is read "
                "(byte-level, or with SentencePiece's blanks)."
            )
        self.spec = spec
        added = spec.get("added_tokens") or []
        markup = [token for token in added if token["special"] or is_markup(token["content"])]
        self.special = {token["content"]: token["id"] for token in markup}
        self.eats_left = {token["content"] for token in markup if token.get("lstrip")}
        self.eats_right = {token["content"] for token in markup if token.get("rstrip")}
        self.pieces = self._read_pieces(model["vocab"], added)
        decoders = list(_steps(spec.get("decoder")))
        self.strips_space = any(
            step["type"] == "Strip"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in decoders
        )
        prepends = [
            step.get("prepend_scheme", "always") for step in self._steps_before("Metaspace")
        ]
        self.prefix_after_special = "first" not in prepends

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Encodes plain text; `prefix=False` continues text that came before."""
        return (
            (self._plain if prefix else self._continuing).encode(text, add_special_tokens=False).ids
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes many texts on all cores."""
        return [each.ids for each in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def dump(self) -> bytes:
        """Returns the content of `tokenizer.json`."""
        return json.dumps(self.spec, ensure_ascii=False, separators=(",", ":")).encode()

    def _read_pieces(self, vocab: dict[str, int], added: list[dict]) -> list[bytes | None]:
        ids = [*vocab.values(), *(token["id"] for token in added)]
        if not ids or min(ids) < 0 or max(ids) > 4 * len(ids):
            raise Corrupt("tokenizer.json has no vocabulary, or ids far beyond its size.")
        kinds = {step["type"] for step in _steps(self.spec.get("decoder"))}
        if "ByteLevel" in kinds:
            to_bytes = _byte_level_bytes
        elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
            to_bytes = _sentencepiece_bytes
        else:
            raise UserError(
                f"tokenizer.json decodes with {sorted(kinds)}; ByteLevel, Metaspace and "
                "ByteFallback are read."
            )
        pieces: list[bytes | None] = [None] * (max(ids) + 1)
        for text, index in vocab.items():
            pieces[index] = to_bytes(text)
        for token in added:
            pieces[token["id"]] = token["content"].encode()
        return pieces

    def _steps_before(self, *kinds: str) -> Iterator[dict]:
        for part in ("normalizer", "pre_tokenizer"):
            yield from (step for step in _steps(self.spec.get(part)) if step["type"] in kinds)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return _build(self._without_special())

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        if not any(
            step["type"] == "Prepend" or step.get("add_prefix_space") or "prepend_scheme" in step
            for step in self._steps_before("Prepend", "ByteLevel", "Metaspace")
        ):
            return self._plain
        spec = self._without_special()
        for part in ("normalizer", "pre_tokenizer"):
            spec[part] = _without_prefix(spec.get(part))
        return _build(spec)

    def _without_special(self) -> dict[str, Any]:
        """The spec without the markup. Kept added tokens move into the vocabulary, because
        `tokenizers` numbers those it does not find there anew."""
        model = dict(self.spec["model"], vocab=dict(self.spec["model"]["vocab"]))
        if model.get("ignore_merges"):  # a word that is in the vocabulary is then taken whole
            for text in self.special:
                model["vocab"].pop(text, None)
        kept = [t for t in self.spec.get("added_tokens") or [] if t["content"] not in self.special]
        model["vocab"].update({token["content"]: token["id"] for token in kept})
        return dict(
            self.spec,
            model=model,
            added_tokens=kept,
            post_processor=None,
            padding=None,
            truncation=None,
        )


class SentencePieceEngine:
    """A SentencePiece model; attributes as in `BpeEngine`.

    Pieces that are markup (`[UNUSED_TOKEN_145]` is InternLM2's end of turn) are made control
    pieces, which SentencePiece never finds in text.
    """

    file_name = "tokenizer.model"
    eats_left = eats_right = frozenset()
    prefix_after_special = True

    def __init__(self, serialized: bytes):
        try:
            proto = spm_proto.ModelProto.FromString(serialized)
        except DecodeError as error:
            raise Corrupt("The SentencePiece model is damaged or cut short.") from error
        if not proto.pieces:
            raise Corrupt("The SentencePiece model has no pieces: it is empty or cut short.")
        if not all(isinstance(each.piece, str) for each in proto.pieces):
            raise Corrupt("The SentencePiece model is damaged: a piece is not UTF-8.")
        self._serialized = serialized
        kind = spm_proto.ModelProto.SentencePiece
        self.pieces = [_sentencepiece_bytes(each.piece) for each in proto.pieces]
        self.special = {}
        for index, each in enumerate(proto.pieces):
            if each.piece == "\0":  # as a byte only: sentencepiece warns on stderr of such a piece
                each.piece, each.type = "<NUL>", kind.UNUSED
            if each.type in (kind.CONTROL, kind.UNKNOWN) or (
                each.type == kind.USER_DEFINED and is_markup(each.piece)
            ):
                self.special[each.piece] = index
                self.pieces[index] = each.piece.encode()
                each.type = kind.UNKNOWN if each.type == kind.UNKNOWN else kind.CONTROL
        self.strips_space = proto.normalizer_spec.add_dummy_prefix
        self._proto = proto

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Encodes plain text; `prefix=False` continues text that came before."""
        return (self._plain if prefix else self._continuing).encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes many texts on all cores."""
        return self._plain.encode(texts)

    def dump(self) -> bytes:
        """Returns the content of `tokenizer.model`."""
        return self._serialized

    @cached_property
    def _plain(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor(self._proto)

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        if not self.strips_space:
            return self._plain
        proto = spm_proto.ModelProto()
        proto.CopyFrom(self._proto)
        proto.normalizer_spec.add_dummy_prefix = False
        return self._processor(proto)

    @staticmethod
    def _processor(proto: Any) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(proto.SerializeToString())
        except RuntimeError as error:
            raise Corrupt(f"The SentencePiece model does not load: {error}") from error
        return processor


def _build(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the Rust binding raises bare Exception
        raise Corrupt(f"tokenizer.json does not load: {error}") from error


def _steps(part: dict | None) -> Iterator[dict]:
    """Yields the steps of a normalizer, pre-tokenizer or decoder, through nested sequences."""
    if part is None:
        return
    children = next(
        (part[k] for k in ("normalizers", "pretokenizers", "decoders") if k in part), None
    )
    if children is None:
        yield part
    for child in children or ():
        yield from _steps(child)


def _without_prefix(part: dict | None) -> dict | None:
    if part is None or part["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            children = [_without_prefix(child) for child in part[key]]
            return dict(part, **{key: [child for child in children if child is not None]})
    changes = {"ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "never"}}
    return dict(part, **changes.get(part["type"], {}))


_BYTES = byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    if all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece)
    return piece.encode()  # a marker that is not written in the byte alphabet


def _sentencepiece_bytes(piece: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace(_SPACE, " ").encode()
