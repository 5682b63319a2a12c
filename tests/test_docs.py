"""The guide is true where a machine can tell: links lead somewhere, commands and keys exist."""

import re
import shlex
from pathlib import Path

import pytest

from internjax import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    """Every `internjax ...` line of a page is understood by the command line's own parser."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    blocks = [block for language, block in found if not language]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(internjax [^`|]*)`", text)
    for line in lines:
        words = shlex.split(re.sub(r"^(\$ |\S*=\S+ |\.venv/bin/)+", "", line), comments=True)
        if words[:1] != ["internjax"] or words[1:2] in ([], ["VERB"], ["动词"], ["--help"]):
            continue
        given = [word for word in words[1:] if not word.startswith("-")]
        if given[1:2] == ["gett"]:
            continue  # shown as a mistake
        if len(given) == 1:
            assert given[0] in {verb for verb, _ in cli.VERBS}, line
        else:
            cli.parse(given)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_stage_has_a_page(language):
    stages = {"catalog", "data", "pretrain", "tune", "evaluate", "quantize", "serve", "agent"}
    pages = {path.stem for path in (ROOT / "docs" / language).glob("*.md")}
    assert stages | {"index", "install", "command-line", "chain", "models"} <= pages


def test_the_lineage_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "en" / "lineage.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "lineage.md", "exec"), {})
    assert len(list((tmp_path / "runs" / "store").iterdir())) == 1
