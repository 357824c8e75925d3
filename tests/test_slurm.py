"""A comparison as an array job of Slurm, whose commands are played by tests/fake_slurm.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_slurm
import psutil
import pytest
from comparing import Make, called, grid_tree, tables, write
from test_search import tree as search_tree

from gpt.compare import estimate
from gpt.compare.execution import remote, slurm
from gpt.compare.execution.slurm import Element, _minutes
from gpt.compare.execution.tasks import make_tasks
from gpt.compare.grid import load
from gpt.data.preparation import prepare
from gpt.errors import InputError
from gpt.run.directory import RunDirectory

submitit = pytest.importorskip("submitit")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of the fake Slurm, which is on the PATH."""
    folder = fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(fake_slurm.STATE, str(folder))
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_POLLS", 0.1)
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUERIES", 1.0)
    return folder


def grid_of(tiny: Make, folder: Path, steps: int, **changes: Any) -> Path:
    """Two cells."""
    base = tiny(training={"steps": steps}, evaluation={"every": steps}, sampling={"tokens": 0})
    changes = {"grid": {"optimizer.learning_rate": [0.01]}, "seeds": 1, **changes}
    return write(folder / "grid.yaml", grid_tree(base, probes=False, **changes))


FLAGS = ("--engine", "slurm", "--sbatch", "time=0:10:00", "partition=small")


@contextlib.contextmanager
def once_it_trains(directory: Path, *command: str) -> Iterator[None]:
    """A context in which a command is called once the first task has made updates."""

    def wait_and_call() -> None:
        updates = directory / "cluster/updates/pre_learning-rate-0.01_seed-0"
        while not updates.is_file() or not re.search(": [1-9]", updates.read_text()):
            time.sleep(0.1)
        subprocess.run(command, check=True)

    with ThreadPoolExecutor() as threads:
        called = threads.submit(wait_and_call)
        yield
        called.result(5)


def resumed(directory: Path) -> int:
    """How many cells were resumed."""
    histories = [each.read_text() for each in directory.glob("cells/*/history.jsonl")]
    return sum("resumed" in history for history in histories)


@pytest.mark.slow
def test_it_may_be_stopped_and_is_requeued_at_the_time_limit_and_ends_as_locally(
    state: Path,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    no_pictures: None,
):
    path, directory = grid_of(tiny, tmp_path, 1000), tmp_path / "slurm"
    arguments = [path, "--out-dir", directory, *FLAGS]
    with pytest.raises(SystemExit) as end:
        called(capsys, *arguments, "--max-seconds", "2")
    assert end.value.code == 75
    err = capsys.readouterr().err
    assert "submitted 2 tasks as Slurm job 100" in err
    assert "2 tasks are still queued or running in Slurm (scancel 100 ends them);" in err

    with pytest.raises(SystemExit) as end:
        called(capsys, path, "--out-dir", directory)
    assert end.value.code == 2
    assert "its cells may still run in Slurm" in capsys.readouterr().err

    with once_it_trains(directory, "scancel", "--signal=USR2", "100_0"):
        code, _, err = called(capsys, *arguments)
    assert code == 0
    assert "in Slurm already: 2 tasks" in err
    assert len(list(state.glob("*.sh"))) == 1
    assert (state / "100_0.requeued").exists()
    assert resumed(directory) == 1
    assert not (directory / "cluster").exists()

    request.getfixturevalue("in_this_process")
    code, _, _ = called(capsys, path, "--out-dir", tmp_path / "local")
    assert code == 0
    assert tables(directory) == tables(tmp_path / "local")


