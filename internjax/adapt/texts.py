"""Token rows for calibration: cut from a text, or written by the model itself."""

import difflib
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from internjax import catalog
from internjax.errors import Corrupt, Missing, UserError
from internjax.models.cache import init_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, unembed
from internjax.models.load import Model
from internjax.tree import Params, unstack_layers

SUFFIXES = (".txt", ".md", ".jsonl")
FIELDS = ("content", "text")  # of a line of .jsonl: the data stage's documents, or plain texts


@dataclass(frozen=True)
class CalibrationConfig:
    """What the model reads while its activations are measured.

    Fields:
      text: file (.txt, .md, .jsonl, each also .gz), folder of such, or data set of the catalogue
        (NAME or NAME:PREFIX); empty: the model writes it.
      sequences: rows; tokens: of each; seed: which rows, or what the model writes.
    """

    text: str = ""
    sequences: int = 64
    tokens: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.sequences < 1 or self.tokens < 2:
            raise UserError(
                f"calibration.sequences={self.sequences}, calibration.tokens={self.tokens}: legal"
                " are at least 1 row of 2 tokens."
            )


def calibration_rows(model: Model, cfg: CalibrationConfig) -> Int[np.ndarray, "S T"]:
    """Returns rows of token ids that the model can read in one piece.

    Raises: Missing: there is no text at the path. UserError: it has fewer tokens than were asked
      for, or rows are longer than the model's context.
    """
    if cfg.tokens > model.cfg.max_context:
        raise UserError(
            f"calibration.tokens={cfg.tokens}: the model reads {model.cfg.max_context} at most."
        )
    if not cfg.text:
        return own_rows(model, cfg)
    end = model.tokenizer.eos_id
    ids: list[int] = []
    for text in read_texts(text_path(cfg.text)):
        ids += [*model.tokenizer.encode(text, specials=False), *([] if end is None else [end])]
    there = len(ids) // cfg.tokens
    if there < cfg.sequences:
        raise UserError(
            f"{cfg.text}: has {len(ids)} tokens, {there} rows of {cfg.tokens};"
            f" calibration.sequences={cfg.sequences} wants more: give a longer text or fewer rows."
        )
    rows = np.asarray(ids[: there * cfg.tokens], np.int32).reshape(there, cfg.tokens)
    chosen = np.random.default_rng(cfg.seed).permutation(there)[: cfg.sequences]
    return rows[np.sort(chosen)]


def text_path(name: str) -> Path:
    """Finds a text: a path as it is, else a data set of the catalogue, or with NAME:PREFIX its
    files that begin with PREFIX, fetched when needed.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    entry, _, prefix = name.partition(":")
    data = [e.name for e in catalog.search("", kind="dataset")]
    if entry in data:
        return catalog.get(entry, prefix)
    near = difflib.get_close_matches(entry, data, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Missing(f"no text {name!r}: neither a path nor a data set of the catalogue{hint}")


def read_texts(path: Path) -> Iterator[str]:
    """Yields the texts of a file, or of every file of a folder that has a suffix we read."""
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and _suffix(f) in SUFFIXES]
    else:
        files = [path] if path.is_file() else []
    if not files or _suffix(files[0]) not in SUFFIXES:
        legal = ", ".join(SUFFIXES)
        raise Missing(f"{path}: is no text; legal are files ending in {legal}, also with .gz.")
    for file in files:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if _suffix(file) != ".jsonl":
            yield data.decode("utf-8", errors="replace")
            continue
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield _text_of(line, f"{file}:{number}")


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _text_of(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Corrupt(f"{where}: is no JSON ({error}).") from error
    found = [row[f] for f in FIELDS if isinstance(row, dict) and isinstance(row.get(f), str)]
    if not found:
        raise Corrupt(f"{where}: has no text in {' or '.join(FIELDS)}.")
    return found[0]


def own_rows(model: Model, cfg: CalibrationConfig) -> Int[np.ndarray, "S T"]:
    """Lets the model write the rows itself, sampling at temperature 1 from BOS (or EOS) on."""
    tokenizer = model.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise UserError("this vocabulary has neither BOS nor EOS: give calibration.text.")
    starts = jnp.full(cfg.sequences, first, jnp.int32)
    params = unstack_layers(model.params)
    return np.asarray(_write(params, starts, jax.random.key(cfg.seed), model.cfg, cfg.tokens))


@partial(jax.jit, static_argnames=("cfg", "length"))
def _write(
    params: Params, starts: Int[Array, " S"], key: Array, cfg: ModelConfig, length: int
) -> Int[Array, "S T"]:
    def step(carry, at):
        tokens, cache = carry
        places = jnp.full(tokens.shape, at, jnp.int32)
        states, cache = decode(params, tokens[:, None], cache, places, cfg)
        logits = unembed(params, states[:, 0], cfg)
        new = jax.random.categorical(jax.random.fold_in(key, at), logits).astype(jnp.int32)
        return (new, cache), new

    cache = init_cache(cfg, len(starts), length)
    _, written = lax.scan(step, (starts, cache), jnp.arange(length - 1))
    return jnp.concatenate([starts[:, None], written.T], axis=1)
