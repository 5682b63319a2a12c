"""The data stage: a folder of files in, documents and token shards out, and a funnel that says why.

Stages are functions from documents to (kept, rejected); nothing is lost: a rejected document keeps
its text and its reason, a file that gave no text stands in the quarantine. The output folder
appears whole or not at all, and the same input gives the same bytes.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internjax.data import clean, dedup, safety
from internjax.data.document import Document, Source, document_id, write_documents
from internjax.data.extract import Limits, media_type
from internjax.data.extract.child import Outcome, extract_all
from internjax.data.files import PARTIAL, folder_whole, write_json, write_jsonl
from internjax.data.language import identify
from internjax.data.mix import split_heldout
from internjax.data.plant import read_ledger, score_plants
from internjax.data.shards import write_shards
from internjax.data.tokenizer import Tokenizer
from internjax.errors import Missing, UserError

FUNNEL = "funnel.json"
Stage = Callable[[list[Document]], tuple[list[Document], list[Document]]]


@dataclass(frozen=True)
class DataConfig:
    """What to read and how; each key is explained in configs/data.yaml."""

    input: str = ""
    preset: str = "docs"
    languages: tuple[str, ...] = ("en", "zh")
    language_score: float = 0.65
    jaccard: float = 0.7
    keep: str = "longest"
    minhash: str = "rensa"
    pii: tuple[str, ...] = tuple(safety.FINDERS)
    regions: tuple[str, ...] = ("US", "CN")
    heldout: float = 0.1
    heldout_jaccard: float = 0.3
    seed: int = 0
    license: str = ""
    collection: str = ""
    ledger: str = ""
    shard_tokens: int = 2**26
    workers: int = 2
    timeout_seconds: float = 30.0
    memory_bytes: int = 2**31


@dataclass(frozen=True)
class DataReport:
    """What a run made.

    Fields:
      out: the folder; funnel: a row a stage (documents, tokens and bytes in and out, drops by
        reason); heldout, train: documents, tokens and bytes; quarantined: files without text;
      unsupported: files whose kind is not read; plants: found and missed per kind of planted fault;
      seconds: wall time by stage.
    """

    out: Path
    funnel: list[dict[str, Any]]
    train: dict[str, int]
    heldout: dict[str, int]
    quarantined: list[dict[str, str]]
    unsupported: int = 0
    plants: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values, for reports."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


def run(cfg: DataConfig, out: Path, *, tokenizer: Tokenizer, progress: bool = True) -> DataReport:
    """Runs the whole data stage into the new folder `out`.

    Writes documents.jsonl, rejected.jsonl, quarantine.jsonl, train/ and heldout/ token shards and
    funnel.json. An earlier result in `out` is replaced at the very end.

    Raises:
      UserError: nothing to read, nothing left, or a wrong config; `out` is then untouched.
    """
    _check(cfg, out)
    folder = Path(cfg.input)
    paths, unsupported = find_files(folder)
    counter, seconds = _TokenCounter(tokenizer), {}
    with _clock(seconds, "extract"):
        outcomes = list(
            _watch(
                progress,
                "extract",
                extract_all(paths, limits=_limits(cfg), workers=cfg.workers),
                len(paths),
            )
        )
        documents, quarantine = _documents(outcomes, folder, cfg)
    dropped = dict(sorted(Counter(row["reason"] for row in quarantine).items()))
    funnel = [_files_row(paths, documents, dropped, counter)]
    if not documents:
        raise UserError(f"none of the {len(paths)} files in {folder} gave any text: {dropped}.")
    rejected: list[Document] = []
    for name, stage in _watch(progress, "stages", stages(cfg).items(), len(stages(cfg))):
        with _clock(seconds, name):
            kept, dropped_documents = stage(documents)
            funnel.append(_row(name, documents, kept, dropped_documents, counter))
        documents, rejected = kept, rejected + dropped_documents
        if not documents:
            reasons = funnel[-1]["dropped"]
            raise UserError(
                f"stage {name!r} of preset {cfg.preset!r} dropped every document: "
                f"{reasons}; see `preset`, `languages` in configs/data.yaml."
            )
    with _clock(seconds, "split"):
        documents = split(documents, cfg)
    plants = _score(cfg, documents, rejected, quarantine)
    with _clock(seconds, "write"), folder_whole(out) as target:
        write_documents(target / "documents.jsonl", documents)
        write_documents(target / "rejected.jsonl", rejected)
        write_jsonl(target / "quarantine.jsonl", quarantine)
        parts = {
            name: _write_part(target, name, documents, counter, cfg)
            for name in ("train", "heldout")
        }
        write_json(
            target / FUNNEL,
            {"stages": funnel, **parts, "unsupported": unsupported, "plants": plants},
        )
    return DataReport(
        Path(out),
        funnel,
        parts["train"],
        parts["heldout"],
        quarantine,
        unsupported,
        plants,
        seconds,
    )


def find_files(folder: Path) -> tuple[list[Path], int]:
    """Returns the readable files below a folder, by name, and how many others there are."""
    if not folder.is_dir():
        raise Missing(
            f"input={str(folder)!r} is no folder: give one that holds html, pdf, epub, txt "
            "or md files."
        )
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p, folder)]
    readable = [p for p in files if media_type(p)]
    if not readable:
        raise UserError(
            f"{folder} holds no html, pdf, epub, txt or md file ({len(files)} others): "
            "there is nothing to read."
        )
    return readable, len(files) - len(readable)


def stages(cfg: DataConfig) -> dict[str, Stage]:
    """Returns the stages between extraction and the split, in order."""
    return {
        "language": lambda documents: keep_languages(documents, cfg),
        "filter": lambda documents: keep_clean(documents, cfg.preset),
        "dedup": lambda documents: keep_first(documents, cfg),
        "pii": lambda documents: (mask(documents, cfg), []),
    }


# --- stages ---------------------------------------------------------------------------------------


def keep_languages(documents: list[Document], cfg: DataConfig) -> tuple[list, list]:
    """Tells each document's language; drops those not asked for (none asked: keeps all)."""
    kept, dropped = [], []
    for document in documents:
        language, score = identify(document.content)
        document = dataclasses.replace(document, language=language).with_meta(language_score=score)
        wanted = not cfg.languages or any(
            language == x or language.startswith(f"{x}-") for x in cfg.languages
        )
        if wanted and score >= cfg.language_score:
            kept.append(document)
        else:
            reason = "language_score" if wanted else f"language_{language}"
            dropped.append(_reject(document, "language", reason, value=score))
    return kept, dropped


