"""Train all cells of a comparison, in worker processes whose deaths do not end it.

A *cell* is one run: a config, and an ordinary run directory under DIR/cells/. A *task* is a cell,
or a batch of cells of one shape that are trained together (tasks.py). A *worker* is a process that
trains one task after another (worker.py). This module is their parent: it hands out the tasks,
shows the progress, and records in DIR/lost.json why a cell has no result.

A single worker trains the batches first; then up to `workers` run in parallel on the other cells,
one each. Each has one thread: on a CPU, two such workers train small models faster than one with
two threads. If a worker is killed, only its task's cells are affected.

Ctrl-C and SIGTERM reach the parent, which asks the workers to stop; each saves its cells after the
update in progress. Started again, a comparison skips cells with a result, resumes those
that were stopped, and tries those in lost.json again.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pebble

from gpt.compare.execution import worker
from gpt.compare.execution.cell_runs import (
    CellError,
    cell_directory,
    has_result,
    read_lost,
    write_lost,
)
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell
from gpt.errors import OutOfMemoryError
from gpt.io.children import blocked, environment
from gpt.io.console import Console
from gpt.run.directory import RunDirectory

SECONDS_BETWEEN_POLLS = 0.1  # of the workers; also the delay until they hear of a stop
SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal
WORKERS_ENDED = (
    "all worker processes ended while they were starting; the machine may be out of memory:\n"
    "try --workers 1"
)


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
) -> bool:
    """Train the cells of all tasks, and draw each loss.png that batched training did not.

    Args:
        tasks: of the cells that have no result yet.
        cells: all cells of the comparison.
        directory: of the comparison.
        workers: number of worker processes.
        describe: the outcome of a cell that has just ended, for the console.

    Returns:
        Whether all cells were tried; false if `stop` became true.
    """
    missing = [cell for task in tasks for cell in task.cells]
    if not keep_checkpoints:
        names = {cell.id for cell in missing}
        for cell in cells:
            if cell.id not in names:  # a worker was killed before it did this
                shutil.rmtree(cell_directory(directory, cell) / "checkpoints", ignore_errors=True)
    pool = _Pool(missing, console, stop)
    results = _Results(directory, cells, missing, pool, console, describe)
    if missing:
        steps = sum(cell.config.training.steps for cell in missing)
        console.start(steps, every=SECONDS_BETWEEN_LINES)
    for batched, processes in ((True, 1), (False, workers)):
        jobs = [
            _Job(
                worker.train_task,
                (task, directory, [pool.index[cell.id] for cell in task.cells], keep_checkpoints),
                partial(results.record, task),
            )
            for task in tasks
            if task.batched == batched
        ]
        if not pool.run(jobs, processes):
            return False

    def report_failure(answer: Future[None]) -> None:
        if answer.exception() is not None:  # the results do not depend on it
            console.say(f"a cell's loss.png could not be drawn: {answer.exception()}")

    plots = [
        _Job(worker.draw_loss, (cell_directory(directory, cell),), report_failure)
        for cell in cells
        if _lacks_plot(directory, cell)
    ]
    return pool.run(plots, workers)


class _Results:
    """Records how cells ended: a line on the console, and lost.json."""

    def __init__(
        self,
        directory: Path,
        cells: Sequence[Cell],
        missing: Sequence[Cell],
        pool: _Pool,
        console: Console,
        describe: Callable[[Cell], str],
    ) -> None:
        self.directory, self.pool, self.console, self.describe = directory, pool, console, describe
        self.total, self.ended = len(cells), len(cells) - len(missing)
        before = read_lost(directory)
        self.lost = {
            cell.id: before[cell.id]
            for cell in cells
            if cell.id in before and not has_result(directory, cell)
        }
        write_lost(directory, self.lost)

    def record(self, task: Task, answer: Future[list[CellError | None]]) -> None:
        """Record a worker's answer to a task."""
        for cell, error in zip(task.cells, _errors(answer, len(task.cells)), strict=True):
            if has_result(self.directory, cell):
                self.lost.pop(cell.id, None)
                outcome = self.describe(cell)
            elif error is not None:
                self.lost[cell.id] = error
                outcome = f"{error.status}: {error.reason}"
            else:
                continue  # stopped
            self.pool.shared.steps[self.pool.index[cell.id]] = cell.config.training.steps
            self.ended += 1
            self.console.say(f"{self.ended}/{self.total}  {cell.id}: {outcome}")
        write_lost(self.directory, self.lost)


def _lacks_plot(directory: Path, cell: Cell) -> bool:
    """Whether a cell has a result but no loss.png, as batched training draws none."""
    run = RunDirectory(cell_directory(directory, cell))
    if run.plot.is_file() or not has_result(directory, cell):
        return False
    result = run.read_result()
    return result is not None and result.step > 0


def _errors(answer: Future[list[CellError | None]], cells: int) -> list[CellError | None]:
    """The errors of a task's cells: the worker's answer, or that its process died."""
    error = answer.exception()
    if error is None:
        return answer.result()
    if isinstance(error, pebble.ProcessExpired):
        code = error.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "; the machine may have been out of memory" if code == -signal.SIGKILL else ""
        return [CellError("killed", f"its process ended early, {how}{hint}")] * cells
    raise error


class _Job(NamedTuple):
    """A function for a worker to call, and what the parent does with the answer."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    done: Callable[[Future[Any]], object]


class _Pool:
    """Runs jobs in worker processes, and shares memory with them.

    Attributes:
        shared: see `worker.Shared`.
        index: of a cell in `shared.steps`, by its id.
    """

    def __init__(self, cells: Sequence[Cell], console: Console, stop: Callable[[], bool]) -> None:
        self.console, self.stop = console, stop
        self.context = multiprocessing.get_context("spawn")
        self.shared = worker.Shared(
            self.context.Value("b", False, lock=False),
            self.context.Array("l", len(cells), lock=False),
            os.getpid(),
        )
        self.index = {cell.id: index for index, cell in enumerate(cells)}

    def run(self, jobs: Sequence[_Job], workers: int) -> bool:
        """Run all jobs in at most `workers` processes; returns false if `stop` became true."""
        if not jobs:
            return True
        self.shared.stop.value = stopped = False
        with (
            environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
            pebble.ProcessPool(
                min(workers, len(jobs)),
                initializer=worker.begin,
                initargs=(self.shared,),
                context=self.context,
            ) as processes,
        ):
            with blocked(signal.SIGINT):  # a terminal also sends it to workers that are starting
                futures: dict[Future[Any], _Job] = {
                    processes.schedule(job.function, job.arguments): job for job in jobs
                }
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, SECONDS_BETWEEN_POLLS, FIRST_COMPLETED)
                    if self.stop():
                        self.shared.stop.value = stopped = True
                        pending = {future for future in pending if not future.cancel()}
                    for future in done:
                        if not isinstance(future.exception(), BrokenProcessPool):
                            futures[future].done(future)
                        elif not stopped:
                            raise OutOfMemoryError(WORKERS_ENDED)
                    if self.index:  # cells were to be trained
                        self.console.progress(sum(self.shared.steps[:]))
                # Do not wait for workers that are still starting.
                processes.stop()  # type: ignore[no-untyped-call]
            finally:
                self.shared.stop.value = True  # also after an error, or they would continue alone
        return not stopped
