"""Every notebook runs from top to bottom, and none is committed with outputs."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="install the extra `notebook`")
nbclient = pytest.importorskip("nbclient", reason="install the extra `notebook`")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        # the messaging library under nbclient warns about event loops of its own
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [out["text"] for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "text" in out]
    assert any("1 trace for three stages" in text for text in texts)
    shown = [
        str(out.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for out in cell.outputs
    ]
    proof = ast.literal_eval(next(text for text in shown if "mismatches" in text))
    assert proof["mismatches"]["emulator"] == proof["mismatches"]["da4ml"] == 0
    assert proof["vectors"] >= 12_000
