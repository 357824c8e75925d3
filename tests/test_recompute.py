"""Published reports agree with an outside recomputation, tests/recompute.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from recompute import recompute

REPORTS = sorted(
    path.parent
    for path in (ROOT / "docs").rglob("summary.json")
    if "contrasts" in json.loads(path.read_text("utf-8"))  # not those of earlier versions
)


def test_the_script_imports_nothing_of_gpt():
    assert "gpt" not in {
        line.split()[1].split(".")[0]
        for line in (ROOT / "tests/recompute.py").read_text("utf-8").splitlines()
        if line.startswith(("import ", "from "))
    }


@pytest.mark.parametrize("directory", REPORTS, ids=lambda path: path.name)
def test_a_published_report_is_recomputed(directory: Path):
    assert recompute(directory) == []


def test_a_changed_number_is_noticed(tmp_path: Path):
    shutil.copytree(ROOT / "docs/results/quick", tmp_path, dirs_exist_ok=True)
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    summary["contrasts"][0]["interval"]["low"] += 1e-3
    summary["arms"][0]["by_rate"][1]["failures"] += 1
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = recompute(tmp_path)
    assert [line.split(":")[0] for line in found] == [
        "pre, no warm-up at 0.003",
        "contrast 0",
    ]
