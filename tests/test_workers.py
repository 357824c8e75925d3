"""The processes that train a comparison's cells: killed, stopped, failing, and started again."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import psutil
import pytest
from comparing import Make, TwoCells

from gpt.compare.execution import local, worker
from gpt.compare.execution.cell_runs import CellError
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell
from gpt.compare.messages import format_summary
from gpt.errors import OutOfMemoryError, StoppedError


@pytest.fixture
def two_cells(tiny: Make, tmp_path: Path) -> TwoCells:
    """In a process each."""
    return TwoCells(tiny, tmp_path)


@pytest.mark.slow
def test_a_killed_cell_is_recorded_and_the_others_continue(
    two_cells: TwoCells, request: pytest.FixtureRequest
):
    summary, workers = two_cells.run_and_kill_a_worker()
    assert workers == 2
    directory = two_cells.directory
    message = format_summary(summary, directory)
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
    """In place of `local.begin`: leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, shared: local.Shared) -> None:
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
    monkeypatch.setattr(local, "begin", Touch(began))
    with pytest.raises(StoppedError):
        two_cells.run(stop=stop)
    assert workers
    assert not any(worker.is_running() for worker in workers)
    assert not began.exists()
    assert not list(two_cells.directory.glob("cells/*/result.json"))


@pytest.mark.slow
def test_ctrl_c_does_not_reach_workers_that_are_starting(two_cells: TwoCells):
    """A terminal sends it to the whole process group."""
    interrupted: set[int] = set()

    def stop() -> bool:
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()) and child.pid not in interrupted:
                child.send_signal(signal.SIGINT)
                interrupted.add(child.pid)
        return two_cells.are_training()

    with pytest.raises(StoppedError):
        two_cells.run(stop=stop)
    assert len(interrupted) == 2


def test_workers_that_cannot_start_end_the_comparison(
    two_cells: TwoCells, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(local, "begin", len)  # raises in the worker
    with pytest.raises(OutOfMemoryError, match="ended while they were starting"):
        two_cells.run()


def test_a_cell_that_needs_too_much_memory_is_recorded(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def exhausted(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(worker, "train", exhausted)
    cell = Cell("one", "arm", {}, {}, tiny())
    (error,) = train_alone(cell, tmp_path)
    assert error is not None
    assert error.status == "out of memory"
    assert "can't allocate memory" in error.reason


def test_an_unexpected_error_is_recorded_with_its_line(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def faulty(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(worker, "train", faulty)
    cell = Cell("one", "arm", {}, {}, tiny())
    (error,) = train_alone(cell, tmp_path)
    assert error is not None
    assert error.status == "error"
    assert "ZeroDivisionError: division by zero (test_workers.py:" in error.reason


def train_alone(cell: Cell, directory: Path) -> list[CellError | None]:
    return worker.train_task(
        Task((cell,), batched=False),
        directory,
        keep_checkpoints=False,
        save_checkpoints=False,
        stop=lambda: False,
        on_update=lambda index: None,
    )
