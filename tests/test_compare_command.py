"""`compare.py` as a command: a dry run, wrong input, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from comparing import Make, TwoCells, called, write, write_grid
from conftest import ROOT

from gpt.compare.grid import load
from gpt.compare.messages import too_long_warmups
from gpt.io import files
from gpt.run.directory import RunDirectory


@pytest.fixture(scope="module")
def grid_file(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tiny, tmp_path_factory.mktemp("grid"))


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], ["--workers: '0' is not between 1 and 1,000"]),
        (["--workers", "two"], ["--workers: must be a whole number, found 'two'"]),
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


def test_arms_whose_updates_take_different_times_are_timed_separately(
    grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gpt.compare import estimate
    from gpt.compare.execution.tasks import make_tasks

    levels = {
        "pre": {},
        "post": {"model.norm.placement": "post"},
        "rms": {"model.norm.type": "rms"},
        "QK": {"model.attention.qk_norm": True},
        "soft cap": {"model.logit_soft_cap": 30},
        "z-loss": {"training.z_loss": 1e-4},
        "SGD": {"optimizer.name": "sgd"},
        "beta2": {"optimizer.beta2": 0.999},
        "xavier": {"model.init.regime": "xavier"},
    }
    tree = {**yaml.safe_load(grid_file.read_text()), "arms": {"f": levels}, "pairs": []}
    _, cells = load(write(tmp_path / "arms.yaml", {**tree, "contrasts": []}))
    timed: list[float] = []

    def measure(config: object, vocab_size: int, seconds: float) -> tuple[float, int, int]:
        timed.append(seconds)
        return 1.0, 1, 1

    monkeypatch.setattr(estimate, "_measure", measure)
    estimate.estimate(make_tasks(cells, "processes"), 256, 1, keep_checkpoints=False)
    assert len(timed) == 7  # neither Adam's constants nor the initial weights change the time
    assert sum(timed) == pytest.approx(estimate.TIMED_SECONDS)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "configs/quickstart.yaml",
            "python train.py configs/quickstart.yaml",
        ),
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
    assert too_long_warmups(cells) == ["pre", "deepnorm"]
    _, cells = load(grid_file, {"schedule": {"warmup_steps": 19}})
    assert too_long_warmups(cells) == []


def test_two_at_once_in_one_directory_are_refused(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt import cli

    with files.lock_directory(tmp_path / "new", "held"), pytest.raises(SystemExit) as end:
        cli.run("compare", [str(grid_file), "--out-dir", str(tmp_path / "new")])
    assert end.value.code == 2
    assert "another process runs this comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_the_cells(
    tiny: Make, tmp_path: Path, environment: dict[str, str], number: int
):
    two_cells = TwoCells(tiny, tmp_path)
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
    assert "the same command resumes:" in error
    for arm in ("pre", "deepnorm"):
        run = RunDirectory(directory / "cells" / f"{arm}_learning-rate-0.01_seed-0")
        result = run.read_result()
        assert result is not None
        assert result.status == "interrupted"
        assert 3 < result.step < 400
        assert (run.checkpoints / "latest").is_file()


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
