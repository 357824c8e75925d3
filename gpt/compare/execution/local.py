"""The engine `local`: worker processes on this machine, whose deaths do not end the comparison.

A *worker* trains one task after another. A single worker trains the batches first; then up to
`workers` run in parallel on the other cells, one each. Each has one thread: on a CPU, two such
workers train small models faster than one with two threads. If a worker is killed, only its task's
cells are affected.

Ctrl-C and SIGTERM reach the parent, which asks the workers to stop; each saves its cells after the
update in progress. Parent and workers share memory: this request, and the number of updates of each
cell. If the parent dies, its workers stop as well.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any, NamedTuple

import pebble
import torch

from gpt.compare.execution.cell_runs import CellError
from gpt.compare.execution.engine import Engine, Work
from gpt.compare.execution.tasks import Task
from gpt.compare.execution.worker import train_task
from gpt.errors import OutOfMemoryError
from gpt.io.children import blocked, environment

SECONDS_BETWEEN_POLLS = 0.1  # of the workers; also the delay until they hear of a stop
WORKERS_ENDED = (
    "all worker processes ended while they were starting; the machine may be out of memory:\n"
    "try --workers 1"
)


@dataclass(frozen=True)
class Local(Engine):
    """Worker processes on this machine."""

    def run(self, work: Work) -> bool:
        ids = [cell.id for task in work.tasks for cell in task.cells]
        index = {name: number for number, name in enumerate(ids)}

        def show() -> None:
            work.progress(dict(zip(ids, pool.shared.steps[:], strict=True)))

        def record(task: Task, answer: Future[list[CellError | None]]) -> None:
            work.record(task, _errors(answer, len(task.cells)))

        pool = Pool(work.stop, len(ids), show)
        for batched, processes in ((True, 1), (False, work.workers)):
            jobs = [
                Job(
                    train_in_worker,
                    (
                        task,
                        work.directory,
                        [index[cell.id] for cell in task.cells],
                        work.keep_checkpoints,
                    ),
                    partial(record, task),
                )
                for task in work.tasks
                if task.batched == batched
            ]
            if not pool.run(jobs, processes):
                return False
        return True


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


# ---------------------------------------------------------------------------------------------
# A worker


@dataclass(frozen=True)
class Shared:
    """Memory shared by the parent and its workers, and the parent's process id.

    Attributes:
        stop: true once the workers should save their cells, answer, and end.
        steps: the number of updates of each cell.
    """

    stop: Synchronized[int]
    steps: SynchronizedArray[int]
    parent: int


_shared: Shared  # set by `begin`, once per worker process


def begin(shared: Shared) -> None:
    """Prepare this process, before its first task: one thread, and signals left to the parent."""
    global _shared
    _shared = shared
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    atexit.register(gc.freeze)  # as in gpt/cli/common.py


def _should_stop() -> bool:
    return bool(_shared.stop.value) or os.getppid() != _shared.parent


def train_in_worker(
    task: Task, directory: Path, indices: Sequence[int], keep_checkpoints: bool
) -> list[CellError | None]:
    """Train a task's cells in this worker process; see `train_task`.

    Args:
        indices: of the cells in `Shared.steps`.
    """

    def count_update(index: int) -> None:
        _shared.steps[indices[index]] += 1

    return train_task(
        task,
        directory,
        keep_checkpoints=keep_checkpoints,
        save_checkpoints=keep_checkpoints,
        stop=_should_stop,
        on_update=count_update,
    )


# ---------------------------------------------------------------------------------------------
# The parent


class Job(NamedTuple):
    """A function for a worker to call, and what the parent does with the answer."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    done: Callable[[Future[Any]], object]


class Pool:
    """Runs jobs in worker processes, and shares memory with them.

    Args:
        stop: polled; once it returns true, the workers are asked to stop.
        cells: of how many cells the numbers of updates are shared.
        meanwhile: called at every poll.

    Attributes:
        shared: see `Shared`.
    """

    def __init__(
        self,
        stop: Callable[[], bool],
        cells: int = 0,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.stop, self.meanwhile = stop, meanwhile
        self.context = multiprocessing.get_context("spawn")
        self.shared = Shared(
            self.context.Value("b", False, lock=False),
            self.context.Array("l", cells, lock=False),
            os.getpid(),
        )

    def run(self, jobs: Sequence[Job], workers: int) -> bool:
        """Run all jobs in at most `workers` processes; returns false if `stop` became true."""
        if not jobs:
            return True
        self.shared.stop.value = stopped = False
        with (
            environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
            pebble.ProcessPool(
                min(workers, len(jobs)),
                initializer=begin,
                initargs=(self.shared,),
                context=self.context,
            ) as processes,
        ):
            with blocked(signal.SIGINT):  # a terminal also sends it to workers that are starting
                futures: dict[Future[Any], Job] = {
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
                    self.meanwhile()
                # Do not wait for workers that are still starting.
                processes.stop()  # type: ignore[no-untyped-call]
            finally:
                self.shared.stop.value = True  # also after an error, or they would continue alone
        return not stopped
