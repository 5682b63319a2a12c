"""Text to token ids and back, whatever the checkpoint: a folder, `.model`, `tokenizer.json`, GGUF.

Two engines do the work on plain text (`tokenizer_engines`); special tokens are put in here, by one
rule for all, so text that a user typed never turns into one. Decoding goes through bytes, so an id
has one meaning: `decode(ids)` is the UTF-8 reading of `token_bytes` of each.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from internjax.data.gguf_metadata import read_metadata
from internjax.data.gguf_vocabulary import engine_from_metadata
from internjax.data.special_tokens import END_OF_TURN, INTERNLM2, Splitter, is_markup
from internjax.data.tokenizer_engines import BpeEngine, SentencePieceEngine
from internjax.errors import Corrupt, Missing, UserError


def check_text(text: str) -> None:
    """Refuses lone surrogates: JSON can write them, Python makes them of bytes that are no UTF-8.

    Raises:
      UserError: with the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{half} at character {error.start} is half of a surrogate pair, not text: send UTF-8."
        ) from error


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens.

    Attributes:
        engine: encodes plain text.
        special_tokens: text -> id of every marker; two texts may share an id (old and new name).
        bos_id, eos_id: the ids that begin and end a document; None where the model has none.
        pad_id: fills rows that are too short; the end token where the model names no other.
        eos_ids: every id at which generation stops.
        adds_bos: whether the model expects `bos_id` before a plain prompt.
        chat_template: the checkpoint's own Jinja template, untrusted; None without one.
    """

    engine: BpeEngine | SentencePieceEngine
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    eos_ids: tuple[int, ...]
    adds_bos: bool = False
    chat_template: str | None = field(default=None, repr=False)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(len(self.engine.pieces), 1 + max(self.special_tokens.values(), default=-1))

    def encode(self, text: str, *, bos: bool = False, specials: bool = True) -> list[int]:
        """Encodes text; with `specials=False` markers in it are ordinary letters (use that for
        anything a user typed).

        Raises:
          UserError: the text holds half of a surrogate pair, which is no character.
        """
        check_text(text)
        ids = [self._need_bos()] if bos else []
        if not specials:
            return ids + self.engine.encode(text)
        for index, part in enumerate(self.split(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = index == 0 or self.engine.prefix_after_special
                ids += self.engine.encode(part, prefix=prefix)
        return ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """Encodes documents on all cores; markers in them are ordinary letters."""
        head = [self._need_bos()] if bos else []
        return [head + ids for ids in self.engine.encode_batch(list(texts))]

    def split(self, text: str) -> list[str | int]:
        """Cuts trusted text at its markers: plain strings and ids, in order."""
        return self._splitter(text)

    def token_bytes(self, index: int) -> bytes:
        """Returns the bytes that one id stands for; of a special token, those of its name."""
        if not 0 <= index < self.vocab_size:
            raise UserError(f"Token id {index} is outside the vocabulary 0..{self.vocab_size - 1}.")
        return self._bytes[index]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self, skip_specials=skip_specials)
        return "".join([*map(stream.push, ids), stream.flush()])

    def decode_stream(self, ids: Iterable[int], *, skip_specials: bool = False) -> Iterator[str]:
        """Yields the text of each id as soon as its letters are whole."""
        stream = StreamDecoder(self, skip_specials=skip_specials)
        for index in ids:
            if text := stream.push(index):
                yield text
        if text := stream.flush():
            yield text

    def is_special(self, index: int) -> bool:
        """Whether an id is a marker."""
        return index in self._special_ids

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides ids: the engine's file and the special tokens."""
        digest = hashlib.sha256(self.engine.dump())
        digest.update(json.dumps(self.special_tokens, sort_keys=True).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer's part of a Hugging Face folder; `load_tokenizer` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.engine.file_name).write_bytes(self.engine.dump())
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named = {role: self._names[i] for role, i in roles.items() if i in self._names}
        config = {
            "tokenizer_class": self._hf_class,
            **named,
            "add_bos_token": self.adds_bos,
            "add_prefix_space": self.engine.strips_space,
            "legacy": True,  # LlamaTokenizer then follows the .model to the letter
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(index): {"content": name, "special": True, "normalized": False}
                for index, name in sorted(self._names.items())
            },
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        for name, content in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", named),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    @property
    def _hf_class(self) -> str:
        return {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}[
            self.engine.file_name
        ]

    def _need_bos(self) -> int:
        if self.bos_id is None:
            raise UserError("This vocabulary has no token that begins a document: use bos=False.")
        return self.bos_id

    @cached_property
    def _names(self) -> dict[int, str]:
        """The name that decoding shows; the last one given to an id wins."""
        return {index: text for text, index in self.special_tokens.items()}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def _bytes(self) -> list[bytes]:
        holes = self.vocab_size - len(self.engine.pieces)
        table = [piece or b"" for piece in self.engine.pieces] + [b""] * holes
        for index, name in self._names.items():
            table[index] = name.encode()
        return table

    @cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self.special_tokens, self.engine.eats_left, self.engine.eats_right)


