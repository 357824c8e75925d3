"""Cells into run directories, by worker processes that cannot take the sweep with them.

Every cell is an ordinary run under DIR/cells/. On a CPU each has a process of one thread to itself
(`gpt.training.train`): two such workers train small models faster than one with two threads. On a
GPU all cells of one shape are trained as one (`gpt.ensemble.train_together`), in one process, and
those that cannot be have processes after that. What ends a cell before it has a result (killed, out
of memory, a fault) is written into DIR/lost.json with its reason, the other cells go on, and the
next start tries it again. Divergence is a result.

Ctrl-C and SIGTERM let each worker save its cell at the end of the update; started again, cells that
have ended are not touched, and the others go on from where they were saved.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pebble
import torch

from gpt import metrics
from gpt.compare.grid import Cell, Runner
from gpt.ensemble import shape, train_together, why_not
from gpt.errors import InputError
from gpt.hardware.device import pick_device
from gpt.hardware.memory import is_out_of_memory
from gpt.io.console import Console
from gpt.io.files import read_json, write_text
from gpt.run.directory import RunDirectory, RunResult
from gpt.training import train

SECONDS_BETWEEN_LOOKS = 0.1  # also until a stop is passed on to the workers
SECONDS_BETWEEN_LINES = 30.0  # that say how far the sweep is, where there is no terminal
GPU_WORKERS = 8


@dataclass(frozen=True)
class Lost:
    """Why a cell has no result: killed, out of memory or error, and the words for it."""

    status: Literal["killed", "out of memory", "error"]
    reason: str


def cell_directory(directory: Path, cell: Cell) -> Path:
    """The run directory of a cell."""
    return directory / "cells" / cell.id


def read_lost(directory: Path) -> dict[str, Lost]:
    """The cells that ended without a result, by their ids.

    Raises:
        InputError: lost.json is damaged.
    """
    path = directory / "lost.json"
    if not path.is_file():
        return {}
    return read_json(path, dict[str, Lost], "delete it to try its cells again")


def has_ended(directory: Path, cell: Cell) -> bool:
    """Whether a cell has a result.

    Raises:
        InputError: its directory holds a run of another config, or a damaged one.
    """
    run = RunDirectory(cell_directory(directory, cell))
    if not run.config.is_file():
        return False
    differences = run.read_config().differences(cell.config)
    if differences:
        raise InputError(
            f"{run.path}: holds a run of another config ({differences[0]}); "
            "choose another --out-dir"
        )
    result = run.read_result()
    return result is not None and result.status != "interrupted"


def default_workers(cells: Sequence[Cell]) -> int:
    """One for each core this process may use; on a GPU at most eight."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    device = pick_device(cells[0].config.training.device)
    return min(len(cells), cores if device.type == "cpu" else min(GPU_WORKERS, cores))


@dataclass(frozen=True)
class Task:
    """Cells that one worker trains, one after another or, if `as_one`, as one."""

    cells: tuple[Cell, ...]
    as_one: bool


def tasks(cells: Sequence[Cell], runner: Runner) -> list[Task]:
    """How `cells` are trained: those of one shape as one, on a GPU or where it is asked for.

    Raises:
        InputError: it is asked for, and a cell cannot be.
    """
    shapes: dict[str, list[Cell]] = {}
    alone: list[Cell] = []
    for cell in cells:
        hindrance = why_not(cell.config)
        if hindrance and runner == "batched":
            raise InputError(
                f"arm {cell.arm!r}: {hindrance} has no batched form; runner: auto trains such "
                "cells in processes"
            )
        on_gpu = pick_device(cell.config.training.device).type == "cuda"
        if hindrance or runner == "processes" or (runner == "auto" and not on_gpu):
            alone.append(cell)
        else:
            shapes.setdefault(shape(cell.config), []).append(cell)
    as_one = [Task(tuple(group), as_one=True) for group in shapes.values()]
    return [*as_one, *(Task((cell,), as_one=False) for cell in alone)]


# ---------------------------------------------------------------------------------------------
# In the parent


def run_cells(
    cells: Sequence[Cell],
    directory: Path,
    *,
    runner: Runner,
    workers: int,
    keep_checkpoints: bool,
    console: Console,
    stop: Callable[[], bool],
    verdict: Callable[[Cell], str],
) -> bool:
    """Train every cell that has no result yet.

    Args:
        runner: see `tasks`.
        workers: processes.
        verdict: what to say of a cell that has just ended.

    Returns:
        Whether all were tried; false if `stop` came true.
    """
    waiting = [cell for cell in cells if not has_ended(directory, cell)]
    names = {cell.id for cell in waiting}
    lost = {name: why for name, why in read_lost(directory).items() if name in names}
    _write_lost(directory, lost)
    for cell in cells:
        if cell.id not in names and not keep_checkpoints:  # of a worker killed before it did this
            shutil.rmtree(cell_directory(directory, cell) / "checkpoints", ignore_errors=True)
    planned = tasks(waiting, runner)
    shared = _Shared(waiting)
    number = len(cells) - len(waiting)

    def ended(task: Task, answer: Future[list[Lost | None]]) -> None:
        nonlocal number
        for cell, why in zip(task.cells, _why_lost(answer, len(task.cells)), strict=True):
            if has_ended(directory, cell):
                lost.pop(cell.id, None)
                said = verdict(cell)
            elif why is not None:
                lost[cell.id] = why
                said = f"{why.status}: {why.reason}"
            else:
                continue  # stopped
            shared.steps[shared.index[cell.id]] = cell.config.training.steps
            number += 1
            console.say(f"{number}/{len(cells)}  {cell.id}: {said}")
        _write_lost(directory, lost)

    if waiting:
        console.start(
            sum(cell.config.training.steps for cell in waiting), every=SECONDS_BETWEEN_LINES
        )
    stages = (
        ([task for task in planned if task.as_one], 1),
        ([task for task in planned if not task.as_one], workers),
    )
    for stage, processes in stages:
        calls = [
            _Call(
                _train_task,
                (task, directory, shared.indices(task), keep_checkpoints),
                partial(ended, task),
            )
            for task in stage
        ]
        if not _work(calls, processes, shared, console, stop):
            return False

    def drawn(answer: Future[None]) -> None:
        if answer.exception() is not None:  # the results are there without it
            console.say(f"a cell's loss.png could not be drawn: {answer.exception()}")

    pictures = [
        _Call(_draw, (cell_directory(directory, cell),), drawn)
        for cell in cells
        if _lacks_picture(directory, cell)
    ]
    return _work(pictures, workers, shared, console, stop)


