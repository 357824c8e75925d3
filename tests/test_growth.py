"""Comparisons that grow, and what they say about their registration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, few_probes

from gpt.compare import comparison, registration
from gpt.compare.comparison import read_comparison
from gpt.compare.grid import load, parse_seeds
from gpt.errors import InputError

THREE = ("pre", "deepnorm", "post")
LOSS = {"question": "Is it worse?", "of": ["deepnorm", "pre"]}  # the contrast of `small_grid`


def results(directory: Path) -> dict[str, int]:
    """When each cell's result was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in directory.glob("cells/*/result.json")}


def late(directory: Path) -> list[str]:
    summary = json.loads((directory / "summary.json").read_text())
    for each in summary["contrasts"]:
        assert each["confirmatory"] == (not each["late"])
    return [each["late"] for each in summary["contrasts"]]


def test_what_is_registered_is_said_with_its_hash(run_grid: Any, tmp_path: Path):
    assert run_grid()[0] == 0
    grid, _ = load(tmp_path / "grid.yaml")
    sha256 = registration.fingerprint(grid.contrasts, grid.seeds, grid.search)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "small" / name).read_text()
        assert f"before any result (SHA-256 {sha256})" in text
    assert late(tmp_path / "small") == [""]
    assert sha256 in run_grid("--dry-run")[1]


def test_the_hash_of_a_published_report_holds(tmp_path: Path):
    """Keys that contrasts gained later are hashed only where they are set."""
    published = ROOT / "docs/results/quick"
    grid, _ = load(published / "grid.yaml")
    written = json.loads((published / "registration.json").read_text())
    assert registration.fingerprint(grid.contrasts, grid.seeds, grid.search) == written["sha256"]
    (tmp_path / "grid.yaml").write_text(grid.to_yaml())  # which spells out every key
    again, _ = load(tmp_path / "grid.yaml")
    assert registration.fingerprint(again.contrasts, again.seeds, None) == written["sha256"]
    sloped = [grid.contrasts[0].model_copy(update={"slope": "model.layers"})]
    assert registration.fingerprint(sloped, grid.seeds, None) != registration.fingerprint(
        grid.contrasts[:1], grid.seeds, None
    )


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({"seeds": [1, 7, 0]}, 2),
        ({"grid": {"optimizer.learning_rate": [0.003, 0.01]}}, 4),
        ({"arms": {"placement": {name: {"model.norm.placement": name} for name in THREE}}}, 2),
    ],
)  # fmt: skip
def test_extend_adds_cells_and_keeps_results(
    run_grid: Any, tmp_path: Path, changes: dict[str, Any], cells: int
):
    assert run_grid()[0] == 0
    before, directory = results(tmp_path / "small"), tmp_path / "small"
    code, _, error = run_grid(**changes)
    assert code == 2
    assert f"--extend adds {cells} cells to it" in error
    assert results(directory) == before
    touched = "arms" not in changes
    warning = "questions that become exploratory, as they include cells that are added now: 1 of 1"
    assert (warning in run_grid("--extend", "--dry-run", **changes)[1]) == touched
    code, out, error = run_grid("--extend", **changes)
    assert code == 0, error
    assert (warning in error) == touched
    after = results(directory)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + cells
    reason = f"it includes {cells} cells added when 4 cells had a result"
    assert late(directory) == [reason if touched else ""]
    assert (f"This answer is exploratory: {reason}." in out) == touched
    assert f"when 4 cells had a result: {cells} cells" in (directory / "report.md").read_text()
    assert run_grid(**changes)[0] == 0  # it has grown: no flag is needed
    assert results(directory) == after
    assert len(registration.read_registration(directory).additions) == 1  # type: ignore[union-attr]


