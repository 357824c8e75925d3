"""What the process of any engine does with a task: it trains the cells into their run directories.

An error in a cell is an answer, and never ends the process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gpt import metrics
from gpt.compare.execution.cell_runs import CellError, cell_directory
from gpt.compare.execution.tasks import Task
from gpt.ensemble import train_together
from gpt.run.directory import RunDirectory, RunResult
from gpt.training import train


def train_task(
    task: Task,
    directory: Path,
    *,
    keep_checkpoints: bool,
    save_checkpoints: bool,
    stop: Callable[[], bool],
    on_update: Callable[[int], object],
) -> list[CellError | None]:
    """Train a task's cells into their run directories.

    Args:
        directory: of the comparison.
        keep_checkpoints: whether the checkpoints of a cell that has ended are kept.
        save_checkpoints: whether batched cells are saved as scheduled, or only for a stop.
        stop: polled often; once it returns true, the cells are saved.
        on_update: called with the index of each cell that has made an update.

    Returns:
        The error of each cell; None if it has a result, or was stopped.
    """
    if stop():
        return [None] * len(task.cells)
    paths = [cell_directory(directory, cell) for cell in task.cells]
    ended = _train(task, paths, save_checkpoints, stop, on_update)
    for path, end in zip(paths, ended, strict=True):
        if isinstance(end, RunResult) and end.status != "interrupted" and not keep_checkpoints:
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return [CellError.of(end) if isinstance(end, Exception) else None for end in ended]


def _train(
    task: Task,
    paths: Sequence[Path],
    save_checkpoints: bool,
    stop: Callable[[], bool],
    on_update: Callable[[int], object],
) -> Sequence[RunResult | Exception]:
    """The result of each cell, or the exception that it raised."""
    configs = [cell.config for cell in task.cells]
    try:
        if task.batched:
            return train_together(
                configs, paths, stop=stop, on_update=on_update, save_checkpoints=save_checkpoints
            )
        count = partial(on_update, 0)
        return [train(configs[0], paths[0], quiet=True, stop=stop, on_update=count)]
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