def keep_clean(documents: list[Document], preset: str) -> tuple[list, list]:
    """Drops documents that fail a rule of the preset, with the first rule failed."""
    kept, dropped = [], []
    for document in documents:
        rules = clean.preset_for(preset, document.language)
        content = clean.fix_lines(document.content, rules)
        failure = clean.first_failure(content, rules)
        if failure:
            limits = {
                k: v
                for k, v in (("low", failure.low), ("high", failure.high))
                if abs(v) != clean.INF
            }
            value = round(failure.value, 6)
            dropped.append(_reject(document, "filter", failure.rule, value=value, **limits))
        else:
            kept.append(dataclasses.replace(document, content=content))
    return kept, dropped


def keep_first(documents: list[Document], cfg: DataConfig) -> tuple[list, list]:
    """Drops exact and near duplicates of documents that are kept."""
    found = dedup.find_duplicates(
        [d.content for d in documents],
        threshold=cfg.jaccard,
        keep=cfg.keep,
        backend=cfg.minhash,
    )
    kept, dropped = [], []
    for document, dup in zip(documents, found):
        about = {
            "cluster": documents[dup.cluster].id,
            "size": dup.size,
            "kept": dup.kept,
            "of": documents[dup.of].id,
            "jaccard": round(dup.jaccard, 6),
        }
        document = document.with_meta(dup=about)
        if dup.kept:
            kept.append(document)
        else:
            reason = "exact" if dup.exact else "near"
            dropped.append(_reject(document, "dedup", reason, value=about["jaccard"]))
    return kept, dropped


def mask(documents: list[Document], cfg: DataConfig) -> list[Document]:
    """Replaces personal data by tags; `meta.pii` counts them by kind."""
    out = []
    for document in documents:
        content, counts = safety.mask_pii(document.content, cfg.pii, cfg.regions)
        title, more = safety.mask_pii(document.title, cfg.pii, cfg.regions)
        counts = dict(sorted((Counter(counts) + Counter(more)).items()))
        document = dataclasses.replace(document, content=content, title=title)
        out.append(document.with_meta(pii=counts) if counts else document)
    return out


def split(documents: list[Document], cfg: DataConfig) -> list[Document]:
    """Writes `meta.split`: train or heldout; related documents go the same way."""
    groups = dedup.split_groups(
        [dedup.shingles(d.content) for d in documents],
        cfg.heldout_jaccard,
        backend=cfg.minhash,
    )
    names = [d.id for d in documents]
    heldout = split_heldout(names, groups, cfg.heldout, cfg.seed)
    return [d.with_meta(split="heldout" if d.id in heldout else "train") for d in documents]


def _reject(document: Document, stage: str, rule: str, **values: Any) -> Document:
    return document.with_meta(rejected={"stage": stage, "rule": rule, **values})


