"""A comparison as its user sees it: runs, runs without a result, starting again, reports."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from comparing import Make, called, write, write_grid
from conftest import few_probes, rendering

from gpt import metrics
from gpt.compare import comparison
from gpt.compare.analysis.matching import match
from gpt.compare.analysis.outcomes import read_outcome
from gpt.compare.grid import load
from gpt.io.console import Console
from gpt.io.files import lock_directory, lock_file
from gpt.run.directory import RunDirectory


@pytest.fixture(scope="module")
def grid_file(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tiny, tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def done(grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison that has ended, by two workers, and what was printed."""
    from gpt import cli

    directory = tmp_path_factory.mktemp("runs") / "small"
    command = ["compare.py", str(grid_file), "--out-dir", str(directory), "--workers", "2"]
    with (
        few_probes(),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", command)  # which the report shows
        assert cli.run("compare", command[1:]) == 0
    return directory, out.getvalue()


@pytest.fixture
def copy(done: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it to corrupt."""
    return Path(shutil.copytree(done[0], tmp_path / "small"))


def test_it_ends_with_a_verdict_and_a_report(done: tuple[Path, str]):
    directory, out = done
    assert f"{directory}/report.html" in out
    assert "2 failures in 2 seeds" not in out
    assert "the same fraction of each arm's runs failed" in out
    names = {path.name for path in directory.iterdir()} - {".lock"}
    assert names == {
        "grid.yaml",
        "command.json",
        "cells",
        "probes.json",
        "registration.json",
        "cells.csv",
        "summary.json",
        "report.html",
        "report.md",
        "figures",
    }


def test_each_cell_is_a_run_directory_without_checkpoints(done: tuple[Path, str]):
    cells = sorted((done[0] / "cells").iterdir())
    assert len(cells) == 8
    for path in cells:
        run = RunDirectory(path)
        assert run.read_config().name == path.name
        assert run.read_result() is not None
        assert metrics.read(run.metrics)
        assert not run.checkpoints.exists()


def test_divergence_is_a_recorded_result(done: tuple[Path, str]):
    with (done[0] / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    first = ["id", "model.norm.placement", "optimizer.learning_rate", "seed"]
    assert list(rows[0])[:4] == first
    wanted = {
        "status",
        "diverged_at",
        "final_val_loss",
        "best_val_loss",
        "spikes",
        "max_grad_norm",
        "seconds",
    }
    assert wanted <= set(rows[0])
    for row in rows:
        wild = row["optimizer.learning_rate"] == "30000.0"
        assert (row["failed"] == "True") == wild
        if row["status"] == "diverged":
            assert int(row["diverged_at"]) <= 20
            assert row["final_val_loss"] == ""
    assert {row["status"] for row in rows if row["failed"] == "True"} & {"diverged", "plateaued"}


def test_the_worst_value_of_each_layer_measure_is_in_the_table(done: tuple[Path, str]):
    with (done[0] / "cells.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["status"] == "trained")
    records = metrics.read(done[0] / "cells" / row["id"] / "metrics.jsonl")
    logits = [r["attention_logit"] for r in records if "attention_logit" in r]
    assert len(logits) == 2 * 3  # two blocks, at steps 1, 10 and 20
    assert float(row["max_attention_logit"]) == max(logits)
    entropies = [r["attention_entropy"] for r in records if "attention_entropy" in r]
    assert float(row["min_attention_entropy"]) == min(entropies)
    assert float(row["max_grad_over_root_v"]) > 0


def test_summary_json_agrees_with_the_cells(done: tuple[Path, str]):
    tree = json.loads((done[0] / "summary.json").read_text())
    assert tree["version"] == 6
    assert [(arm["arm"], arm["failures"], arm["runs"]) for arm in tree["arms"]] == [
        ("pre", 2, 4),
        ("deepnorm", 2, 4),
    ]
    assert tree["arms"][0]["highest_stable_rate"] == 0.03
    assert tree["contrasts"][0]["value"] == 0.0
    assert tree["contrasts"][0]["answer"] == "open"


def test_arms_are_matched_and_the_report_says_so(done: tuple[Path, str], grid_file: Path):
    _, cells = load(grid_file)
    found = match([read_outcome(cell, done[0]) for cell in cells])
    assert (found.cells, found.same_inputs, found.exceptions) == (6, 6, ())
    assert found.equal + found.rescaled == found.parameters
    assert found.rescaled > 0  # deepnorm's gain
    text = (done[0] / "report.md").read_text()
    assert "6 runs were compared with the first run of their seed" in text
    assert "and 6 of them saw the same inputs" in text


def test_different_batches_and_initial_weights_are_found(copy: Path, grid_file: Path):
    _, cells = load(grid_file)
    victim, other = (c for c in cells if c.arm == "deepnorm" and c.config.seed == 1)
    log = copy / "cells" / victim.id / "metrics.jsonl"
    records = metrics.read(log)
    log.write_text(
        "".join(
            json.dumps({**r, **({"batches": "0"} if "batches" in r else {})}) + "\n"
            for r in records
        )
    )
    facts = copy / "cells" / other.id / "environment.json"
    tree = json.loads(facts.read_text())
    tree["initial_weights"]["token_embedding.weight"] |= {"sha256": "0", "signs": "0"}
    facts.write_text(json.dumps(tree))
    found = match([read_outcome(cell, copy) for cell in cells])
    assert found.same_inputs == 5
    assert any(victim.id in text and "different inputs" in text for text in found.exceptions)
    assert any(other.id in text and "token_embedding.weight" in text for text in found.exceptions)


def test_inputs_are_compared_after_equally_many_sequences(done: tuple[Path, str], grid_file: Path):
    _, cells = load(grid_file)
    first, other, *_ = (read_outcome(cell, done[0]) for cell in cells if cell.config.seed == 1)
    assert first.inputs is not None
    larger_batches = dict(list(first.inputs.items())[1::2])  # a digest after every other batch
    assert match([first, replace(other, inputs=larger_batches)]).same_inputs == 1
    never_together = {sequences + 1: "0" for sequences in first.inputs}
    assert match([first, replace(other, inputs=never_together)]).same_inputs == 1
    assert match([first, replace(other, inputs={max(first.inputs): "0"})]).same_inputs == 0


def test_started_again_it_runs_nothing_and_reports(
    copy: Path, grid_file: Path, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("cells/*/*")}
    (copy / "report.html").unlink()
    assert called(capsys, grid_file, "--out-dir", copy)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in copy.glob("cells/*/*")} == before
    assert (copy / "report.html").is_file()


@pytest.mark.usefixtures("in_this_process")
def test_started_again_it_runs_what_is_missing(
    copy: Path, grid_file: Path, capsys: pytest.CaptureFixture[str]
):
    _, cells = load(grid_file)
    shutil.rmtree(copy / "cells" / cells[3].id)
    old = metrics.read(copy / "cells" / cells[2].id / "metrics.jsonl")
    code, _, err = called(capsys, grid_file, "--out-dir", copy)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "/8  " in line]
    assert len(lines) == 1
    assert cells[3].id in lines[0]
    assert metrics.read(copy / "cells" / cells[2].id / "metrics.jsonl") == old


def test_report_only_redraws_from_the_files(
    copy: Path, grid_file: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    for name in ("report.html", "report.md", "summary.json", "cells.csv"):
        (copy / name).unlink()
    shutil.rmtree(copy / "figures")
    with rendering():
        assert cli.run("compare", [str(copy), "--report-only"]) == 0
    assert "report.html" in capsys.readouterr().out
    for name in ("report.html", "report.md", "summary.json", "cells.csv"):
        assert (copy / name).is_file()
    for kind in ("png", "svg"):
        assert (copy / f"figures/loss-by-rate.{kind}").stat().st_size > 1000


def test_two_comparisons_side_by_side(
    copy: Path, done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    assert cli.run("compare", [str(copy), "--report-only", "--beside", str(done[0])]) == 0
    assert (copy / "figures/beside.png").is_file()
    assert "beside" in (copy / "report.html").read_text()
    assert str(done[0]) in (copy / "report.html").read_text()
    capsys.readouterr()


def test_a_running_comparison_can_be_reported(copy: Path, capsys: pytest.CaptureFixture[str]):
    """While it holds the lock of its directory, and some of its cells have no result."""
    shutil.rmtree(next(copy.glob("cells/pre_*")))
    with lock_directory(copy, "held"):
        code, out, err = called(capsys, copy, "--report-only")
    assert (code, err) == (0, "")
    assert "1 of 8 cells have no result (1 missing)" in out


def test_one_process_at_a_time_writes_a_report(copy: Path, capsys: pytest.CaptureFixture[str]):
    (copy / "figures/old.png").touch()
    with lock_file(copy / comparison.REPORT_LOCK, "held"), pytest.raises(SystemExit) as end:
        called(capsys, copy, "--report-only")
    assert end.value.code == 2
    assert "another process is writing its report" in capsys.readouterr().err
    assert (copy / "figures/old.png").exists()
    assert called(capsys, copy, "--report-only")[0] == 0
    assert not (copy / "figures/old.png").exists()


def test_a_comparison_that_ends_waits_for_another_report(
    copy: Path, grid_file: Path, capsys: pytest.CaptureFixture[str]
):
    writing, written = threading.Event(), []

    def write_slowly() -> None:
        with lock_file(copy / comparison.REPORT_LOCK, "held"):
            writing.set()
            time.sleep(0.5)
            written.append((copy / "report.html").exists())

    (copy / "report.html").unlink()
    other = threading.Thread(target=write_slowly)
    other.start()
    writing.wait()
    code, _, err = called(capsys, grid_file, "--out-dir", copy)
    other.join()
    assert (code, written) == (0, [False]), err
    assert (copy / "report.html").exists()


# ---------------------------------------------------------------------------------------------
# What goes wrong


def test_a_grid_cannot_change_after_its_runs(
    copy: Path, tmp_path: Path, grid_file: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    tree = yaml.safe_load(grid_file.read_text())
    tree["contrasts"][0]["of"] = ["deepnorm", "pre"]
    changed = write(tmp_path / "changed.yaml", tree)
    with pytest.raises(SystemExit) as end:
        cli.run("compare", [str(changed), "--out-dir", str(copy)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert (
        "a comparison of another grid (different contrasts), and after its runs a grid can" in error
    )
    assert "choose another --out-dir" in error


# ---------------------------------------------------------------------------------------------
# Cells without a result, and stopping


@pytest.mark.usefixtures("in_this_process")
def test_two_workers_give_what_one_process_gives(
    done: tuple[Path, str], grid_file: Path, tmp_path: Path
):
    """Cell by cell the same losses, whichever worker trained them."""
    grid, cells = load(grid_file)
    assert comparison.compare(
        grid.model_copy(update={"probes": False}),
        cells[:2],
        tmp_path / "solo",
        workers=1,
        console=Console(quiet=True),
        stop=lambda: False,
    )
    for cell in cells[:2]:
        pair = [
            [
                r.get("loss", r.get("val_loss"))
                for r in metrics.read(d / "cells" / cell.id / "metrics.jsonl")
            ]
            for d in (done[0], tmp_path / "solo")
        ]
        assert pair[0] == pair[1]
