"""A worker process of a comparison: it trains the cells of one task after another.

The worker fills run directories and answers its parent, in runner.py, with the error of each cell
that has no result. Meanwhile the two share memory: the parent's request to stop, at which the
worker saves its cells after the update in progress, and the number of updates of each cell. If the
parent dies, the worker stops as well.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path

import torch

from gpt import metrics
from gpt.compare.execution.cell_runs import CellError, cell_directory
from gpt.compare.execution.tasks import Task
from gpt.ensemble import train_together
from gpt.run.directory import RunDirectory, RunResult
from gpt.training import train


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


def _count_update(index: int) -> None:
    _shared.steps[index] += 1


def train_task(
    task: Task, directory: Path, indices: Sequence[int], keep_checkpoints: bool
) -> list[CellError | None]:
    """Train a task's cells into their run directories.

    Args:
        directory: of the comparison.
        indices: of the cells in `Shared.steps`.
        keep_checkpoints: whether the checkpoints of a cell that has ended are kept.

    Returns:
        The error of each cell; None if it has a result, or was stopped.
    """
    if _shared.stop.value:
        return [None] * len(task.cells)
    paths = [cell_directory(directory, cell) for cell in task.cells]
    ended = _train(task, paths, indices, keep_checkpoints)
    for path, end in zip(paths, ended, strict=True):
        if isinstance(end, RunResult) and end.status != "interrupted" and not keep_checkpoints:
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return [CellError.of(end) if isinstance(end, Exception) else None for end in ended]


def _train(
    task: Task, paths: Sequence[Path], indices: Sequence[int], keep_checkpoints: bool
) -> Sequence[RunResult | Exception]:
    """The result of each cell, or the exception that it raised."""
    configs = [cell.config for cell in task.cells]
    try:
        if task.batched:
            return train_together(
                configs,
                paths,
                stop=_should_stop,
                on_update=lambda i: _count_update(indices[i]),
                save_checkpoints=keep_checkpoints,
            )
        count = partial(_count_update, indices[0])
        return [train(configs[0], paths[0], quiet=True, stop=_should_stop, on_update=count)]
    except Exception as error:
        return [error] * len(configs)


def draw_loss(path: Path) -> None:
    """Draw the loss.png of a batched cell, whose training did not draw it."""
    run = RunDirectory(path)
    records = metrics.read(run.metrics)
    if any("loss" in record for record in records):
        from gpt.run.plot import plot_run  # imports matplotlib, which training does not need

        config, levels = run.read_config(), run.guessing_losses()
        clip = config.optimizer.clip
        plot_run(records, run.plot, title=config.name, levels=levels, clip=clip)