def document_end(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that end a document: the end-of-text token, else eos, else nothing.

    A chat model's eos ends a turn, not a document; its end-of-text token is still there from the
    pretraining of its base.
    """
    end = tokenizer.special_tokens.get("<|endoftext|>", tokenizer.eos_id)
    return [] if end is None else [end]


# --- parts ----------------------------------------------------------------------------------------


class _TokenCounter:
    """Encodes each text once; `specials=False`: text that spells a control token stays text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.known: dict[str, np.ndarray] = {}

    def ids(self, document: Document) -> np.ndarray:
        """Returns the ids of a document's content `[T]`."""
        if document.content not in self.known:
            ids = self.tokenizer.encode(document.content, specials=False)
            self.known[document.content] = np.array(ids, dtype=np.uint32)
        return self.known[document.content]

    def size(self, documents: Iterable[Document]) -> dict[str, int]:
        """Returns documents, tokens and bytes of documents."""
        documents = list(documents)
        return {
            "documents": len(documents),
            "tokens": sum(len(self.ids(d)) for d in documents),
            "bytes": sum(d.num_bytes for d in documents),
        }


def _check(cfg: DataConfig, out: Path) -> None:
    """Finds every fault of the config before any work is done."""
    if not cfg.input:
        raise UserError("data needs a folder: internjax data run input=FOLDER out=FOLDER")
    clean.preset_for(cfg.preset, "en")
    safety.find_pii("", cfg.pii, cfg.regions)
    dedup.find_duplicates([], threshold=cfg.jaccard, keep=cfg.keep, backend=cfg.minhash)
    if not 0 <= cfg.heldout < 1:
        raise UserError(f"heldout={cfg.heldout} must lie in 0 <= x < 1.")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={str(out)!r} is a file: give a new folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / FUNNEL).is_file():
        raise UserError(f"out={str(out)!r} holds other files: give a new folder.")


def _limits(cfg: DataConfig) -> Limits:
    return Limits(seconds=cfg.timeout_seconds, memory_bytes=cfg.memory_bytes)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", PARTIAL)) for part in path.relative_to(folder).parts)


def _documents(outcomes: Sequence[Outcome], folder: Path, cfg: DataConfig) -> tuple[list, list]:
    """Makes documents of what was extracted and quarantine rows of what was not."""
    documents, quarantine = [], []
    for outcome in outcomes:
        uri = outcome.path.relative_to(folder).as_posix()
        text = outcome.extracted
        if text is None:
            quarantine.append({"uri": uri, "reason": outcome.reason, "detail": outcome.detail})
            continue
        source = Source(uri, outcome.mime, outcome.sha256, cfg.license, cfg.collection)
        documents.append(
            Document(
                id=document_id(uri),
                content=text.content,
                source=source,
                title=text.title,
                date=text.date,
                meta=text.meta,
            )
        )
    return documents, quarantine


def _files_row(paths: list[Path], documents: list[Document], dropped: dict, counter) -> dict:
    """The first row of the funnel: its input is files, whose tokens nobody knows."""
    return {
        "stage": "extract",
        "in": {"documents": len(paths), "bytes": sum(p.stat().st_size for p in paths)},
        "out": counter.size(documents),
        "dropped": dropped,
    }


def _row(name: str, before: list, after: list, dropped: list[Document], counter) -> dict:
    reasons = Counter(d.meta["rejected"]["rule"] for d in dropped)
    row = {
        "stage": name,
        "in": counter.size(before),
        "out": counter.size(after),
        "dropped": dict(sorted(reasons.items())),
    }
    if name == "pii":
        masked = Counter()
        for document in after:
            masked.update(document.meta.get("pii", {}))
        row["masked"] = dict(sorted(masked.items()))
    return row


def _write_part(target: Path, name: str, documents: list[Document], counter, cfg) -> dict[str, int]:
    """Writes the token shards of one part; every document ends with the end-of-text token."""
    end = np.array(document_end(counter.tokenizer), dtype=np.uint32)
    rows = (
        (d.id, np.concatenate([counter.ids(d), end]), d.num_bytes)
        for d in documents
        if d.meta["split"] == name
    )
    header = write_shards(
        target / name,
        rows,
        tokenizer_hash=counter.tokenizer.hash,
        vocab_size=counter.tokenizer.vocab_size,
        shard_tokens=cfg.shard_tokens,
    )
    return {key: header[key] for key in ("documents", "tokens", "bytes")}


def _score(cfg: DataConfig, documents: list, rejected: list, quarantine: list) -> dict[str, Any]:
    if not cfg.ledger:
        return {}
    return score_plants(read_ledger(Path(cfg.ledger)), documents, rejected, quarantine)


def _watch(progress: bool, name: str, items: Iterable, total: int) -> Iterator:
    """Yields the items under a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not (progress and console.is_terminal)
    return iter(
        track(items, f"data: {name}", total=total, console=console, disable=quiet, transient=True)
    )


class _clock:
    """Adds the wall time of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 3)
