"""Comparisons that grow, or take runs from others, and what they say about their registration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from comparing import Make, called, grid_tree, write
from conftest import ROOT, few_probes

from gpt.cli.common import StopSignals
from gpt.compare import comparison, estimate, registration
from gpt.compare.comparison import read_comparison
from gpt.compare.grid import load, parse_seeds
from gpt.compare.reuse import copy_run
from gpt.errors import InputError
from gpt.run.directory import RunDirectory

THREE = ("pre", "deepnorm", "post")
LOSS = {"question": "Is it worse?", "of": ["deepnorm", "pre"]}


@pytest.fixture
def small(tiny: Make) -> dict[str, Any]:
    """Two arms, one rate, two seeds, no pictures of layers."""
    base = tiny(training={"steps": 2}, evaluation={"every": 2}, sampling={"tokens": 0})
    axis = {"optimizer.learning_rate": [0.01]}
    return grid_tree(base, grid=axis, seeds=2, probes=False, contrasts=[LOSS], pairs=[])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run` keeps a copy of the plain comparison, which many tests begin with."""
    return tmp_path_factory.mktemp("finished") / "small"


@pytest.fixture
def run(
    small: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
    in_this_process: None,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Run a grid that differs from `small`, by default in `tmp_path / "small"`."""

    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)

    def start(*flags: object, out: str = "small", **changes: Any) -> tuple[int, str, str]:
        path = write(tmp_path / "grid.yaml", {**small, **changes})
        plain, directory = not flags and not changes, tmp_path / out
        if plain and not directory.exists() and finished.exists():
            shutil.copytree(finished, directory)
            return 0, "", ""
        try:
            ended = called(capsys, path, "--out-dir", directory, *flags)
        except SystemExit as end:
            return int(end.code or 0), "", capsys.readouterr().err
        if plain and ended[0] == 0 and not finished.exists():
            shutil.copytree(directory, finished)
        return ended

    return start


def results(directory: Path) -> dict[str, int]:
    """When each cell's result was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in directory.glob("cells/*/result.json")}


def late(directory: Path) -> list[str]:
    summary = json.loads((directory / "summary.json").read_text())
    for each in summary["contrasts"]:
        assert each["confirmatory"] == (not each["late"])
    return [each["late"] for each in summary["contrasts"]]


def test_what_is_registered_is_said_with_its_hash(run: Any, tmp_path: Path):
    assert run()[0] == 0
    grid, _ = load(tmp_path / "grid.yaml")
    sha256 = registration.fingerprint(grid.contrasts, grid.seeds, grid.search)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "small" / name).read_text()
        assert f"before any result (SHA-256 {sha256})" in text
    assert late(tmp_path / "small") == [""]
    assert sha256 in run("--dry-run")[1]


def test_the_hash_of_a_published_report_holds(tmp_path: Path):
    """Keys that contrasts gained later are hashed only where they are set."""
    published = ROOT / "docs/quick"
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
    run: Any, tmp_path: Path, changes: dict[str, Any], cells: int
):
    assert run()[0] == 0
    before, directory = results(tmp_path / "small"), tmp_path / "small"
    code, _, error = run(**changes)
    assert code == 2
    assert f"--extend adds {cells} cells to it" in error
    assert results(directory) == before
    code, out, error = run("--extend", **changes)
    assert code == 0, error
    after = results(directory)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + cells
    touched = "arms" not in changes
    reason = f"it includes {cells} cells added when 4 cells had a result"
    assert late(directory) == [reason if touched else ""]
    assert (f"This answer is exploratory: {reason}." in out) == touched
    assert f"when 4 cells had a result: {cells} cells" in (directory / "report.md").read_text()
    assert run(**changes)[0] == 0  # it has grown: no flag is needed
    assert results(directory) == after
    assert len(registration.read_registration(directory).additions) == 1  # type: ignore[union-attr]


