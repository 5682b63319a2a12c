"""Faults planted on purpose into a copy of an input folder, and the score of who found them.

Seven kinds, drawn by a seed: exact and near duplicates, personal data, boilerplate pages, a corrupt
PDF, a corrupt EPUB, and a text that is not UTF-8. The ledger says what was planted where.
"""

import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from internjax.data.document import Document
from internjax.data.extract import extract_file, media_type
from internjax.data.files import write_json
from internjax.data.render import to_epub, to_html, to_pdf
from internjax.data.safety import gb11643_check, luhn
from internjax.errors import Corrupt, Missing, UserError

KINDS = ("exact", "near", "pii", "boilerplate", "corrupt_pdf", "corrupt_epub", "encoding")
FEWEST_WORDS = 60  # of a text that is copied: a near duplicate needs something to be near to
MARK = "The café’s naïve façade — “déjà vu” — cost £5 in 1998, said Zoë."

Plant = dict[str, Any]


def plant_faults(
    source: Path, target: Path, ledger: Path, *, seed: int = 0, each: int = 3
) -> list[Plant]:
    """Copies `source` to the new folder `target`, plants faults there and writes the ledger.

    Args:
      each: how many exact, near, personal-data and boilerplate plants; of the others there is one.

    Returns: the ledger's rows: kind, path, and by kind `of` (path of the original) or `secrets`.
    """
    source, target = Path(source), Path(target)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} holds files: faults are planted into a new folder only.")
    rng = random.Random(seed)
    shutil.copytree(source, target, dirs_exist_ok=True)
    originals = sorted(p for p in target.rglob("*") if p.is_file() and media_type(p))
    texts = {p: extract_file(p)[0].content for p in originals}
    long = [p for p in originals if len(texts[p].split()) >= FEWEST_WORDS]
    if not long:
        raise UserError(f"{source} holds no text of {FEWEST_WORDS} words or more to plant with.")
    chosen = rng.sample(long, min(len(long), 2 * each))
    rows = [_exact(p, target) for p in chosen[:each]]
    rows += [_near(p, texts[p], target, rng, i) for i, p in enumerate(chosen[-each:])]
    rows += [_pii(target, rng, i) for i in range(each)]
    rows += [_boilerplate(target, rng, i) for i in range(each)]
    rows += [_corrupt_pdf(target), _corrupt_epub(target), _encoding(target, rng)]
    for row in rows:
        row["path"] = row["path"].relative_to(target).as_posix()
    write_json(ledger, {"seed": seed, "plants": rows})
    return rows


def read_ledger(path: Path) -> list[Plant]:
    """Reads the rows of a ledger."""
    if not Path(path).is_file():
        raise Missing(f"ledger={str(path)!r} is not there: `plant=true` writes one.")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["plants"]
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is not a ledger of planted faults: {error!r}") from None


def score_plants(
    ledger: Sequence[Plant],
    kept: Iterable[Document],
    rejected: Iterable[Document],
    quarantine: Iterable[dict[str, str]],
) -> dict[str, dict[str, Any]]:
    """Returns, per kind, how many were planted and found, and which were missed.

    The entry `clean` counts the honest documents: `lost` are those that were dropped or quarantined
    although nothing planted repeats them.
    """
    kept = {d.source.uri: d for d in kept}
    dropped = {d.source.uri: d for d in rejected}
    jailed = {row["uri"] for row in quarantine}
    score: dict[str, dict[str, Any]] = {}
    for row in ledger:
        entry = score.setdefault(row["kind"], {"planted": 0, "found": 0, "missed": []})
        entry["planted"] += 1
        if FOUND[row["kind"]](row, kept, dropped, jailed):
            entry["found"] += 1
        else:
            entry["missed"].append(row["path"])
    planted = {row["path"] for row in ledger}
    repeated = {row["of"] for row in ledger if "of" in row}
    honest = (kept.keys() | dropped.keys() | jailed) - planted - repeated
    score["clean"] = {"documents": len(honest), "lost": sorted(honest - kept.keys())}
    return score


# --- what counts as found -------------------------------------------------------------------------


def _one_of_two(row: Plant, kept: dict, dropped: dict, jailed: set) -> bool:
    """Of original and copy, one stays and the other was dropped for being its duplicate."""
    gone = [dropped[p] for p in (row["path"], row["of"]) if p in dropped]
    return len(gone) == 1 and gone[0].meta["rejected"]["stage"] == "dedup"


def _masked(row: Plant, kept: dict, dropped: dict, jailed: set) -> bool:
    """The document stays, and none of its secrets does."""
    document = kept.get(row["path"])
    return document is not None and not any(s in document.content for s in row["secrets"])


def _filtered(row: Plant, kept: dict, dropped: dict, jailed: set) -> bool:
    """Extraction found no main text in the page, or a rule dropped it."""
    return row["path"] in jailed or (
        row["path"] in dropped
        and dropped[row["path"]].meta["rejected"]["stage"] in ("filter", "language")
    )


def _jailed(row: Plant, kept: dict, dropped: dict, jailed: set) -> bool:
    return row["path"] in jailed


def _decoded(row: Plant, kept: dict, dropped: dict, jailed: set) -> bool:
    """The text stays and reads as it was written."""
    document = kept.get(row["path"])
    return document is not None and MARK in document.content