@pytest.mark.slow
def test_elements_that_are_canceled_are_recorded_and_run_by_the_next_start(
    state: Path, tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures: None
):
    path, directory = grid_of(tiny, tmp_path, 1000), tmp_path / "slurm"

    with once_it_trains(directory, "scancel", "100_0"):
        code, out, _ = called(capsys, path, "--out-dir", directory, *FLAGS)
    assert code == 0
    assert "1 of 2 cells have no result (1 killed)" in out
    (error,) = json.loads((directory / "lost.json").read_text()).values()
    assert "Slurm's job 100_0 ended early (FAILED on node7)" in error["reason"]
    assert Path(error["reason"].rpartition("see ")[2]).is_file()

    code, out, err = called(capsys, path, "--out-dir", directory, *FLAGS)
    assert code == 0
    assert "submitted 1 task as Slurm job 101" in err
    assert not (directory / "lost.json").exists()
    assert not (directory / "cluster").exists()
    assert resumed(directory) == 1  # SIGTERM saved it


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that ends with exit code 2 prints last."""
    with pytest.raises(SystemExit) as end:
        called(capsys, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_sbatch_refuses_is_one_line(
    state: Path, tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [grid_of(tiny, tmp_path, 2), "--out-dir", tmp_path / "slurm", *FLAGS]
    for reason in ("sbatch: error: invalid partition specified: small", ""):
        (state / "refusal").write_text(reason)
        shown = reason or "sbatch failed without a message"
        assert refusal_of(capsys, *arguments) == f"compare.py: {shown}"


def test_an_answer_that_is_not_understood_is_not_followed_by_a_second_submission(
    state: Path, tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (state / "answer").write_text("100")
    (state / "held").touch()
    arguments = [grid_of(tiny, tmp_path, 2), "--out-dir", tmp_path / "slurm", *FLAGS]
    assert 'Could not make sense of sbatch output "100' in refusal_of(capsys, *arguments)
    assert "jobs.json" in refusal_of(capsys, *arguments)
    assert len(list(state.glob("*.sh"))) == 1


@pytest.mark.slow
def test_an_array_that_is_refused_is_submitted_once_the_others_have_ended(
    state: Path,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
):
    (state / "one").touch()
    monkeypatch.setattr(slurm, "MOST_ELEMENTS", 1)
    path, directory = grid_of(tiny, tmp_path, 2), tmp_path / "slurm"
    code, _, err = called(capsys, path, "--out-dir", directory, *FLAGS)
    assert code == 0
    assert "QOSMaxSubmitJobPerUserLimit: 1 task will be submitted when the others have" in err
    assert "submitted 1 task as Slurm job 101" in err
    assert not (directory / "lost.json").exists()
    assert not (directory / "cluster").exists()


@pytest.mark.slow
def test_batches_that_a_node_with_other_code_refuses_are_run_by_the_next_start(
    state: Path,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    in_this_process: None,
    no_pictures: None,
):
    path = grid_of(tiny, tmp_path, 2, seeds=2, runner="batched")
    arguments = [path, "--out-dir", tmp_path / "slurm", *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(remote, "versions", lambda: {"steadygpt": "1", "torch": "1"})
        with pytest.raises(SystemExit) as end:
            called(capsys, *arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "submitted 2 tasks as Slurm job 100" in err  # of two cells each
    assert "but the comparison was started with 1; install the same on every node" in err
    while any((state / "queue").iterdir()):
        time.sleep(0.1)
    code, _, err = called(capsys, *arguments)
    assert code == 0
    assert "submitted 2 tasks as Slurm job 101" in err
    assert len(list((tmp_path / "slurm/cells").glob("*/result.json"))) == 4


def test_a_dry_run_prints_the_script_that_is_submitted(
    state: Path, tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, directory = grid_of(tiny, tmp_path, 2), tmp_path / "slurm"
    code, out, _ = called(capsys, path, "--out-dir", directory, *FLAGS, "--dry-run")
    assert code == 0
    assert not directory.exists()
    script = out[out.index("#!/bin/bash") :]
    for line in ("array=0-1%2", "time=10", "partition=small", "requeue", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script

    (state / "held").touch()  # nothing runs
    with pytest.raises(SystemExit) as end:
        called(capsys, path, "--out-dir", directory, *FLAGS, "--max-seconds", "0.001")
    assert end.value.code == 75
    assert (state / "100.sh").read_text().strip() == script.strip()
    assert not any(each.is_symlink() for each in directory.rglob("*"))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("90:30", 91), ("4:00:00", 240), ("0:00:20", 1)),
        *(("2-12", 3600), ("1-0:30", 1470), ("1-1:1:1", 1502)),
    ],
)
def test_time_limits_are_read_as_by_sbatch(text: str, minutes: int):
    """The formats of `man sbatch`, --time."""
    assert _minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "UNLIMITED"])
def test_other_time_limits_are_refused(text: str):
    with pytest.raises(InputError, match="is not a time limit"):
        _minutes(text)


@pytest.mark.slow
def test_an_element_that_is_warned_is_requeued_by_submitit(tiny: Make, tmp_path: Path):
    """With submitit's own executor for one machine, which requeues on exit code 144."""
    _, cells = load(grid_of(tiny, tmp_path, 1000))
    prepare(cells[0].config.data)
    directory = tmp_path / "local"
    session = remote.begin(directory, keep_checkpoints=False, threads=1, attended=False)
    (task, *_) = make_tasks(cells, "processes")
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    job = executor.submit(Element(session, task))
    while sum(session.updates(task.name).values()) == 0:
        time.sleep(0.1)
    (process,) = psutil.Process(int(job.job_id)).children()  # of submitit's controller
    process.send_signal(signal.SIGUSR2)
    job.wait()
    run = RunDirectory(directory / "cells" / task.name)
    result = run.read_result()
    assert result is not None
    assert result.status == "finished"
    assert "resumed" in run.history.read_text()
    assert json.loads((session.folder / "ended" / task.name).read_text())["errors"] == {}


@pytest.mark.slow
def test_each_round_of_a_search_is_a_job(
    state: Path,
    tiny: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    no_pictures: None,
):
    changes = {"seeds": 1, "search": {"start": 0.1, "ratio": 4}}
    path = write(tmp_path / "grid.yaml", {**search_tree(tiny), **changes})
    code, _, err = called(capsys, path, "--out-dir", tmp_path / "slurm", *FLAGS)
    assert code == 0
    jobs = re.findall(r"submitted 2 tasks as Slurm job (\d+)", err)
    assert len(jobs) > 2
    assert jobs == [str(100 + number) for number in range(len(jobs))]

    request.getfixturevalue("in_this_process")
    code, _, _ = called(capsys, path, "--out-dir", tmp_path / "local")
    assert code == 0
    assert tables(tmp_path / "slurm") == tables(tmp_path / "local")
    found, expected = (
        json.loads((tmp_path / engine / "search.json").read_text()) for engine in ("slurm", "local")
    )
    assert found == expected
