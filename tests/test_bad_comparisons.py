"""Damaged and forged comparisons. What a clear error is: see `bad_input.py`."""

from __future__ import annotations

import csv
import html
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import (
    ODD_KINDS,
    WRONG_JSON,
    call,
    corrupted_copy,
    is_clear,
    must_be_clear,
    put,
    refused,
    tries,
)
from conftest import rendering
from hypothesis import given
from hypothesis import strategies as st

from gpt.compare.grid import load
from gpt.errors import printable

# -- By the thousand ---------------------------------------------------------------------------


@tries(0.03)
@given(data=st.data())
def test_a_corrupted_comparison(smallest_comparison: Path, data: st.DataObject, no_pictures: None):
    with corrupted_copy(data.draw, smallest_comparison) as folder:
        must_be_clear("compare.py", folder, "--report-only", folder=folder)


# -- One by one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("lost.json", text) for text in WRONG_JSON),
        *(
            (name, text)
            for name in ("probes.json", "command.json", "environment.json")
            for text in ("", "[]", '{"a": 1}', "[[1]]")
        ),
    ],
    ids=lambda text: text[:12],
)
def test_json_of_the_wrong_types(
    name: str, text: str, smallest_comparison: Path, tmp_path: Path, no_pictures: None
):
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "compared"))
    path = folder / name
    if name == "environment.json":
        path = next(folder.glob("cells/*/environment.json"))
    path.write_text(text)
    if text == "[]" and name in ("probes.json", "command.json"):
        return  # none of them
    assert f"{path}: is damaged" in refused("compare.py", folder, "--report-only", folder=folder)


ODD_STARTS: list[tuple[str, Any]] = [
    *(("text", []), ("arms", []), ("arms", ["nobody"])),
    *(("text.0.layers", 0), ("text.0.layers", 10**9), ("text.0.gradient_norms", [])),
    *(("text.0.stream_rms", [1.0]), ("text.0.betas", []), ("token.1.gradient_norms", [1.0] * 99)),
    *(("text.0.last_gradients", []), ("token.1.amplifications", [1.0] * 2)),
]


@pytest.mark.parametrize(("where", "value"), ODD_STARTS, ids=repr)
def test_starts_that_were_not_measured(
    where: str, value: Any, smallest_comparison: Path, tmp_path: Path
):
    """Without `no_pictures`, so that values that are accepted are also drawn."""
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "compared"))
    path = folder / "probes.json"
    tree = json.loads(path.read_text())
    *way, last = where.split(".")
    place: Any = tree[0]
    for part in way:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    path.write_text(json.dumps(tree))
    error = refused("compare.py", folder, "--report-only", folder=folder)
    assert f"{path}: is damaged; delete it to measure again" in error


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", [
    "grid.yaml", "command.json", "lost.json", "probes.json", "CELL/environment.json",
    "CELL/metrics.jsonl", "CELL/result.json", "CELL/config.yaml",
])  # fmt: skip
def test_what_is_not_a_file_in_a_comparison(
    name: str, kind: str, smallest_comparison: Path, tmp_path: Path, no_pictures: None
):
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "compared"))
    cell = min((folder / "cells").iterdir())
    put(kind, folder / name.replace("CELL", f"cells/{cell.name}"))
    began = time.process_time()
    is_clear(call("compare.py", folder, "--report-only"))
    assert time.process_time() - began < 10  # measured: 0.1 s


HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_html_in_a_comparison_is_text(smallest_comparison: Path, tmp_path: Path):
    """In arms, title, question, reasons, commands and the environment."""
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "compared"))
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    arm = "</title><b>post</b>"
    grid["arms"]["placement"][arm] = grid["arms"]["placement"].pop("post")
    grid["title"] = grid["contrasts"][0]["question"] = HTML
    grid["contrasts"][0]["of"], grid["pairs"] = ["pre", arm], [["pre", arm]]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    for path in folder.glob("cells/pre*/environment.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {HTML: HTML, "device": HTML}))
    for path in folder.glob("cells/pre*/result.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {"reason": f"given up: {HTML}", "gave_up": True}))
    lost = {cell.id: {"status": "killed", "reason": HTML} for cell in load(folder / "grid.yaml")[1]}
    (folder / "lost.json").write_text(json.dumps(lost))
    (folder / "command.json").write_text(json.dumps([{"argv": [HTML], "began": HTML}]))
    answer = call("compare.py", folder, "--report-only")
    assert answer.code == 0, answer
    html = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in html
    for raw in ("<script>alert", "<img", "<b>post", "</title><b>"):
        assert raw not in html


# -- Odd names ---------------------------------------------------------------------------------


ODD_NAMES = [
    *("..", "-", "_", "$1", "$x_$", r"\frac{a}", "%s", "{}", "{{ 1 }}", "=1+1", "@x", "+b"),
    *("-a", "-1", "<script>", "</svg>", "a|b", "`a`", "[x](javascript:y)", "**a**", "1. a"),
    *("# a", "a&amp;b", "日本", "👍", "e\u0301", "שלום", "a\u00a0b", "'a\"", "x" * 40, "|" * 40),
]


def test_every_name_that_is_accepted_has_a_report(
    smallest_comparison: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
):
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "$x$ \u202e\n%s"))
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["arms"] = {"f": {name: {"model.norm.placement": "pre"} for name in ODD_NAMES}}
    grid["grid"] = {"optimizer.learning_rate": [0.01]}
    grid["title"] = grid["contrasts"][0]["question"] = " ".join(ODD_NAMES[:20])
    grid["contrasts"][0]["of"] = ODD_NAMES[:2]
    grid["pairs"] = list(map(list, itertools.pairwise(ODD_NAMES)))
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    (run,) = folder.glob("cells/pre_learning-rate-0.01_*")
    for cell in load(folder / "grid.yaml")[1]:
        shutil.copytree(run, folder / "cells" / cell.id)
        (folder / "cells" / cell.id / "config.yaml").write_text(cell.config.to_yaml())
    starts = json.loads((folder / "probes.json").read_text())
    (folder / "probes.json").write_text(json.dumps([s | {"arms": ODD_NAMES} for s in starts]))

    with rendering():
        answer = call("compare.py", folder, "--report-only")
    assert answer.code == 0, answer
    assert printable(answer.out, "\n\t") == answer.out
    assert not [str(w.message) for w in recwarn if "font" in str(w.message)]
    page = html.unescape((folder / "report.html").read_text("utf-8"))
    svg = "".join(html.unescape(path.read_text("utf-8")) for path in folder.glob("figures/*.svg"))
    for name in ODD_NAMES:
        assert f"<tr><td>{name}</td>" in re.sub(' class="arm-[0-9]+"', "", page), name
        assert f">{name}</text>" in svg, name
    with (folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        arms = [row["arm"] for row in csv.DictReader(file)]
    formulas = {"-", "=1+1", "@x", "+b", "-a"}
    assert arms == [f"'{name}" if name in formulas else name for name in ODD_NAMES]
    text = (folder / "report.md").read_text("utf-8")
    assert not re.search(r"<script|[^\\]\]\(javascript|[^\\]`a|[^\\]\*a", text)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {10, 7, 6, 5, 4}


def test_escapes_in_forged_files_do_not_reach_the_terminal(
    smallest_comparison: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(smallest_comparison, tmp_path / "a\x1b[2J\u202eb"))
    for path in folder.glob("cells/pre*/result.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {"reason": "given up: \x1b[31m\uffff", "gave_up": True}))
    command = {"argv": ["x\ny", "\x1b"], "began": "\uffff"}
    (folder / "command.json").write_text(json.dumps([command]))
    for prog, where in (
        ("compare.py", folder),
        ("sample.py", folder),
        ("diagnose", next(folder.glob("cells/pre*0.01*"))),
    ):
        answer = call(prog, where, *(["--report-only"] if prog == "compare.py" else []))
        assert answer.code == (2 if prog == "sample.py" else 0), answer
        assert printable(answer.out + answer.err, "\n\t") == answer.out + answer.err
    for name in ("report.html", "report.md", "cells.csv"):
        text = (folder / name).read_text("utf-8")
        assert printable(text, "\n\t") == text