FOUND = {
    "exact": _one_of_two,
    "near": _one_of_two,
    "pii": _masked,
    "boilerplate": _filtered,
    "corrupt_pdf": _jailed,
    "corrupt_epub": _jailed,
    "encoding": _decoded,
}

# --- planting -------------------------------------------------------------------------------------


def _exact(path: Path, target: Path) -> Plant:
    copy = _write(target / f"copy-of-{path.name}", path.read_bytes())
    return {"kind": "exact", "path": copy, "of": path.relative_to(target).as_posix()}


def _near(path: Path, text: str, target: Path, rng: random.Random, index: int) -> Plant:
    """A text with one word in a hundred (at least one) exchanged: Jaccard about .9."""
    words = re.split(r"(\s+)", text)
    places = [i for i, word in enumerate(words) if word.isalpha()]
    for i in rng.sample(places, max(1, len(places) // 100)):
        words[i] = words[i][::-1]
    copy = _write(target / f"near-{index}-of-{path.stem}.txt", "".join(words).encode())
    return {"kind": "near", "path": copy, "of": path.relative_to(target).as_posix()}


def _pii(target: Path, rng: random.Random, index: int) -> Plant:
    """A page of contacts nobody has: made-up numbers that pass every check."""
    name = "".join(rng.choice("bcdfgklmnprst") + rng.choice("aeiou") for _ in range(4))
    secrets = {
        "email": f"{name}.{rng.randrange(100, 999)}@{name[::-1]}-mail.org",
        "phone": f"+1 415 {rng.randrange(200, 999)} {rng.randrange(1000, 9999)}",
        "card": _card(rng),
        "china_id": _china_id(rng),
        "ip": f"{rng.choice((8, 45, 91, 185))}.{rng.randrange(1, 255)}.{rng.randrange(256)}.1",
    }
    text = (
        f"Notes on visit number {index + 1} of the maintainer.\n\n"
        f"{name.title()} asked us to write to {secrets['email']} when the new release is ready, or "
        f"to call {secrets['phone']} in the morning. The server that sent the report is "
        f"{secrets['ip']}, and it should be restarted after every update of the driver.\n\n"
        f"The ticket was paid with card {secrets['card']} and the visitor showed the identity "
        f"number {secrets['china_id']} at the gate. None of this belongs into a training corpus, "
        f"and that is the reason why visit {name} is written down here.\n"
    )
    path = _write(target / f"visit-{index}-{name}.txt", text.encode())
    return {"kind": "pii", "path": path, "secrets": list(secrets.values())}


def _boilerplate(target: Path, rng: random.Random, index: int) -> Plant:
    """A page without content: consent text, navigation words or filler."""
    consent = (
        "We use cookies. By using this site you accept our privacy policy, our cookie policy and "
        "the terms of use. See the privacy policy for the use of cookies on this page."
    )
    chrome = "Home About Contact Login Register Home About Contact Login Register"
    filler = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor."
    forms = (consent, chrome, filler)
    form = forms[index % len(forms)]
    text = "# Welcome\n\n" + "\n\n".join([form] * rng.randrange(6, 12)) + "\n"
    return {"kind": "boilerplate", "path": _write(target / f"page-{index}.html", to_html("", text))}


def _corrupt_pdf(target: Path) -> Plant:
    """A PDF cut off after its first third: the table of its objects is gone, and so are some."""
    whole = to_pdf("Cut", "# Cut\n\nThis text is never read.\n")
    path = _write(target / "cut.pdf", whole[: len(whole) // 3])
    return {"kind": "corrupt_pdf", "path": path}


def _corrupt_epub(target: Path) -> Plant:
    """An EPUB whose second half was overwritten with zeros."""
    whole = to_epub("Zeros", "# Zeros\n\nThis text is never read.\n")
    half = len(whole) // 2
    path = _write(target / "zeros.epub", whole[:half] + bytes(len(whole) - half))
    return {"kind": "corrupt_epub", "path": path}


def _encoding(target: Path, rng: random.Random) -> Plant:
    """A text in Windows-1252, whose accents and quotes are not UTF-8."""
    sentences = [
        "It was the first house on the road and the owner was proud of that.",
        "Guests came for the coffee, which is served with a slice of the cake of the day.",
        "They have kept the old sign, and with it the name that everybody in the town knows.",
    ]
    rng.shuffle(sentences)
    text = " ".join([sentences[0], MARK, *sentences[1:]]) + "\n"
    return {"kind": "encoding", "path": _write(target / "cafe.txt", text.encode("windows-1252"))}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _card(rng: random.Random) -> str:
    stem = "4" + "".join(str(rng.randrange(10)) for _ in range(14))
    number = next(stem + str(d) for d in range(10) if luhn(stem + str(d)))
    return " ".join(number[i : i + 4] for i in range(0, 16, 4))


def _china_id(rng: random.Random) -> str:
    born = f"{rng.randrange(1950, 2005)}{rng.randrange(1, 13):02d}{rng.randrange(1, 29):02d}"
    stem = f"110101{born}{rng.randrange(1000):03d}"
    return stem + gb11643_check(stem)
