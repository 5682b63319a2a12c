"""Rule filters: named presets, each with its word splitter; the first failed rule says why.

A preset is data: rules with the legal range of a measure of the text, in order of cost. Numbers are
those of the named source (Gopher arXiv:2112.11446, C4 arXiv:1910.10683, FineWeb arXiv:2406.17557,
FineWeb-2 arXiv:2506.20920). The same number under another word splitter is another rule, so the
splitter is part of the preset.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from internjax.errors import UserError

INF = float("inf")
STOP_WORDS_EN = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
STOP_WORDS_ZH = frozenset("的了是在和有不我人这他就一也都上与为以之而等")
TERMINAL = (
    ".",
    "?",
    "!",
    '"',
    "'",
    "”",
    "’",
    "。",
    "？",
    "！",
    "…",
    "」",
    "』",
    "；",
    ";",
    ":",
    "：",
)
BULLETS = ("•", "●", "○", "■", "□", "▪", "-", "*", "·", "–")
POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)


@dataclass(frozen=True)
class Rule:
    """A measure of `MEASURES` (with its parameter) and the range in which a document is kept."""

    measure: str
    low: float = -INF
    high: float = INF
    n: int = 0  # of n-gram measures

    @property
    def name(self) -> str:
        """The measure's name with its n."""
        return f"{self.measure}_{self.n}" if self.n else self.measure


@dataclass(frozen=True)
class Preset:
    """Rules in order, the splitter their numbers belong to, and a fix of lines that comes first."""

    splitter: str
    rules: tuple[Rule, ...]
    stop_words: frozenset[str] = STOP_WORDS_EN
    fix: str = ""


@dataclass(frozen=True)
class Failure:
    """The first rule that a document failed: the value found and the legal range."""

    rule: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rule}={self.value:.4g} is outside {self.low:g}..{self.high:g}"


class Text:
    """A text with what the measures share, each computed when first asked for."""

    def __init__(self, text: str, preset: Preset):
        self.text, self.preset = text, preset

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [p.strip() for p in re.split(r"\n\s*\n", self.text) if p.strip()]

    @functools.cached_property
    def words(self) -> list[str]:
        """Words that hold a letter or digit."""
        return [w for w in SPLITTERS[self.preset.splitter](self.text) if re.search(r"\w", w)]

    @functools.cached_property
    def characters(self) -> int:
        return max(1, sum(map(len, self.words)))


# --- word splitters -------------------------------------------------------------------------------


def split_space(text: str) -> list[str]:
    """Words between white space."""
    return text.split()


def split_words(text: str) -> list[str]:
    """Runs of letters and digits (with inner ' or -), and single marks, as spaCy's blank model."""
    return re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)


def split_zh(text: str) -> list[str]:
    """Chinese words by dictionary and HMM (rjieba)."""
    import rjieba

    return [word for word in rjieba.cut(text) if not word.isspace()]


SPLITTERS: dict[str, Callable[[str], list[str]]] = {
    "space": split_space,
    "words": split_words,
    "rjieba": split_zh,
}

# --- measures -------------------------------------------------------------------------------------


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def _line_share(test: Callable[[str], bool]) -> Callable[[Text, int], float]:
    return lambda t, n: _share(sum(map(test, t.lines)), len(t.lines))


def _duplicates(parts: list[str]) -> tuple[int, int]:
    """Returns (parts, characters) that repeat an earlier part."""
    repeated = [(count - 1, part) for part, count in Counter(parts).items() if count > 1]
    return sum(c for c, _ in repeated), sum(c * len(part) for c, part in repeated)


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))


def top_ngram(t: Text, n: int) -> float:
    """Share of the characters that lie in the most frequent n-gram (0 when none repeats)."""
    counts = Counter(_grams(t.words, n))
    if not counts or max(counts.values()) < 2:
        return 0.0
    return max(sum(map(len, g)) * c for g, c in counts.items() if c > 1) / t.characters


def duplicate_ngram(t: Text, n: int) -> float:
    """Share of the characters that lie in n-grams seen before, overlaps counted once (Gopher)."""
    seen: set[tuple[str, ...]] = set()
    repeated, at = 0, 0
    grams = _grams(t.words, n)
    while at < len(grams):
        if grams[at] in seen:
            repeated += sum(map(len, grams[at]))
            at += n
        else:
            seen.add(grams[at])
            at += 1
    return repeated / t.characters


