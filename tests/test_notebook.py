"""docs/notebook.ipynb: it runs, and shows what a real run of it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_shows_the_outputs_of_a_run_from_top_to_bottom():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    shown = {kind for output in outputs for kind in output.get("data", ())}
    assert shown >= {"text/html", "image/png"}
    assert NOTEBOOK.stat().st_size < 400_000
    assert "/home" not in NOTEBOOK.read_text("utf-8")


@pytest.mark.slow
def test_it_runs(tmp_path: Path, environment: dict[str, str]):
    """As a script, in which the last expression of each cell is shown as a notebook would."""
    script = tmp_path / "cells.py"
    script.write_text("\n".join(map(source, code_cells())))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    assert "lowest training loss" in done.stdout
    assert "runs/slow" not in done.stderr  # quiet
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"fast", "slow"}


@pytest.mark.slow
def test_it_runs_in_jupyter(tmp_path: Path, environment: dict[str, str]):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("100%|" in output.get("text", "") for output in outputs)  # the progress bar