def test_a_question_that_is_added_is_exploratory_and_those_before_are_not(
    run_grid: Any, tmp_path: Path
):
    assert run_grid()[0] == 0
    more = [LOSS, {**LOSS, "of": ["deepnorm", "pre"], "measure": "failure"}]
    code, _, error = run_grid("--extend", contrasts=more)
    assert code == 0, error
    assert late(tmp_path / "small") == ["", "the question was added when 4 cells had a result"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 1}, "the new grid has no cell"),
        ({"grid": {"optimizer.learning_rate": [0.03]}}, "the new grid has no cell"),
        ({"contrasts": []}, "contrasts: new ones must come after"),
        (
            {"contrasts": [{**LOSS, "measure": "failure"}]},
            "contrasts: new ones must come after",
        ),
        ({"options": {"training.steps": 8}}, "the new grid changes cell"),
    ],
)
def test_extend_takes_nothing_away(
    run_grid: Any, tmp_path: Path, changes: dict[str, Any], words: str
):
    assert run_grid()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()}
    code, _, error = run_grid("--extend", **changes)
    assert code == 2
    assert words in error
    assert "choose another --out-dir" in error
    assert len(error.splitlines()) <= 3
    assert {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_new_arms_are_probed_too(run_grid: Any, tmp_path: Path):
    with few_probes():
        assert run_grid(probes=True)[0] == 0
        arms = {"placement": {name: {"model.norm.placement": name} for name in THREE}}
        assert run_grid("--extend", probes=True, arms=arms)[0] == 0
    probes = json.loads((tmp_path / "small/probes.json").read_text())
    assert {arm for each in probes for arm in each["arms"]} == set(THREE)


def test_before_the_first_result_a_grid_changes_its_registration_freely(
    run_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run_tasks", lambda *arguments, **options: False)
        assert run_grid("--workers", "1")[0] == 75
    assert run_grid("--extend", seeds=3)[0] == 0
    assert late(tmp_path / "small") == [""]
    assert registration.read_registration(tmp_path / "small").seeds == [0, 1, 2]  # type: ignore[union-attr]


def test_results_that_were_deleted_have_been_seen(run_grid: Any, tmp_path: Path):
    assert run_grid()[0] == 0
    shutil.rmtree(tmp_path / "small/cells")
    assert run_grid("--extend", seeds=3)[0] == 0
    assert late(tmp_path / "small") == ["it includes 2 cells added when results were known"]


def test_an_addition_that_was_not_carried_out_is_forgotten(
    run_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The extension is killed before it writes its grid; the old command runs again."""
    assert run_grid()[0] == 0
    write, directory = comparison.write_text, tmp_path / "small"

    def killed(path: Path, text: str) -> None:
        if path.name == "grid.yaml":
            raise KeyboardInterrupt
        write(path, text)

    asked = [LOSS, {**LOSS, "of": ["deepnorm", "pre"], "measure": "failure"}]
    changes = {"contrasts": asked, "seeds": 3}
    monkeypatch.setattr(comparison, "write_text", killed)
    code, _, error = run_grid("--extend", **changes)
    assert code == 130, error
    assert registration.read_registration(directory).additions  # type: ignore[union-attr]
    monkeypatch.setattr(comparison, "write_text", write)
    assert run_grid()[0] == 0
    assert registration.read_registration(directory).additions == []  # type: ignore[union-attr]
    assert late(directory) == [""]
    assert run_grid("--extend", **changes)[0] == 0
    (added,) = registration.read_registration(directory).additions  # type: ignore[union-attr]
    assert (len(added.cells), added.contrasts, added.results) == (2, 1, 4)


def test_a_start_that_was_killed_after_it_registered_is_repeated(run_grid: Any, tmp_path: Path):
    assert run_grid(out="other")[0] == 0
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "other/registration.json", tmp_path / "small")
    assert run_grid()[0] == 0
    assert late(tmp_path / "small") == [""]


def test_an_exploratory_answer_is_called_so_in_the_tables_too(run_grid: Any, tmp_path: Path):
    assert run_grid()[0] == 0
    assert "(exploratory)" not in (tmp_path / "small/report.md").read_text()
    assert run_grid("--extend", seeds=3)[0] == 0
    for name in ("report.html", "report.md"):
        assert "NOT SETTLED (exploratory)" in (tmp_path / "small" / name).read_text()
    (result,) = read_comparison(tmp_path / "small")[1].contrasts
    assert result is not None
    assert not result.confirmatory


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), registration.UNKNOWN),
        (lambda path: path.write_text(path.read_text().replace('"contrasts": 1', '"contrasts": 0')),
         registration.CHANGED),
        (lambda path: path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0')),
         registration.CHANGED),
    ],
)  # fmt: skip
def test_registered_is_only_said_where_it_agrees(
    run_grid: Any, tmp_path: Path, change: Any, reason: str
):
    assert run_grid()[0] == 0
    change(tmp_path / "small/registration.json")
    assert run_grid("--report-only")[0] == 0
    assert late(tmp_path / "small") == [reason]
    assert "Registered on" not in (tmp_path / "small/report.html").read_text()


def test_a_damaged_registration_is_named(run_grid: Any, tmp_path: Path):
    assert run_grid()[0] == 0
    (tmp_path / "small/registration.json").write_text('{"time": 3}')
    code, _, error = run_grid("--report-only")
    assert code == 2
    assert "registration.json" in error


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1", (0,)), ("3", (0, 1, 2)), ("16:18", (16, 17)), (":2", (0, 1)), ("7, 1", (7, 1))],
)
def test_seeds_of_a_text(text: str, seeds: tuple[int, ...]):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "-1",
        "1.5",
        "3:3",
        "5:2",
        "1:",
        "1:2:3",
        "1,,2",
        "4,4",
        "10001",
        "0:99999999999",
    ],
)
def test_other_texts_are_not_seeds(text: str):
    with pytest.raises(InputError, match="--seeds: "):
        parse_seeds(text)


def test_other_seeds_need_no_excluded_ones(run_grid: Any, tmp_path: Path):
    """An entry of `exclude` for seeds that are not run matches no cell."""
    less = [{"arm": "pre", "seed": [1]}, {"arm": "pre", "optimizer.learning_rate": [0.02]}]
    assert run_grid(exclude=less)[0] == 2  # the second matches nothing
    assert "matches no cell" in run_grid("--seeds", "8:10", exclude=less)[2]
    assert run_grid("--seeds", "8:10", exclude=less[:1])[0] == 0
    assert len(results(tmp_path / "small")) == 4


def test_flags_that_exclude_each_other(run_grid: Any):
    for flag in ("--dry-run", "--extend"):
        code, _, error = run_grid("--report-only", flag)
        assert code == 2
        assert f"give {flag} or --report-only, not both" in error