def sentences(text: str) -> int:
    """Number of sentence ends, English or Chinese."""
    return len(re.findall(r"[.!?]+(?=\s|[\"'”’)]|$)|[。！？]+", text))


MEASURES: dict[str, Callable[[Text, int], float]] = {
    "words": lambda t, n: len(t.words),
    "characters": lambda t, n: len(t.text),
    "sentences": lambda t, n: sentences(t.text),
    "mean_word_length": lambda t, n: _share(sum(map(len, t.words)), len(t.words)),
    "hash_per_word": lambda t, n: _share(t.text.count("#"), len(t.words)),
    "ellipsis_per_word": lambda t, n: _share(t.text.count("...") + t.text.count("…"), len(t.words)),
    "bullet_lines": _line_share(lambda line: line.startswith(BULLETS)),
    "ellipsis_lines": _line_share(lambda line: line.endswith(("...", "…"))),
    "alphabetic_words": lambda t, n: _share(
        sum(any(c.isalpha() for c in w) for w in t.words), len(t.words)
    ),
    "stop_words": lambda t, n: len(t.preset.stop_words & {w.lower() for w in t.words}),
    "duplicate_lines": lambda t, n: _share(_duplicates(t.lines)[0], len(t.lines)),
    "duplicate_line_characters": lambda t, n: _share(_duplicates(t.lines)[1], len(t.text)),
    "duplicate_paragraphs": lambda t, n: _share(_duplicates(t.paragraphs)[0], len(t.paragraphs)),
    "duplicate_paragraph_characters": lambda t, n: _share(
        _duplicates(t.paragraphs)[1], len(t.text)
    ),
    "top_ngram": top_ngram,
    "duplicate_ngram": duplicate_ngram,
    "punctuated_lines": _line_share(lambda line: line.endswith(TERMINAL)),
    "short_lines": _line_share(lambda line: len(line) <= 30),
    "newlines_per_word": lambda t, n: _share(t.text.count("\n"), len(t.words)),
    "curly_brackets": lambda t, n: t.text.count("{"),
    "lorem_ipsum": lambda t, n: t.text.lower().count("lorem ipsum"),
    "policy_phrases_per_100_words": lambda t, n: _share(
        100 * len(POLICY.findall(t.text.lower())), len(t.words)
    ),
}

# --- presets --------------------------------------------------------------------------------------


