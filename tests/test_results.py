"""Folders of docs/results name command, machine and date; their numbers are those of the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

RESULTS = ROOT / "docs/results"
INDEX = (RESULTS / "README.md").read_text("utf-8")
FOLDERS = sorted(page.parent for page in RESULTS.glob("*/README.md"))


def test_every_folder_is_a_result():
    assert sorted(path for path in RESULTS.iterdir() if path.is_dir()) == FOLDERS
    for folder in FOLDERS:
        assert f"({folder.name}/README.md)" in INDEX


@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f.name != "literature"], ids=lambda folder: folder.name
)
def test_it_says_how_it_was_measured(folder: Path):
    page = (folder / "README.md").read_text("utf-8")
    facts = dict(
        re.findall(r"^\| (\w+) \| (.+) \|$", page.partition("## Details")[0], re.MULTILINE)
    )
    assert list(facts) == ["command", "machine", "versions", "date"]
    assert re.search("`.+`", facts["command"])
    assert "cores" in facts["machine"]
    assert "Python 3" in facts["versions"]
    assert re.match(r"20\d\d-\d\d-\d\d", facts["date"])
    (row,) = [line for line in INDEX.splitlines() if f"({folder.name}/README.md)" in line]
    assert row.rpartition("|")[0].rpartition("| ")[2].strip() in facts["date"]


def contrasts(name: str) -> list[dict[str, Any]]:
    summary = json.loads((RESULTS / name / "summary.json").read_text("utf-8"))
    return summary["contrasts"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["quick", "remedies"])
def test_the_answers_are_those_of_the_summary(name: str):
    page = (RESULTS / name / "README.md").read_text("utf-8")
    rows = re.findall(r"\| ([-+][\d.]+) \| ([-+].*? to .*?) \| ([\d.]+) \| (YES|NO) \|", page)
    found = contrasts(name)
    assert len(rows) == len(found) > 3
    for (value, interval, p, answer), contrast in zip(rows, found, strict=True):
        low, high = contrast["interval"]["low"], contrast["interval"]["high"]
        assert value == f"{contrast['value']:+.3f}"
        assert interval == f"{low:+.3f} to {high:+.3f}"
        assert float(p) == pytest.approx(contrast["p"], rel=0.02)
        assert (answer == "YES") == (contrast["answer"] == "supported")


def test_the_index_quotes_the_summaries():
    for contrast in contrasts("quick")[2:]:
        low, high = (f"{contrast['interval'][end]:.3f}" for end in ("low", "high"))
        sentence = INDEX.replace(" nats (", " (").replace("−", "-")
        assert f"{contrast['value']:.3f} ({low} to {high})" in sentence
    for contrast in contrasts("remedies")[:4]:
        assert f"{contrast['value']:.3f}" in INDEX
