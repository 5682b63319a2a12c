"""Tokenizers and token shards: trains one, writes the other, and trades with InternEvo.

`internjax data tokenizer RUN OUT` trains a SentencePiece tokenizer on the documents of a data run;
`internjax data shards RUN OUT tokenizer=OUT` writes them as token shards, a folder a source;
`import` and `export` read and write InternEvo's .bin files.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig

from internjax.data.document import read_documents
from internjax.data.internevo import from_internevo, to_internevo
from internjax.data.mixture import open_sources
from internjax.data.sources import documents_file, write_sources
from internjax.data.tokenizer import Tokenizer, load_tokenizer
from internjax.data.train_tokenizer import train_tokenizer
from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.models.load import resolve


@dataclass(frozen=True)
class TokensConfig:
    """What to do; each key is explained in configs/tokens.yaml."""

    action: Literal["tokenizer", "shards", "import", "export"] = "tokenizer"
    input: str = ""
    out: str = ""
    tokenizer: str = ""
    by: str = ""
    vocab_size: int = 8192
    coverage: float = 0.9995
    seed: int = 0
    shard_tokens: int = 2**26
    mask_zero: bool = False


@hydra.main(config_path="../configs", config_name="tokens", version_base=None)
def main(raw: DictConfig) -> None:
    """Does the one thing asked and says what was written."""
    cfg = build(TokensConfig, raw)
    if not (cfg.input and cfg.out):
        raise UserError(
            f"data {cfg.action} needs what to read and a folder to write: internjax data "
            f"{cfg.action} INPUT OUT"
        )
    ACTIONS[cfg.action](cfg, Path(cfg.out))


def tokenizer(cfg: TokensConfig, out: Path) -> None:
    """Trains a tokenizer on the training documents; held-out ones stay unseen."""
    texts = (
        document.content
        for document in read_documents(documents_file(Path(cfg.input)))
        if document.meta.get("split") != "heldout"
    )
    made = train_tokenizer(
        texts, out, vocab_size=cfg.vocab_size, coverage=cfg.coverage, seed=cfg.seed
    )
    print(f"{out}: {made.vocab_size:,} ids, hash {made.hash[:12]}")


def shards(cfg: TokensConfig, out: Path) -> None:
    """Tokenizes the documents of a data run again."""
    file = documents_file(Path(cfg.input))
    show(out, write_sources(file, out, _given(cfg), by=cfg.by, shard_tokens=cfg.shard_tokens))


def from_bin(cfg: TokensConfig, out: Path) -> None:
    """Reads InternEvo's files."""
    show(out, from_internevo(Path(cfg.input), out, _given(cfg), shard_tokens=cfg.shard_tokens))


def to_bin(cfg: TokensConfig, out: Path) -> None:
    """Writes InternEvo's files."""
    counts = to_internevo(open_sources(cfg.input), out, mask_zero=cfg.mask_zero)
    for name, count in counts.items():
        print(f"{out / name}: {count:,} documents")


def show(out: Path, headers: dict[str, dict]) -> None:
    """Prints a line a folder of shards."""
    for name, header in headers.items():
        counts = f"{header['documents']:,} documents, {header['tokens']:,} tokens"
        print(f"{out} {name}: {counts}, {header['bytes'] / 1e6:,.2f} MB of text")


def _given(cfg: TokensConfig) -> Tokenizer:
    if not cfg.tokenizer:
        raise UserError(f"data {cfg.action} needs tokenizer=, a model's name or a path.")
    return load_tokenizer(resolve(cfg.tokenizer))


ACTIONS = {"tokenizer": tokenizer, "shards": shards, "import": from_bin, "export": to_bin}


if __name__ == "__main__":  # the same program as `internjax data tokenizer`
    from internjax.cli import run

    sys.exit(run(["data", *sys.argv[1:]]))