def _ngrams(measure: str, first: int, limits: tuple[float, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(measure, high=x, n=n) for n, x in enumerate(limits, start=first))


GOPHER_QUALITY = (
    Rule("words", 50, 100_000),
    Rule("mean_word_length", 3, 10),
    Rule("hash_per_word", high=0.1),
    Rule("ellipsis_per_word", high=0.1),
    Rule("bullet_lines", high=0.9),
    Rule("ellipsis_lines", high=0.3),
    Rule("alphabetic_words", low=0.8),
    Rule("stop_words", low=2),
)
GOPHER_REPETITION = (
    Rule("duplicate_paragraphs", high=0.3),
    Rule("duplicate_paragraph_characters", high=0.2),
    Rule("duplicate_lines", high=0.3),
    Rule("duplicate_line_characters", high=0.2),
    *_ngrams("top_ngram", 2, (0.2, 0.18, 0.16)),
    *_ngrams("duplicate_ngram", 5, (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)),
)
FINEWEB = (
    Rule("punctuated_lines", low=0.12),
    Rule("short_lines", high=0.67),
    Rule("duplicate_line_characters", high=0.1),  # .01 in the paper's code, .1 since FineWeb-2
    Rule("newlines_per_word", high=0.3),
)
FINEWEB2_ZH = (
    Rule("words", 50, 100_000),
    Rule("mean_word_length", 1, 5),
    Rule("hash_per_word", high=0.1),
    Rule("ellipsis_per_word", high=0.1),
    Rule("bullet_lines", high=0.9),
    Rule("ellipsis_lines", high=0.3),
    Rule("alphabetic_words", low=0.735),
    Rule("stop_words", low=2),
    Rule("duplicate_lines", high=0.287),
    *_ngrams("top_ngram", 2, (0.256, 0.201, 0.171)),
    *_ngrams("duplicate_ngram", 5, (0.198, 0.182, 0.167, 0.154, 0.140, 0.127)),
    Rule("punctuated_lines", low=0.106),
    Rule("duplicate_line_characters", high=0.1),
    Rule("newlines_per_word", high=0.178),
)
# Ours, for manuals: short pages, lists, code and headings are normal; chrome and filler are not.
DOCS = (
    Rule("lorem_ipsum", high=0),
    Rule("policy_phrases_per_100_words", high=2),
    Rule("alphabetic_words", low=0.6),
    Rule("duplicate_lines", high=0.3),
    Rule("duplicate_paragraphs", high=0.3),
    *_ngrams("top_ngram", 2, (0.25, 0.22, 0.20)),
    *_ngrams("duplicate_ngram", 5, (0.3, 0.28, 0.26, 0.24, 0.22, 0.20)),
    Rule("short_lines", high=0.85),
)


def _c4(fewest_sentences: int) -> tuple[Rule, ...]:
    return (
        Rule("curly_brackets", high=0),
        Rule("lorem_ipsum", high=0),
        Rule("sentences", low=fewest_sentences),
    )


PRESETS: dict[str, Preset] = {
    "none": Preset("space", ()),
    "gopher": Preset("words", GOPHER_REPETITION + GOPHER_QUALITY),
    # The two code bases that state C4's line rule swap its numbers, so both are named.
    "c4-s5w3": Preset("space", _c4(5), fix="c4-w3"),
    "c4-s3w5": Preset("space", _c4(3), fix="c4-w5"),
    "fineweb": Preset("words", FINEWEB),
    "web-en": Preset("words", GOPHER_REPETITION + GOPHER_QUALITY + FINEWEB),
    "web-zh": Preset("rjieba", FINEWEB2_ZH, STOP_WORDS_ZH),
    "docs-en": Preset("words", (Rule("words", 20, 1_000_000), Rule("stop_words", low=2), *DOCS)),
    "docs-zh": Preset(
        "rjieba", (Rule("words", 20, 1_000_000), Rule("stop_words", low=2), *DOCS), STOP_WORDS_ZH
    ),
}
# Short for the preset of the document's own language.
FAMILIES = ("docs", "web")


def preset_for(name: str, language: str) -> Preset:
    """Returns a preset by name; `docs` and `web` mean the one made for the language.

    Raises:
      UserError: no preset has this name.
    """
    if name in FAMILIES:
        name = f"{name}-zh" if language.startswith("zh") else f"{name}-en"
    if name not in PRESETS:
        legal = [*FAMILIES, *PRESETS]
        close = difflib.get_close_matches(name, legal, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no preset {name!r}: {hint}Legal: {', '.join(legal)}.")
    return PRESETS[name]


def first_failure(text: str, preset: Preset) -> Failure | None:
    """Returns the first rule of the preset that the text fails, None when it passes all."""
    shared = Text(text, preset)
    for rule in preset.rules:
        value = MEASURES[rule.measure](shared, rule.n)
        if not rule.low <= value <= rule.high:
            return Failure(rule.name, value, rule.low, rule.high)
    return None


def measures(text: str, preset: Preset) -> dict[str, float]:
    """Returns the value of every rule of a preset: what `why was this dropped` is answered with."""
    shared = Text(text, preset)
    return {rule.name: MEASURES[rule.measure](shared, rule.n) for rule in preset.rules}


def fix_lines(text: str, preset: Preset) -> str:
    """Returns the text without the lines that the preset's source drops (C4), else unchanged."""
    if not preset.fix:
        return text
    fewest = int(preset.fix.removeprefix("c4-w"))
    kept = (re.sub(r"\[\d+\]|\[edit\]|\[citation needed\]", "", x) for x in text.split("\n"))
    return "\n".join(line for line in kept if not line.strip() or _keep_c4(line.strip(), fewest))


def _keep_c4(line: str, fewest_words: int) -> bool:
    lower, words = line.lower(), line.split()
    return (
        line.endswith((".", "?", "!", '"', "'", "”"))
        and not line.endswith("...")
        and len(words) >= fewest_words
        and max(map(len, words)) <= 1000
        and "javascript" not in lower
        and not POLICY.search(lower)
    )
