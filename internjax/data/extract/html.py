"""The main text of a web page as Markdown: resiliparse decodes, trafilatura extracts."""

import re

from internjax.data.extract import Extracted, ExtractError, Limits
from internjax.data.extract.text import tidy

CHARACTERS = re.compile(r"\bcharset=[\"']?\s*([\w.:-]+)", re.I)


def extract(data: bytes, limits: Limits) -> Extracted:
    """Returns the main text; pages that trafilatura finds nothing in are `empty`."""
    import trafilatura

    text, encoding = decode(data)
    content = trafilatura.extract(
        text,
        output_format="markdown",
        include_comments=False,
        include_tables=True,
        include_formatting=True,
    )
    if not content:
        raise ExtractError("empty", "the page has no main text")
    title, date, language = _head(text)
    content = re.sub(r"¶$", "", tidy(content), flags=re.M)
    return Extracted(content, title, date, language, {"encoding": encoding})


def decode(data: bytes) -> tuple[str, str]:
    """Returns text and encoding: byte-order mark, UTF-8, the page's own word, the detector.

    UTF-8 comes before the page's declaration: text that is valid UTF-8 by chance is rare, and a
    wrong `charset` is common.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        encoding = detect_encoding(data, from_html_meta=True)
        return bytes_to_str(data, encoding, errors="replace"), encoding


def _head(text: str) -> tuple[str, str, str]:
    """Returns title, date and language as the page states them; nothing is guessed."""
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(text)
    root = tree.document.query_selector("html")
    language = (root.getattr("lang") or "") if root else ""
    date = ""
    for selector in ('meta[property="article:published_time"]', 'meta[name="date"]', "time"):
        node = tree.document.query_selector(selector)
        stated = node and (node.getattr("content") or node.getattr("datetime"))
        if found := re.match(r"\d{4}-\d\d-\d\d", stated or ""):
            date = found[0]
            break
    return " ".join((tree.title or "").split()), date, language
