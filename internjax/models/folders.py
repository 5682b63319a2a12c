"""Whole-or-nothing writing of models, and the small files that travel with their weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internjax.errors import UserError

# What belongs to a checkpoint beside its weights: tokenizer, chat template, generation defaults,
# upstream's modelling code (never run by us) and the licence that must travel along.
CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)


def carried_files(folder: Path) -> list[Path]:
    """Lists the files of a checkpoint folder that are copied byte for byte when it is converted."""
    return sorted({p for pattern in CARRIED for p in folder.glob(pattern) if p.is_file()})


def carry(source: Path, target: Path) -> None:
    """Copies the carried files of one folder into another."""
    for path in carried_files(source):
        shutil.copyfile(path, target / path.name)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Puts tokenizer files into `folder`: copied from another folder, or saved by a Tokenizer."""
    if isinstance(tokenizer, str | Path):
        carry(Path(tokenizer), folder)
    elif tokenizer is not None:
        tokenizer.save(folder)


@contextmanager
def whole(target: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling path; renames it to `target` only when the block ends well.

    The block makes a file or a folder of it. On any failure, Ctrl-C included, it is removed.

    Raises: UserError when `target` is a folder with content, or the disk refuses (full, no right).
    """
    target = Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: is there already and not empty; remove it or name another.")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}.") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
