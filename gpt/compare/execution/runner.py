"""Train all cells of a comparison, by any engine, and record how each ended.

A *cell* is one run: a config, and an ordinary run directory under DIR/cells/. A *task* is a cell,
or a batch of cells of one shape that are trained together (tasks.py). An *engine* runs the tasks,
here or on other machines (engines.py). This module hands it the tasks, shows the progress, and
records in DIR/lost.json why a cell has no result.

Started again, a comparison skips cells with a result, resumes those that were stopped, and tries
those in lost.json again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from gpt.compare.execution.cell_runs import (
    CellError,
    cell_directory,
    has_result,
    read_lost,
    write_lost,
)
from gpt.compare.execution.engine import Engine, Work
from gpt.compare.execution.local import Job, Local, Pool
from gpt.compare.execution.remote import FOLDER
from gpt.compare.execution.slurm import Slurm, read_jobs
from gpt.compare.execution.tasks import Task
from gpt.compare.execution.worker import draw_loss
from gpt.compare.grid import Cell
from gpt.errors import InputError
from gpt.hardware.processes import cores
from gpt.io.console import Console
from gpt.run.directory import RunDirectory

SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal


def run_tasks(
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    keep_checkpoints: bool,
    console: Console,
    stop: Callable[[], bool],
    describe: Callable[[Cell], str],
    engine: Engine | None = None,
) -> bool:
    """Train the cells of all tasks, and draw each loss.png that batched training did not.

    Args:
        tasks: of the cells that have no result yet.
        cells: all cells of the comparison.
        directory: of the comparison.
        workers: how many tasks run at once, at most.
        describe: the outcome of a cell that has just ended, for the console.
        engine: where the tasks run; by default in processes on this machine.

    Returns:
        Whether all cells were tried; false if `stop` became true.

    Raises:
        InputError: see `Engine.run`; or the file system does not show a result yet.
        StoppedError: see `Engine.run`.
    """
    missing = [cell for task in tasks for cell in task.cells]
    if not keep_checkpoints:
        names = {cell.id for cell in missing}
        for cell in cells:
            if cell.id not in names:  # a worker was killed before it did this
                shutil.rmtree(cell_directory(directory, cell) / "checkpoints", ignore_errors=True)
    engine = Local() if engine is None else engine
    if not isinstance(engine, Slurm) and read_jobs(directory):
        raise InputError(
            f"{directory}: its cells may still run in Slurm; continue with --engine slurm,\n"
            f"or cancel them and delete {directory / FOLDER}"
        )
    results = _Results(directory, cells, missing, console, describe)
    if missing:
        console.start(sum(results.steps.values()), every=SECONDS_BETWEEN_LINES)
    work = Work(
        tasks,
        directory,
        workers,
        keep_checkpoints,
        stop,
        results.record,
        results.show_progress,
        console.say,
    )
    if not engine.run(work):
        return False
    unseen = [cell.id for cell in missing if cell.id not in results.recorded]
    if unseen:
        raise InputError(
            f"{directory}: {unseen[0]} has ended, but its result cannot be seen here yet;\n"
            "run the same command again"
        )

    def report_failure(answer: Future[None]) -> None:
        if answer.exception() is not None:  # the results do not depend on it
            console.say(f"a cell's loss.png could not be drawn: {answer.exception()}")

    plots = [
        Job(draw_loss, (cell_directory(directory, cell),), report_failure)
        for cell in cells
        if _lacks_plot(directory, cell)
    ]
    return Pool(stop).run(plots, min(workers, cores()))  # here, wherever the tasks ran


class _Results:
    """Records how cells ended: a line on the console, and lost.json.

    Attributes:
        steps: the number of updates that each cell should make, by its id.
    """

    def __init__(
        self,
        directory: Path,
        cells: Sequence[Cell],
        missing: Sequence[Cell],
        console: Console,
        describe: Callable[[Cell], str],
    ) -> None:
        self.directory, self.console, self.describe = directory, console, describe
        self.total, self.ended = len(cells), len(cells) - len(missing)
        self.steps = {cell.id: cell.config.training.steps for cell in missing}
        self.recorded: dict[str, int] = {}  # the steps of cells that have ended
        before = read_lost(directory)
        self.lost = {
            cell.id: before[cell.id]
            for cell in cells
            if cell.id in before and not has_result(directory, cell)
        }
        write_lost(directory, self.lost)

    def record(self, task: Task, errors: Sequence[CellError | None]) -> None:
        """Record how the cells of a task ended; see `Work.record`."""
        for cell, error in zip(task.cells, errors, strict=True):
            if has_result(self.directory, cell):
                self.lost.pop(cell.id, None)
                outcome = self.describe(cell)
            elif error is not None:
                self.lost[cell.id] = error
                outcome = f"{error.status}: {error.reason}"
            else:
                continue  # stopped
            self.recorded[cell.id] = cell.config.training.steps
            self.ended += 1
            self.console.say(f"{self.ended}/{self.total}  {cell.id}: {outcome}")
        write_lost(self.directory, self.lost)

    def show_progress(self, updates: Mapping[str, int]) -> None:
        """Show how many updates the cells have made; those that have ended count in full."""
        self.console.progress(sum({**updates, **self.recorded}.values()))


def _lacks_plot(directory: Path, cell: Cell) -> bool:
    """Whether a cell has a result but no loss.png, as batched training draws none."""
    run = RunDirectory(cell_directory(directory, cell))
    if run.plot.is_file() or not has_result(directory, cell):
        return False
    result = run.read_result()
    return result is not None and result.step > 0