def test_a_question_that_is_added_is_exploratory_and_those_before_are_not(run: Any, tmp_path: Path):
    assert run()[0] == 0
    more = [LOSS, {**LOSS, "of": ["deepnorm", "pre"], "measure": "failure"}]
    code, _, error = run("--extend", contrasts=more)
    assert code == 0, error
    assert late(tmp_path / "small") == ["", "the question was added when 4 cells had a result"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 1}, "the new grid has no cell"),
        ({"grid": {"optimizer.learning_rate": [0.03]}}, "the new grid has no cell"),
        ({"contrasts": []}, "contrasts: new ones must come after"),
        ({"contrasts": [{**LOSS, "measure": "failure"}]}, "contrasts: new ones must come after"),
        ({"options": {"training.steps": 8}}, "the new grid changes cell"),
    ],
)
def test_extend_takes_nothing_away(run: Any, tmp_path: Path, changes: dict[str, Any], words: str):
    assert run()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()}
    code, _, error = run("--extend", **changes)
    assert code == 2
    assert words in error
    assert "choose another --out-dir" in error
    assert len(error.splitlines()) <= 3
    assert {p: p.read_bytes() for p in (tmp_path / "small").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_new_arms_are_probed_too(run: Any, tmp_path: Path):
    with few_probes():
        assert run(probes=True)[0] == 0
        arms = {"placement": {name: {"model.norm.placement": name} for name in THREE}}
        assert run("--extend", probes=True, arms=arms)[0] == 0
    probes = json.loads((tmp_path / "small/probes.json").read_text())
    assert {arm for each in probes for arm in each["arms"]} == set(THREE)


def test_before_the_first_result_a_grid_changes_its_registration_freely(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run_tasks", lambda *arguments, **options: False)
        assert run("--workers", "1")[0] == 75
    assert run("--extend", seeds=3)[0] == 0
    assert late(tmp_path / "small") == [""]
    assert registration.read_registration(tmp_path / "small").seeds == [0, 1, 2]  # type: ignore[union-attr]


def test_results_that_were_deleted_have_been_seen(run: Any, tmp_path: Path):
    assert run()[0] == 0
    shutil.rmtree(tmp_path / "small/cells")
    assert run("--extend", seeds=3)[0] == 0
    assert late(tmp_path / "small") == ["it includes 2 cells added when results were known"]


def test_a_start_that_was_killed_after_it_registered_is_repeated(run: Any, tmp_path: Path):
    assert run(out="other")[0] == 0
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "other/registration.json", tmp_path / "small")
    assert run()[0] == 0
    assert late(tmp_path / "small") == [""]


def test_an_exploratory_answer_is_called_so_in_the_tables_too(run: Any, tmp_path: Path):
    assert run()[0] == 0
    assert "(exploratory)" not in (tmp_path / "small/report.md").read_text()
    assert run("--extend", seeds=3)[0] == 0
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
    run: Any, tmp_path: Path, change: Any, reason: str
):
    assert run()[0] == 0
    change(tmp_path / "small/registration.json")
    assert run("--report-only")[0] == 0
    assert late(tmp_path / "small") == [reason]
    assert "Registered on" not in (tmp_path / "small/report.html").read_text()


def test_a_damaged_registration_is_named(run: Any, tmp_path: Path):
    assert run()[0] == 0
    (tmp_path / "small/registration.json").write_text('{"time": 3}')
    code, _, error = run("--report-only")
    assert code == 2
    assert "registration.json" in error


def test_runs_of_other_comparisons_are_copied_and_the_report_says_so(run: Any, tmp_path: Path):
    assert run("--seeds", "0:2", out="one")[0] == 0
    assert run("--seeds", "2:4", out="two")[0] == 0
    sources = (tmp_path / "one", tmp_path / "two")
    flags = ("--seeds", "5", "--reuse", *sources)
    assert run(*flags, "--dry-run", out="all")[1].count("(is copied)") == 8
    assert not (tmp_path / "all").exists()
    code, out, error = run(*flags, out="all")
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


def test_only_runs_of_the_same_config_are_copied(run: Any, tmp_path: Path):
    assert run(out="one")[0] == 0
    code, _, error = run("--reuse", tmp_path / "one", out="two", options={"model.layers": 3})
    assert code == 0
    assert "copied" not in error
    code, _, error = run("--reuse", tmp_path / "nowhere", out="three")
    assert code == 2
    assert "is not a comparison directory" in error


