"""Documents of the data stage to token shards again: another tokenizer, and one folder a source.

`internjax data run` writes its documents and shards in one go; here its documents.jsonl is
tokenized anew, and parted by language or collection, so that a mixture can weigh the parts.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from internjax.data.document import Document, read_documents
from internjax.data.executor import document_end
from internjax.data.files import folder_whole
from internjax.data.shards import Row, write_shards
from internjax.data.tokenizer import Tokenizer
from internjax.errors import Missing, UserError

PARTS = {
    "": lambda document: "",
    "language": lambda document: document.language.partition("-")[0] or "und",
    "collection": lambda document: re.sub(r"\W+", "_", document.source.collection) or "none",
}
AT_ONCE = 256  # documents encoded together, on all cores


def documents_file(path: Path) -> Path:
    """Returns the documents.jsonl that is meant: the file, or the one in a folder of a data run."""
    path = Path(path)
    file = path / "documents.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise Missing(f"{file} is not there: give the documents.jsonl of `internjax data run`.")
    return file


def write_sources(
    documents: Path, out: Path, tokenizer: Tokenizer, *, by: str = "", shard_tokens: int = 2**26
) -> dict[str, dict]:
    """Writes out/train, parted by `by`, and out/heldout, whole; returns the headers by folder.

    Args:
      documents: a documents.jsonl; `meta.split` says which are held out (none: all train).
      out: appears whole or not at all. by: one of `PARTS`; sub-folders of train bear its values.
    """
    if by not in PARTS:
        raise UserError(f"by={by!r} parts nothing; legal are '', language and collection.")
    places = sorted({_place(document, by) for document in read_documents(documents)})
    if not any(place.startswith("train") for place in places):
        raise UserError(f"{documents}: holds no document to train on.")
    headers = {}
    with folder_whole(out) as folder:
        for place in places:
            chosen = (d for d in read_documents(documents) if _place(d, by) == place)
            headers[place] = write_shards(
                folder / place,
                _rows(chosen, tokenizer),
                tokenizer_hash=tokenizer.hash,
                vocab_size=tokenizer.vocab_size,
                shard_tokens=shard_tokens,
            )
    return headers


def _place(document: Document, by: str) -> str:
    if document.meta.get("split") == "heldout":
        return "heldout"
    return f"train/{PARTS[by](document)}".rstrip("/")


def _rows(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[Row]:
    end = np.array(document_end(tokenizer), np.uint32)
    batch: list[Document] = []

    def flush() -> Iterator[Row]:
        encoded = tokenizer.encode_batch([document.content for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            yield document.id, np.concatenate([np.array(ids, np.uint32), end]), document.num_bytes

    for document in documents:
        batch.append(document)
        if len(batch) == AT_ONCE:
            yield from flush()
            batch = []
    yield from flush()
