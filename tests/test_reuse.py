"""Comparisons that copy finished runs from others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_growth import late, results

from gpt.cli.common import StopSignals
from gpt.compare import comparison, registration
from gpt.compare.comparison import read_comparison
from gpt.compare.reuse import copy_run
from gpt.run.directory import RunDirectory


def test_runs_of_other_comparisons_are_copied_and_the_report_says_so(run_grid: Any, tmp_path: Path):
    assert run_grid("--seeds", "0:2", out="one")[0] == 0
    assert run_grid("--seeds", "2:4", out="two")[0] == 0
    sources = (tmp_path / "one", tmp_path / "two")
    flags = ("--seeds", "5", "--reuse", *sources)
    assert run_grid(*flags, "--dry-run", out="all")[1].count("(is copied)") == 8
    assert not (tmp_path / "all").exists()
    code, out, error = run_grid(*flags, out="all")
    assert code == 0, error
    assert f"4 cells copied from {sources[1]}" in error + out
    directory = tmp_path / "all"
    assert len(results(directory)) == 10
    assert late(directory) == [f"it includes 4 cells copied with results from {sources[0]}"]
    for source in sources:
        for theirs in (source / "cells").iterdir():
            mine = directory / "cells" / theirs.name
            for name in ("metrics.jsonl", "result.json", "environment.json"):
                assert (mine / name).read_bytes() == (theirs / name).read_bytes()
            assert "copied" in (mine / "history.jsonl").read_text()
            assert RunDirectory(mine).read_config().name == theirs.name
    _, summary, _ = read_comparison(directory)
    assert summary.with_result == 10
    assert summary.match.exceptions == ()


def test_only_runs_of_the_same_config_are_copied(run_grid: Any, tmp_path: Path):
    assert run_grid(out="one")[0] == 0
    code, _, error = run_grid("--reuse", tmp_path / "one", out="two", options={"model.layers": 3})
    assert code == 0
    assert "copied" not in error
    code, _, error = run_grid("--reuse", tmp_path / "nowhere", out="three")
    assert code == 2
    assert "is not a comparison directory" in error


def test_a_link_among_reused_runs_is_refused(run_grid: Any, tmp_path: Path):
    assert run_grid(out="one")[0] == 0
    cell = next((tmp_path / "one/cells").iterdir())
    (cell / "tokenizer.json").unlink()
    (cell / "tokenizer.json").symlink_to(tmp_path / "grid.yaml")
    code, _, error = run_grid("--reuse", tmp_path / "one", out="two")
    assert code == 2
    assert f"--reuse: {cell / 'tokenizer.json'}: is a symbolic link" in error
    assert not (tmp_path / "two/registration.json").exists()


def test_a_damaged_run_is_named_before_anything_is_copied(run_grid: Any, tmp_path: Path):
    assert run_grid(out="one")[0] == 0
    cell = next((tmp_path / "one/cells").iterdir())
    (cell / "environment.json").write_text("{}")
    code, _, error = run_grid("--reuse", tmp_path / "one", out="two")
    assert code == 2
    assert str(cell / "environment.json") in error
    assert not (tmp_path / "two/cells").exists()


def test_a_copy_can_be_written_even_if_its_source_cannot(run_grid: Any, tmp_path: Path):
    assert run_grid(out="one")[0] == 0
    for path in (tmp_path / "one").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run_grid("--reuse", tmp_path / "one", out="two")[0] == 0
    for path in (tmp_path / "two/cells").rglob("*"):
        assert path.stat().st_mode & 0o200, path


def test_a_stop_while_copying_makes_no_report(
    run_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_grid(out="one")[0] == 0
    copied: list[str] = []

    def noted(source: Path, cell: Any, directory: Path) -> None:
        copied.append(cell.id)
        copy_run(source, cell, directory)

    monkeypatch.setattr(comparison, "copy_run", noted)
    monkeypatch.setattr(StopSignals, "__call__", lambda self: len(copied) >= 2)
    assert run_grid("--reuse", tmp_path / "one", out="two")[0] == 75
    assert len(copied) == 2
    assert not (tmp_path / "two/summary.json").exists()


@pytest.mark.parametrize("grown", [False, True])
def test_runs_that_were_not_copied_are_not_said_to_be(
    run_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: bool
):
    """The start that copies is killed after its first copy; the next one trains the others."""
    assert run_grid("--seeds", "0:4", out="source")[0] == 0
    if grown:
        assert run_grid(out="grown")[0] == 0
    copy, copied = comparison.copy_run, []

    def killed(run: Path, *others: Any) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(run)
        copy(run, *others)

    flags = ("--seeds", "0:4", *(["--extend"] * grown))
    monkeypatch.setattr(comparison, "copy_run", killed)
    assert run_grid(*flags, "--reuse", tmp_path / "source", out="grown")[0] == 130
    monkeypatch.setattr(comparison, "copy_run", copy)
    assert run_grid("--seeds", "0:4", out="grown")[0] == 0
    found = registration.read_registration(tmp_path / "grown")
    assert found is not None
    said = {bool(each.source): len(each.cells) for each in found.additions}
    assert said == ({True: 1, False: 3} if grown else {True: 1})
    assert late(tmp_path / "grown")[0].startswith("it includes 1 cell copied with results from")


def test_growing_by_copies_says_so(run_grid: Any, tmp_path: Path):
    assert run_grid()[0] == 0
    assert run_grid("--seeds", "2:4", out="two")[0] == 0
    assert run_grid("--seeds", "4", "--extend", "--reuse", tmp_path / "two")[0] == 0
    assert late(tmp_path / "small") == [
        f"it includes 4 cells copied with results from {tmp_path / 'two'}"
    ]


def test_seeds_of_another_version_are_noticed(run_grid: Any, tmp_path: Path):
    assert run_grid(out="one")[0] == 0
    for path in (tmp_path / "one/cells").glob("*/environment.json"):
        tree = json.loads(path.read_text())
        tree["versions"]["torch"] = "1.0.0"
        path.write_text(json.dumps(tree))
    assert run_grid("--seeds", "3", "--reuse", tmp_path / "one", out="two")[0] == 0
    exceptions = read_comparison(tmp_path / "two")[1].match.exceptions
    assert any("differ in torch" in each and "1.0.0" in each for each in exceptions)


def test_a_copy_that_was_killed_is_made_again(
    run_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_grid(out="one")[0] == 0
    copy, copied = shutil.copytree, []

    def killed(*arguments: Any, **options: Any) -> None:
        copied.append(copy(*arguments, **options))
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", killed)
    assert run_grid("--reuse", tmp_path / "one", out="two")[0] == 130
    monkeypatch.setattr(shutil, "copytree", copy)
    assert run_grid("--reuse", tmp_path / "one", out="two")[0] == 0
    names = [path.name for path in (tmp_path / "two/cells").iterdir()]
    assert len(names) == 4
    assert not any(name.startswith(".") for name in names)
    assert late(tmp_path / "two")[0].startswith("it includes 4 cells copied")
