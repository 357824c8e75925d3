"""A comparison as its user sees it: runs, runs without a result, starting again, reports."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, few_probes, rendering

from gpt import metrics
from gpt.compare import comparison, worker
from gpt.compare.grid import Cell, load
from gpt.compare.matching import match
from gpt.compare.outcomes import read_outcome
from gpt.compare.results import Summary
from gpt.compare.tasks import Task, make_tasks
from gpt.config import Config
from gpt.errors import InputError, OutOfMemoryError
from gpt.io import files
from gpt.io.console import Console
from gpt.run.directory import RunDirectory

Make = Callable[..., Config]


def grid_tree(base: Config, **changes: Any) -> dict[str, Any]:
    tree = base.model_dump(mode="json")
    return {
        "title": "Is it & <b>stable</b>?",
        "base": {key: value for key, value in tree.items() if key not in ("name", "seed")},
        "arms": {
            "placement": {
                "pre": {"model.norm.placement": "pre"},
                "deepnorm": {"model.norm.placement": "deepnorm"},
            }
        },
        "grid": {"optimizer.learning_rate": [0.03, 3e4]},
        "seeds": 2,
        "contrasts": [
            {
                "question": "Does <i>anything</i> move?",
                "measure": "failure",
                "of": ["pre", "deepnorm"],
            }
        ],
        "pairs": [["pre", "deepnorm"]],
        **changes,
    }


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of compare.py, called in this process."""
    from gpt import cli

    code = cli.run("compare", list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def grid_file(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny(
        diagnostics={"every": 10},
        training={"steps": 20, "batch_sequences": 8},
        sampling={"tokens": 0},
        optimizer={"clip": None, "weight_decay": 0},
    )
    return write(tmp_path_factory.mktemp("grid") / "small.yaml", grid_tree(base))


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
    """A copy of it to spoil."""
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
    assert tree["version"] == 3
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
    assert (found.cells, found.same_batches, found.exceptions) == (6, 6, ())
    assert found.equal + found.rescaled == found.parameters
    assert found.rescaled > 0  # deepnorm's gain
    text = (done[0] / "report.md").read_text()
    assert "6 of 6 runs saw the same inputs" in text


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
    assert found.same_batches == 5
    assert any(victim.id in text and "different batches" in text for text in found.exceptions)
    assert any(other.id in text and "token_embedding.weight" in text for text in found.exceptions)


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


def test_a_dry_run_lists_cells_and_writes_nothing(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    flags = ["--dry-run", "--out-dir", str(tmp_path / "new")]
    assert cli.run("compare", [str(grid_file), *flags]) == 0
    out = capsys.readouterr().out
    _, cells = load(grid_file)
    for cell in cells:
        assert cell.id in out
    for word in ("8: 2 arms, 2 seeds", "20,480 to train on", "FLOPs", "time", "disk"):
        assert word in out
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], ["--workers: '0' is not between 1 and 1,000"]),
        (["--workers", "two"], ["--workers: must be a valid integer, found 'two'"]),
        (["--optimizer.learning-rate", "1e-3"], ["--optimizer.learning_rate", "edit that file"]),
        (["--training.stepz", "1"], ["--training.stepz: no such option"]),
        (["--dry-run", "--report-only"], ["not both"]),
        (["--beside", "nowhere"], ["nowhere", "is not a comparison directory"]),
        (["--report-only"], ["no cell has a result yet"]),
        (["--model.heads", "3", "--dry-run"], ["arm 'pre'", "heads (3) must divide width (16)"]),
        (
            ["--model.layers", "2", "--training.device", "cuda", "--dry-run"],
            ["cuda is not available"],
        ),
    ],
)
def test_wrong_input_is_exit_2(
    grid_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
):
    from gpt import cli

    with pytest.raises(SystemExit) as end:
        cli.run("compare", [str(grid_file), "--out-dir", str(tmp_path / "new"), *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert 1 <= len(error.splitlines()) <= 3
    for word in words:
        assert word in error
    assert not (tmp_path / "new").exists()


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
    assert "holds a comparison of another grid (different contrasts), and a grid cannot" in error
    assert "choose another --out-dir" in error


def test_a_directory_of_something_else_is_left_alone(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("hello")
    with pytest.raises(SystemExit) as end:
        cli.run("compare", [str(grid_file), "--out-dir", str(tmp_path / "letters")])
    assert end.value.code == 2
    assert "exists and is not a comparison" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_a_grid_that_takes_too_long_or_too_much_disk_is_refused_before_it_starts(
    grid_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from gpt import cli
    from gpt.compare import estimate

    tree = yaml.safe_load(grid_file.read_text())
    short = write(tmp_path / "short.yaml", {**tree, "hours": 1e-6})
    out = str(tmp_path / "new")
    with pytest.raises(SystemExit):
        cli.run("compare", [str(short), "--out-dir", out])
    assert "the grid allows 0.0036 seconds" in capsys.readouterr().err
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 10)
    with pytest.raises(SystemExit):
        cli.run("compare", [str(grid_file), "--out-dir", out])
    assert "are free" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("configs/quickstart.yaml", "is a config for train.py; a grid has arms"),
        ("docs", "docs: is not a comparison directory (no grid.yaml)"),
        ("configs/compare/quik.yaml", "quik.yaml: no such file"),
    ],
)
def test_what_is_not_a_grid_is_refused(
    path: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.run("compare", [path])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_run_is_reported(grid_file: Path):
    _, cells = load(grid_file, {"schedule": {"warmup_steps": 20}})
    assert comparison.too_long_warmups(cells) == ["pre", "deepnorm"]
    _, cells = load(grid_file, {"schedule": {"warmup_steps": 19}})
    assert comparison.too_long_warmups(cells) == []


def test_two_at_once_in_one_directory_are_refused(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    with files.lock_directory(tmp_path / "new", "held"), pytest.raises(SystemExit) as end:
        cli.run("compare", [str(grid_file), "--out-dir", str(tmp_path / "new")])
    assert end.value.code == 2
    assert "another process runs this comparison" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Cells without a result, and stopping


class TwoCells:
    """A comparison of two cells that train for some seconds, long enough to be interrupted."""

    def __init__(self, base: Config, folder: Path, **changes: Any) -> None:
        axis = {"optimizer.learning_rate": [0.01]}
        tree = grid_tree(base, grid=axis, seeds=1, probes=False, **changes)
        self.path, self.directory = write(folder / "slow.yaml", tree), folder / "slow"
        self.grid, self.cells = load(self.path)

    def updates(self) -> list[int]:
        """How many updates each cell has made."""
        logs = [self.directory / "cells" / cell.id / "metrics.jsonl" for cell in self.cells]
        return [
            sum(b'"loss"' in line for line in log.read_bytes().splitlines()) if log.exists() else 0
            for log in logs
        ]

    def are_training(self) -> bool:
        return min(self.updates()) > 3

    def run(self, stop: Callable[[], bool] = lambda: False) -> Summary | None:
        """Run it by two workers, or by one if its cells are batched."""
        return comparison.compare(
            self.grid, self.cells, self.directory, workers=2, console=Console(), stop=stop
        )

    def run_and_kill_a_worker(self) -> tuple[Summary | None, int]:
        """Run it and kill one worker; returns the summary and how many workers there were."""
        workers: list[psutil.Process] = []

        def kill_one() -> bool:
            if not workers and self.are_training():
                for child in psutil.Process().children():
                    if any("spawn_main" in word for word in child.cmdline()):
                        workers.append(child)
                workers[0].kill()
            return False

        return self.run(stop=kill_one), len(workers)


@pytest.fixture
def two_cells(tiny: Make, tmp_path: Path) -> TwoCells:
    """In a process each."""
    steps = {"training": {"steps": 400}, "evaluation": {"every": 400}}
    return TwoCells(tiny(**steps, sampling={"tokens": 0}), tmp_path)


@pytest.fixture
def two_batched(tiny: Make, tmp_path: Path) -> TwoCells:
    """Of one shape, batched."""
    steps = {"training": {"steps": 250}, "evaluation": {"every": 250}}
    arms = {"warm-up": {"none": {"schedule.warmup": "none"}, "linear": {}}}
    changes: dict[str, Any] = {"contrasts": [], "pairs": [], "runner": "batched", "arms": arms}
    return TwoCells(tiny(**steps, sampling={"tokens": 0}), tmp_path, **changes)


def test_a_killed_cell_is_recorded_and_the_others_continue(
    two_cells: TwoCells, request: pytest.FixtureRequest
):
    summary, workers = two_cells.run_and_kill_a_worker()
    assert workers == 2
    assert summary is not None
    directory = two_cells.directory
    message = comparison.format_summary(summary, directory)
    assert "1 of 2 cells have no result (1 killed)" in message
    lost = json.loads((directory / "lost.json").read_text())
    (name,) = lost
    assert lost[name]["status"] == "killed"
    assert "SIGKILL" in lost[name]["reason"]
    assert "1 of 2 cells have no result" in (directory / "report.html").read_text()
    with (directory / "cells.csv").open() as file:
        assert {row["id"]: row["status"] for row in csv.DictReader(file)}[name] == "killed"

    request.getfixturevalue("in_this_process")
    assert two_cells.run()
    assert not (directory / "lost.json").exists()
    assert json.loads((directory / "summary.json").read_text())["with_result"] == 2


class Touch:
    """In place of `worker.begin`: leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, shared: worker.Shared) -> None:
        self.path.touch()


def test_a_stop_does_not_wait_for_workers_that_are_starting(
    two_cells: TwoCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workers: list[psutil.Process] = []

    def stop() -> bool:
        children = psutil.Process().children()
        workers.extend(child for child in children if "spawn_main" in " ".join(child.cmdline()))
        return bool(workers)

    began = tmp_path / "began"
    monkeypatch.setattr(worker, "begin", Touch(began))
    assert two_cells.run(stop=stop) is None
    assert workers
    assert not any(worker.is_running() for worker in workers)
    assert not began.exists()
    assert not list(two_cells.directory.glob("cells/*/result.json"))


def test_ctrl_c_does_not_reach_workers_that_are_starting(two_cells: TwoCells):
    """A terminal sends it to the whole process group."""
    interrupted: set[int] = set()

    def stop() -> bool:
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()) and child.pid not in interrupted:
                child.send_signal(signal.SIGINT)
                interrupted.add(child.pid)
        return two_cells.are_training()

    assert two_cells.run(stop=stop) is None
    assert len(interrupted) == 2


def test_workers_that_cannot_start_end_the_comparison(
    two_cells: TwoCells, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "begin", len)  # raises in the worker
    with pytest.raises(OutOfMemoryError, match="ended while they were starting"):
        two_cells.run()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_the_cells(two_cells: TwoCells, environment: dict[str, str], number: int):
    directory = two_cells.directory
    command = [sys.executable, ROOT / "compare.py", two_cells.path, "--out-dir", directory]
    with subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not two_cells.are_training():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command to resume" in error
    for arm in ("pre", "deepnorm"):
        run = RunDirectory(directory / "cells" / f"{arm}_learning-rate-0.01_seed-0")
        result = run.read_result()
        assert result is not None
        assert result.status == "interrupted"
        assert 3 < result.step < 400
        assert (run.checkpoints / "latest").is_file()


def test_a_cell_that_needs_too_much_memory_is_recorded(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def exhausted(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(worker, "train", exhausted)
    monkeypatch.setattr(worker, "_shared", shared_memory(), raising=False)
    cell = Cell("one", "arm", {}, {}, tiny())
    (error,) = worker.train_task(Task((cell,), batched=False), tmp_path, [0], False)
    assert error is not None
    assert error.status == "out of memory"
    assert "can't allocate memory" in error.reason


def test_an_unexpected_error_is_recorded_with_its_line(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def faulty(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(worker, "train", faulty)
    monkeypatch.setattr(worker, "_shared", shared_memory(), raising=False)
    cell = Cell("one", "arm", {}, {}, tiny())
    (error,) = worker.train_task(Task((cell,), batched=False), tmp_path, [0], False)
    assert error is not None
    assert error.status == "error"
    assert "ZeroDivisionError: division by zero (test_comparison.py:" in error.reason


def shared_memory() -> Any:
    """What a worker shares with its parent, before a stop."""
    return worker.Shared(SimpleNamespace(value=0), [0], os.getppid())  # type: ignore[arg-type]


@pytest.mark.usefixtures("in_this_process")
def test_an_error_in_a_cell_is_exit_1_and_the_others_have_results(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One cell's directory cannot be made, because a file is in its place."""
    from gpt import cli

    tree = yaml.safe_load(grid_file.read_text())
    small = {**tree, "seeds": 1, "probes": False, "grid": {"optimizer.learning_rate": [0.03]}}
    path = write(tmp_path / "fewer.yaml", small)
    grid, cells = load(path)
    directory = tmp_path / "new"
    (directory / "cells").mkdir(parents=True)
    (directory / "cells" / cells[0].id).write_text("in the way")
    (directory / "grid.yaml").write_text(grid.to_yaml())
    assert cli.run("compare", [str(path), "--out-dir", str(directory), "--workers", "1"]) == 1
    out, _ = capsys.readouterr()
    assert "1 of 2 cells have no result (1 error)" in out
    assert cells[0].id in json.loads((directory / "lost.json").read_text())


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


# -- Batched cells -----------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_batched_cells_give_what_processes_give(
    done: tuple[Path, str], grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same files, verdicts and inputs; losses to rounding, which a wild rate magnifies."""
    tree = yaml.safe_load(grid_file.read_text())
    path, directory = write(tmp_path / "one.yaml", {**tree, "probes": False}), tmp_path / "one"
    code, _, err = called(capsys, path, "--runner", "batched", "--out-dir", directory)
    assert code == 0, err
    assert (
        "with 2 batches of up to 4 cells, estimated from a short benchmark on this machine" in err
    )
    rows = []
    for each in (done[0], directory):
        with (each / "cells.csv").open() as file:
            rows.append({row["id"]: row for row in csv.DictReader(file)})
    assert rows[0].keys() == rows[1].keys()
    for name, alone in rows[0].items():
        for key in ("status", "diverged_at", "steps"):
            assert rows[1][name][key] == alone[key]
        if alone["status"] == "trained":
            assert float(rows[1][name]["final_val_loss"]) == pytest.approx(
                float(alone["final_val_loss"]), abs=0.01
            )
        files = [
            sorted(p.name for p in (d / "cells" / name).iterdir()) for d in (done[0], directory)
        ]
        assert files[0] == files[1]
        inputs = [
            [
                r["batches"]
                for r in metrics.read(d / "cells" / name / "metrics.jsonl")
                if "loss" in r
            ]
            for d in (done[0], directory)
        ]
        assert inputs[0] == inputs[1]
    code, _, err = called(capsys, path, "--out-dir", directory)
    assert code == 0
    assert "have already ended" in err


@pytest.mark.usefixtures("in_this_process")
def test_kept_checkpoints_stay_and_a_plot_that_fails_is_reported(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = yaml.safe_load(grid_file.read_text())
    axis = {"optimizer.learning_rate": [0.03]}
    small = {**tree, "seeds": 1, "probes": False, "grid": axis, "keep_checkpoints": True}
    path, directory = write(tmp_path / "kept.yaml", small), tmp_path / "kept"
    assert called(capsys, path, "--out-dir", directory)[0] == 0
    kept = sorted(directory.glob("cells/*/checkpoints/step-*"))
    assert kept
    missing, picture = sorted(directory.glob("cells/*/loss.png"))[:2]
    missing.unlink()
    picture.unlink()
    picture.mkdir()  # nothing can be drawn there
    write(path, {**small, "keep_checkpoints": False})
    code, _, err = called(capsys, path, "--out-dir", directory)
    assert code == 0, err
    assert "a cell's loss.png could not be drawn" in err
    assert missing.is_file()
    assert sorted(directory.glob("cells/*/checkpoints/step-*")) == kept
    assert yaml.safe_load((directory / "grid.yaml").read_text())["keep_checkpoints"]


def test_a_grid_without_a_batched_form_is_refused(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    base = tiny(model={"dropout": 0.1})
    path = write(tmp_path / "dropout.yaml", grid_tree(base, runner="batched"))
    with pytest.raises(SystemExit) as ended:
        cli.run("compare", [str(path), "--out-dir", str(tmp_path / "new")])
    assert ended.value.code == 2
    _, err = capsys.readouterr()
    assert "model.dropout: 0.1 cannot be batched" in err
    assert not (tmp_path / "new").exists()


def test_cells_are_divided_into_tasks_by_shape(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = tiny(sampling={"tokens": 0})
    arms = {
        "placement": {"pre": {}, "post": {"model.norm.placement": "post"}},
        "optimizer": {"adamw": {}, "muon": {"optimizer.name": "muon"}},
    }
    tree = grid_tree(base, arms=arms, contrasts=[], pairs=[])
    _, cells = load(write(tmp_path / "grid.yaml", tree))
    on_cpu = make_tasks(cells, "auto")
    assert [task.batched for task in on_cpu] == [False] * len(cells)
    monkeypatch.setattr("gpt.compare.tasks.pick_device", lambda name: torch.device("cuda"))
    on_gpu = make_tasks(cells, "auto")
    groups = [task for task in on_gpu if task.batched]
    assert [{cell.arm for cell in task.cells} for task in groups] == [
        {"pre, adamw"},
        {"post, adamw"},
    ]
    alone = [cell for task in on_gpu if not task.batched for cell in task.cells]
    assert {cell.arm for cell in alone} == {"pre, muon", "post, muon"}
    assert sum(len(task.cells) for task in on_gpu) == len(cells)
    assert not any(task.batched for task in make_tasks(cells, "processes"))
    with pytest.raises(InputError, match="muon cannot be batched"):
        make_tasks(cells, "batched")


def test_batched_cells_are_stopped_saved_and_resumed(
    two_batched: TwoCells, request: pytest.FixtureRequest
):
    assert two_batched.run(stop=two_batched.are_training) is None
    stopped = two_batched.updates()
    assert len(set(stopped)) == 1
    assert 3 < stopped[0] < 250
    folders = list((two_batched.directory / "cells").iterdir())
    for folder in folders:
        assert (folder / "checkpoints" / "latest").is_file()
    request.getfixturevalue("in_this_process")
    assert two_batched.run()
    assert two_batched.updates() == [250, 250]
    for folder in folders:
        assert (folder / "loss.png").is_file()
        assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_batched_cells_that_are_killed_are_tried_again(
    two_batched: TwoCells, request: pytest.FixtureRequest
):
    with pytest.raises(InputError, match="no cell has a result yet"):
        two_batched.run_and_kill_a_worker()
    lost = json.loads((two_batched.directory / "lost.json").read_text())
    assert [error["status"] for error in lost.values()] == ["killed", "killed"]
    request.getfixturevalue("in_this_process")
    assert two_batched.run()
    assert not (two_batched.directory / "lost.json").exists()
