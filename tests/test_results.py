"""Folders of docs/results say how they were measured; their numbers are those of the data."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, linear_regression, stdev
from typing import Any

import pytest
from conftest import ROOT

RESULTS = ROOT / "docs/results"
RATE, LOSS = "optimizer.learning_rate", "final_val_loss"  # columns of cells.csv
INDEX = (RESULTS / "README.md").read_text("utf-8")
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())
LITERATURE = sorted(path.parent for path in RESULTS.glob("literature/*/summary.json"))


def page(name: str) -> str:
    return (RESULTS / name / "README.md").read_text("utf-8")


def row(name: str) -> str:
    """The line of the index that links to a result, with ASCII signs."""
    (line,) = [line for line in INDEX.splitlines() if f"({name}/README.md)" in line]
    return line.replace("−", "-")


def contrasts(folder: Path) -> list[dict[str, Any]]:
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary["contrasts"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS])
def test_it_says_how_it_was_measured(name: str):
    facts = dict(re.findall(r"^\| (\w+) \| (.+) \|$", page(name).partition("\n## ")[0], re.M))
    assert list(facts) == ["command", "machine", "versions", "date", "duration"]
    assert re.search("`.+`", facts["command"]) or "commit" in facts["command"]
    assert "cores" in facts["machine"]
    assert "Python 3" in facts["versions"]
    assert re.match(r"20\d\d-\d\d-\d\d", facts["date"])
    assert re.search(r"\d (s|min)|not recorded", facts["duration"])
    assert row(name).split("|")[-2].strip() in facts["date"]


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS])
def test_it_ends_with_what_it_does_not_show(name: str):
    headings = re.findall(r"^## (.*)$", page(name), re.MULTILINE)
    assert "What it does not show" in headings or name == "literature"
    assert "What differs from the papers" in headings or name != "literature"
    assert "Details" not in headings


def test_tables_in_files_are_linked():
    tables = [path for path in RESULTS.glob("*/*.csv") if path.name != "cells.csv"]
    assert len(tables) == 3
    for path in tables:
        assert f"({path.name})" in page(path.parent.name)


# -- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "questions"), [("quick", 4), ("remedies", 5)])
def test_the_losses_are_those_of_the_summary(name: str, questions: int):
    table = r"\| ([-+][\d.]+) \| ([-+].*? to .*?) \| ([\d.]+) \| (YES|NO) \|"
    rows = re.findall(table, page(name))
    found = contrasts(RESULTS / name)
    assert len(rows) == len(found) == questions
    for (value, interval, p, answer), contrast in zip(rows, found, strict=True):
        low, high = contrast["interval"]["low"], contrast["interval"]["high"]
        assert value == f"{contrast['value']:+.3f}"
        assert interval == f"{low:+.3f} to {high:+.3f}"
        assert float(p) == pytest.approx(contrast["p"], rel=0.02)
        assert (answer == "YES") == (contrast["answer"] == "supported")
        quoted = rf"{contrast['value']:.3f}[a-z ]* \({low:.3f} to {high:.3f}\)"
        assert re.search(quoted, row(name)), quoted


def test_a_hundred_layers_are_those_of_the_summary():
    folder = RESULTS / "hundred-layers"
    higher, within = contrasts(folder)
    low, high = higher["interval"]["low"], higher["interval"]["high"]
    quoted = f"{higher['value']:.3f} nats higher ({low:.3f} to {high:.3f})"
    tour = (ROOT / "docs/tour/hundred-layers.md").read_text("utf-8")
    assert quoted in row("hundred-layers")
    assert quoted in re.sub(r"\s+", " ", tour)
    assert (higher["answer"], within["answer"]) == ("supported", "open")
    with (folder / "cells.csv").open(encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    for arm in ("pre, warm-up", "post, warm-up", "pre, no warm-up", "post, no warm-up"):
        counts = []
        for rate in (0.002, 0.003):
            runs = [c for c in cells if (c["arm"], float(c[RATE])) == (arm, rate)]
            failed, losses = [c["failed"] == "True" for c in runs], [float(c[LOSS]) for c in runs]
            mean, spread = f"{fmean(losses):.3f}", f"{stdev(losses):.3f}"
            shown = f"{mean} ± {spread}, {sum(failed)} of {len(runs)}"
            assert re.search(rf"\| {arm} \|.* {shown} \|", page("hundred-layers")), shown
            counts.append(f"{len(runs) - sum(failed)} of {len(runs)}")
        assert f"| {arm.replace(',', '-norm,')} | {counts[0]} | {counts[1]} |" in tour


def test_the_exponents_of_depth_are_those_of_its_searches():
    """A least-squares slope for each seed, whose bound counts as its rate."""
    summary = json.loads((RESULTS / "depth/summary.json").read_text("utf-8"))
    rates: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for search in summary["searches"]:
        depth = math.log(int(search["setting"].removeprefix("layers ")))
        rates[search["arm"], search["seed"]][depth] = math.log(search["rate"])
    slopes = defaultdict(list)
    for (arm, _), found in rates.items():
        slopes[arm].append(linear_regression(list(found), list(found.values())).slope)
    pre, deepnorm, post = (fmean(slopes[arm]) for arm in ("pre", "DeepNorm", "post"))
    assert f"{pre:.2f} in pre-norm, {deepnorm:.2f} with DeepNorm, and {post:.1f}" in row("depth")

    difference, _, ratio = contrasts(RESULTS / "depth")
    low = difference["interval"]["low"]
    assert pre - post == pytest.approx(difference["value"])
    quoted = f"at least {difference['value']:.2f} below pre-norm's ({low:.2f} or more)"
    for text in (row("depth"), page("depth")):
        assert quoted in re.sub(r"\s+", " ", text)
    assert f"at least {math.exp(ratio['value']):.1f} " in page("depth")


def test_the_ratios_of_thresholds_are_those_of_the_summary():
    question, post, pre = contrasts(RESULTS / "thresholds")
    assert ("Not settled" in row("thresholds")) == (question["answer"] == "open")
    for contrast, placement in ((post, "post-norm"), (pre, "pre-norm")):
        value, low, high = (
            math.exp(x)
            for x in (contrast["value"], contrast["interval"]["low"], contrast["interval"]["high"])
        )
        quoted = f"{value:.1f}-fold in {placement} ({low:.1f} to {high:.1f})"
        assert quoted in row("thresholds"), quoted


def test_the_best_size_is_that_of_the_summary():
    summary = json.loads((RESULTS / "scaling/summary.json").read_text("utf-8"))
    best, interval = summary["curves"][2]["best"], summary["curves"][2]["interval"]
    assert f"{round(best, -2):,.0f} parameters" in row("scaling")
    for end in ("low", "high"):
        assert f"{float(f'{interval[end]:.3g}'):,.0f}" in row("scaling")


def test_claims_of_the_literature_are_counted():
    """In full: every registered question was answered as the paper says."""
    text = page("literature")
    labels = ("**Replicates.**", "**replicates**", "**Does not**", "**Open.**")
    results = [line.split("|")[-2] for line in text.splitlines() if "/report.md)" in line]
    counts = [sum(result.count(label) > 0 for result in results) for label in labels]
    assert counts == [6, 4, 2, 2]
    assert sum(counts) == len(results) == len(LITERATURE) == 14
    for sentence in (text, row("literature")):
        assert "six replicate, four in part, two do not, and two stay open" in sentence

    for folder in LITERATURE:
        (result,) = [result for result in results if f"({folder.name}/report.md)" in result]
        in_full = all(contrast["answer"] == "supported" for contrast in contrasts(folder))
        assert in_full == ("**Replicates.**" in result), folder.name


def test_the_coverage_is_that_of_the_table():
    with (RESULTS / "intervals/coverage.csv").open(encoding="utf-8") as file:
        found = {case: numbers[:5] for _, case, *numbers in csv.reader(file)}
    normal = [float(value) for value in found["normal"]]
    for text in (row("intervals"), page("intervals")):
        assert f"cover {min(normal):.1%} to {max(normal):.1%}" in text
    assert max(float(value) for value in found["effect 0.0"]) == 0.02
    assert "at most 2%" in row("intervals")