def test_a_link_among_reused_runs_is_refused(run: Any, tmp_path: Path):
    assert run(out="one")[0] == 0
    cell = next((tmp_path / "one/cells").iterdir())
    (cell / "tokenizer.json").unlink()
    (cell / "tokenizer.json").symlink_to(tmp_path / "grid.yaml")
    code, _, error = run("--reuse", tmp_path / "one", out="two")
    assert code == 2
    assert f"--reuse: {cell / 'tokenizer.json'}: is a symbolic link" in error
    assert not (tmp_path / "two/registration.json").exists()


def test_a_damaged_run_is_named_before_anything_is_copied(run: Any, tmp_path: Path):
    assert run(out="one")[0] == 0
    cell = next((tmp_path / "one/cells").iterdir())
    (cell / "environment.json").write_text("{}")
    code, _, error = run("--reuse", tmp_path / "one", out="two")
    assert code == 2
    assert str(cell / "environment.json") in error
    assert not (tmp_path / "two/cells").exists()


def test_a_copy_can_be_written_even_if_its_source_cannot(run: Any, tmp_path: Path):
    assert run(out="one")[0] == 0
    for path in (tmp_path / "one").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run("--reuse", tmp_path / "one", out="two")[0] == 0
    for path in (tmp_path / "two/cells").rglob("*"):
        assert path.stat().st_mode & 0o200, path


def test_a_stop_while_copying_makes_no_report(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(out="one")[0] == 0
    copied: list[str] = []

    def noted(source: Path, cell: Any, directory: Path) -> None:
        copied.append(cell.id)
        copy_run(source, cell, directory)

    monkeypatch.setattr(comparison, "copy_run", noted)
    monkeypatch.setattr(StopSignals, "__call__", lambda self: len(copied) >= 2)
    assert run("--reuse", tmp_path / "one", out="two")[0] == 75
    assert len(copied) == 2
    assert not (tmp_path / "two/summary.json").exists()


def test_growing_by_copies_says_so(run: Any, tmp_path: Path):
    assert run()[0] == 0
    assert run("--seeds", "2:4", out="two")[0] == 0
    assert run("--seeds", "4", "--extend", "--reuse", tmp_path / "two")[0] == 0
    assert late(tmp_path / "small") == [
        f"it includes 4 cells copied with results from {tmp_path / 'two'}"
    ]


def test_seeds_of_another_version_are_noticed(run: Any, tmp_path: Path):
    assert run(out="one")[0] == 0
    for path in (tmp_path / "one/cells").glob("*/environment.json"):
        tree = json.loads(path.read_text())
        tree["versions"]["torch"] = "1.0.0"
        path.write_text(json.dumps(tree))
    assert run("--seeds", "3", "--reuse", tmp_path / "one", out="two")[0] == 0
    exceptions = read_comparison(tmp_path / "two")[1].match.exceptions
    assert any("differ in torch" in each and "1.0.0" in each for each in exceptions)


def test_a_copy_that_was_killed_is_made_again(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(out="one")[0] == 0
    copy, copied = shutil.copytree, []

    def killed(*arguments: Any, **options: Any) -> None:
        copied.append(copy(*arguments, **options))
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", killed)
    assert run("--reuse", tmp_path / "one", out="two")[0] == 130
    monkeypatch.setattr(shutil, "copytree", copy)
    assert run("--reuse", tmp_path / "one", out="two")[0] == 0
    names = [path.name for path in (tmp_path / "two/cells").iterdir()]
    assert len(names) == 4
    assert not any(name.startswith(".") for name in names)
    assert late(tmp_path / "two")[0].startswith("it includes 4 cells copied")


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


def test_other_seeds_need_no_excluded_ones(run: Any, tmp_path: Path):
    """An entry of `exclude` for seeds that are not run matches no cell."""
    less = [{"arm": "pre", "seed": [1]}, {"arm": "pre", "optimizer.learning_rate": [0.02]}]
    assert run(exclude=less)[0] == 2  # the second matches nothing
    assert "matches no cell" in run("--seeds", "8:10", exclude=less)[2]
    assert run("--seeds", "8:10", exclude=less[:1])[0] == 0
    assert len(results(tmp_path / "small")) == 4


def test_flags_that_exclude_each_other(run: Any):
    for flag in ("--dry-run", "--extend"):
        code, _, error = run("--report-only", flag)
        assert code == 2
        assert f"give {flag} or --report-only, not both" in error