class StreamDecoder:
    """Turns ids into text one by one; a letter is held back until its last byte has come.

    The pushes and the flush together are exactly `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_specials: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.engine.strips_space

    def push(self, index: int) -> str:
        """Takes the next id; returns the letters that are now whole, possibly none."""
        if self._skip and self._tokenizer.is_special(index):
            return ""
        data = self._tokenizer.token_bytes(index)
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text; an unfinished letter becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a model folder, a `.model`, a `tokenizer.json` or a `.gguf`.

    Reads data only: no code of the checkpoint runs.

    Raises:
        Missing: nothing is there, or a folder holds none of these files.
        Corrupt: a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise Missing(f"{path} is not there: give a model folder, .model, tokenizer.json or .gguf.")
    if path.suffix == ".gguf":
        return _from_metadata(read_metadata(path))
    return _assemble(_read_engine(path), {}, {})


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `UserError` where the tokenizer has ids that a model of `vocab_size` rows has not."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} ids but the model's vocabulary only "
            f"{vocab_size}: they belong to different models. Load the model's own tokenizer."
        )


def _read_engine(path: Path) -> BpeEngine | SentencePieceEngine:
    if path.suffix == ".json":
        try:
            return BpeEngine(_read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{path} is no tokenizer.json of Hugging Face: {error!r}.") from error
    if path.suffix == ".model":
        return SentencePieceEngine(path.read_bytes())
    raise UserError(f"{path} is no tokenizer: .model, .json and .gguf files are read.")


def _load_folder(folder: Path) -> Tokenizer:
    """Reads a Hugging Face folder, or one that holds a single GGUF file."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
    present = [file for file in files if file.is_file()]
    if not present:
        found = sorted(folder.glob("*.gguf"))
        if len(found) == 1:
            return _from_metadata(read_metadata(found[0]))
        raise Missing(f"{folder} holds no tokenizer.json, tokenizer.model or single .gguf file.")
    names = ("tokenizer_config.json", "generation_config.json", "added_tokens.json")
    config, generation, added = (
        _read_json(folder / name) if (folder / name).is_file() else {} for name in names
    )
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        config = config | {"chat_template": jinja.read_text(encoding="utf-8")}
    engine = _read_engine(present[0])
    return _assemble(engine, config | {"named": added | _named_in(config, folder)}, generation)


def _named_in(config: dict[str, Any], folder: Path) -> dict[str, int]:
    """The markers that tokenizer_config.json lists; ordinary added tokens are the engine's."""
    try:
        entries = (config.get("added_tokens_decoder") or {}).items()
        return {
            entry["content"]: int(index)
            for index, entry in entries
            if entry.get("special") or is_markup(entry["content"])
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Corrupt(
            f"{folder}/tokenizer_config.json has a malformed added_tokens_decoder: {error!r}."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise Corrupt(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def _assemble(
    engine: BpeEngine | SentencePieceEngine, config: dict[str, Any], generation: dict[str, Any]
) -> Tokenizer:
    """Joins an engine with what `tokenizer_config.json` and `generation_config.json` say."""
    special = engine.special | _family_names(engine.special) | config.get("named", {})

    def named(role: str, *fallbacks: str) -> int | None:
        given = config.get(role)
        given = given["content"] if isinstance(given, dict) else given
        return next((special[name] for name in (given, *fallbacks) if name in special), None)

    eos_id = named("eos_token", "</s>", "<|endoftext|>", "<|end_of_text|>")
    stops = generation.get("eos_token_id") or []
    return _finish(
        engine,
        special,
        bos_id=named("bos_token", "<s>", "<|begin_of_text|>"),
        eos_id=eos_id,
        pad_id=named("pad_token"),
        stops=[stops] if isinstance(stops, int) else stops,
        adds_bos=config.get("add_bos_token", _adds_bos(engine)),
        chat_template=_template_text(config.get("chat_template")),
    )


def _from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    engine = engine_from_metadata(metadata)
    get = lambda name: metadata.get(f"tokenizer.ggml.{name}")  # noqa: E731 - one key prefix
    adds_bos = get("add_bos_token")
    if adds_bos is None:
        adds_bos = get("model") == "llama" or get("pre") in ("llama-bpe", "llama3", "llama-v3")
    return _finish(
        engine,
        engine.special | _family_names(engine.special),
        bos_id=get("bos_token_id"),
        eos_id=get("eos_token_id"),
        pad_id=get("padding_token_id"),
        stops=[i for i in (get("eot_token_id"), get("eom_token_id")) if i is not None],
        adds_bos=bool(adds_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _finish(
    engine: BpeEngine | SentencePieceEngine,
    special: dict[str, int],
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    stops: Sequence[int],
    adds_bos: bool,
    chat_template: str | None,
) -> Tokenizer:
    engine.encode("")  # builds it: what is wrong with the file is said here, not in the first use
    known = [special[name] for name in END_OF_TURN if name in special]
    ends = [] if eos_id is None else [eos_id]
    eos_ids = tuple(dict.fromkeys([*ends, *stops, *known]))
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else 0
    tokenizer = Tokenizer(
        engine,
        special,
        bos_id,
        eos_id,
        pad_id,
        eos_ids,
        adds_bos and bos_id is not None,
        chat_template,
    )
    for index in (bos_id, eos_id, pad_id, *eos_ids):
        if index is not None and not 0 <= index < tokenizer.vocab_size:
            raise Corrupt(f"The tokenizer names id {index} but has {tokenizer.vocab_size} ids.")
    return tokenizer


def _family_names(special: dict[str, int]) -> dict[str, int]:
    """The chat names of a bare InternLM2 `.model`, whose own names are [UNUSED_TOKEN_n]."""
    if special.get("[UNUSED_TOKEN_146]") != 92543:
        return {}
    return {name: special[reserved] for name, reserved in INTERNLM2.items() if reserved in special}


def _adds_bos(engine: BpeEngine | SentencePieceEngine) -> bool:
    if isinstance(engine, SentencePieceEngine):
        return True
    post = engine.spec.get("post_processor") or {}
    for step in post.get("processors", [post]):
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return True
    return False


def _template_text(template: Any) -> str | None:
    """`chat_template` is one text, or a list of named ones of which "default" is meant."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template
