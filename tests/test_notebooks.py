"""Every notebook runs from top to bottom in a fresh kernel; what is committed stays small."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_OUTPUT_BYTES = 100_000


def test_there_are_notebooks():
    assert "01_model.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_small(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [cell.get("outputs", []) for cell in cells]
    assert len(json.dumps(outputs)) <= MAX_OUTPUT_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_without_an_error(path, monkeypatch, tmp_path):
    """nbclient raises on the first cell that does; the notebook's own asserts are its laws."""
    import nbformat
    from nbclient import NotebookClient

    # The kernel is another process: one device, this tree, and an IPython folder of its own.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    printed = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    ]
    assert any("loss:" in text for text in printed)