def _lacks_picture(directory: Path, cell: Cell) -> bool:
    """Whether a cell has ended that was not trained alone, and so has no loss.png yet."""
    run = RunDirectory(cell_directory(directory, cell))
    result = run.read_result() if has_ended(directory, cell) else None
    return result is not None and result.step > 0 and not run.plot.is_file()


class _Shared:
    """What workers share with their parent: a wish to stop, and how far each cell is."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.stopping = self.context.Value("b", 0, lock=False)
        self.steps = self.context.Array("l", len(cells), lock=False)
        self.index = {cell.id: index for index, cell in enumerate(cells)}

    def indices(self, task: Task) -> list[int]:
        """Where a task's cells stand in `steps`."""
        return [self.index[cell.id] for cell in task.cells]


class _Call(NamedTuple):
    """What a worker shall do, and what the parent does with its answer."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    ended: Callable[[Future[Any]], object]


def _work(
    calls: Sequence[_Call],
    workers: int,
    shared: _Shared,
    console: Console,
    stop: Callable[[], bool],
) -> bool:
    """Make all calls in worker processes; false if `stop` came true, which workers then see."""
    if not calls:
        return True
    with (
        _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
        pebble.ProcessPool(
            min(workers, len(calls)),
            initializer=_start_worker,
            initargs=(shared.stopping, shared.steps, os.getpid()),
            context=shared.context,
        ) as pool,
    ):
        futures: dict[Future[Any], _Call] = {
            pool.schedule(call.function, call.arguments): call for call in calls
        }
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                if stop():
                    shared.stopping.value = 1
                for future in done:
                    futures[future].ended(future)
                if shared.index:  # else nothing was left to train
                    console.progress(sum(shared.steps))
        except BaseException:
            shared.stopping.value = 1  # workers do not go on alone
            raise
    return not shared.stopping.value


def _why_lost(future: Future[list[Lost | None]], cells: int) -> list[Lost | None]:
    """What a worker's answer says of each of its cells that has no result."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, pebble.ProcessExpired):
        code = error.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the machine may have been out of memory" if code == -signal.SIGKILL else ""
        return [Lost("killed", f"its process ended early, {how}{hint}")] * cells
    raise error


def _write_lost(directory: Path, lost: dict[str, Lost]) -> None:
    path = directory / "lost.json"
    if lost:
        tree = {name: asdict(why) for name, why in lost.items()}
        write_text(path, json.dumps(tree, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------
# In a worker


@dataclass
class _Worker:
    """What a worker shares with its parent: a wish to stop, and how far each cell is."""

    stopping: Synchronized[int]
    steps: SynchronizedArray[int]
    parent: int


_worker: _Worker


def _start_worker(stopping: Any, steps: Any, parent: int) -> None:
    global _worker
    _worker = _Worker(stopping, steps, parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent hears them too, and says so here
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _count(index: int) -> None:
    """A cell has made an update."""
    _worker.steps[index] += 1


def _stopping() -> bool:
    return bool(_worker.stopping.value) or os.getppid() != _worker.parent


def _train_task(
    task: Task, directory: Path, indices: Sequence[int], keep_checkpoints: bool
) -> list[Lost | None]:
    """Train a task's cells; returns why each has no result, or None."""
    if _worker.stopping.value:
        return [None] * len(task.cells)
    configs = [cell.config for cell in task.cells]
    paths = [cell_directory(directory, cell) for cell in task.cells]
    ended: Sequence[RunResult | Exception]
    try:
        if task.as_one:
            ended = train_together(
                configs,
                paths,
                stop=_stopping,
                on_update=lambda i: _count(indices[i]),
                save_checkpoints=keep_checkpoints,
            )
        else:
            count = partial(_count, indices[0])
            ended = [train(configs[0], paths[0], quiet=True, stop=_stopping, on_update=count)]
    except Exception as error:
        ended = [error] * len(configs)
    for path, each in zip(paths, ended, strict=True):
        if isinstance(each, RunResult) and each.status != "interrupted" and not keep_checkpoints:
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return [_lost(each) if isinstance(each, Exception) else None for each in ended]


def _draw(path: Path) -> None:
    """A cell's loss.png, where its run did not draw it."""
    run = RunDirectory(path)
    records = metrics.read(run.metrics)
    if any("loss" in record for record in records):
        from gpt.run.plot import plot_run  # with it comes matplotlib, which training does not need

        plot_run(records, run.plot, title=run.read_config().name)


def _lost(error: Exception) -> Lost:
    if is_out_of_memory(error):
        return Lost("out of memory", str(error).partition("\n")[0])
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({Path(place.filename).name}:{place.lineno})"
    shown = "; ".join(str(error).splitlines()) or type(error).__name__
    return Lost(
        "error",
        shown if isinstance(error, InputError) else f"{type(error).__name__}: {shown}{where}",
    )
