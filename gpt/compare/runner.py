"""Cells into run directories, by worker processes that cannot take the sweep with them.

Every cell is an ordinary run under DIR/cells/, by `gpt.training.train`. On a CPU a worker has one
thread: two such workers train small models faster than one with two threads. What ends a cell
before it has a result (killed, out of memory, a fault) is written into DIR/lost.json with its
reason, the other cells go on, and the next start tries it again. Divergence is a result.

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
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any

import pebble
import torch

from gpt import plan
from gpt.compare.grid import Cell
from gpt.config import Config
from gpt.console import Console
from gpt.errors import InputError
from gpt.files import write_text
from gpt.run import RunDirectory
from gpt.training import train

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30.0  # that say how far the sweep is, where there is no terminal
GPU_WORKERS = 8


@dataclass(frozen=True)
class Lost:
    """Why a cell has no result: killed, out of memory or error, and the words for it."""

    status: str
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
    try:
        return {cell: Lost(**lost) for cell, lost in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, TypeError, AttributeError, OSError, RecursionError):
        raise InputError(f"{path}: is damaged; delete it to try its cells again") from None


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
    device = plan.pick_device(cells[0].config.training.device)
    return min(len(cells), cores if device.type == "cpu" else min(GPU_WORKERS, cores))


# ---------------------------------------------------------------------------------------------
# In the parent


def run_cells(
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    keep_checkpoints: bool,
    console: Console,
    stop: Callable[[], bool],
    verdict: Callable[[Cell], str],
) -> bool:
    """Train every cell that has no result yet.

    Args:
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
    if not waiting:
        return True
    context = multiprocessing.get_context("spawn")
    stopping = context.Value("b", 0, lock=False)
    steps = context.Array("l", len(waiting), lock=False)
    total = sum(cell.config.training.steps for cell in waiting)
    number = len(cells) - len(waiting)
    console.start(total, every=SECONDS_BETWEEN_LINES)
    with (
        _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
        pebble.ProcessPool(
            min(workers, len(waiting)),
            initializer=_start_worker,
            initargs=(stopping, steps, os.getpid()),
            context=context,
        ) as pool,
    ):
        futures: dict[Future[Lost | None], int] = {
            pool.schedule(
                _train_cell, (cell.config, cell_directory(directory, cell), index, keep_checkpoints)
            ): index
            for index, cell in enumerate(waiting)
        }
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                if stop():
                    stopping.value = 1
                for index, why in ((futures[future], _why_lost(future)) for future in done):
                    cell = waiting[index]
                    if why is not None:
                        lost[cell.id] = why
                    elif has_ended(directory, cell):
                        lost.pop(cell.id, None)
                    else:
                        continue  # stopped
                    _write_lost(directory, lost)
                    steps[index] = cell.config.training.steps
                    number += 1
                    said = verdict(cell) if why is None else f"{why.status}: {why.reason}"
                    console.say(f"{number}/{len(cells)}  {cell.id}: {said}")
                console.progress(sum(steps))
            return not stopping.value
        finally:
            stopping.value = 1  # after a fault here, workers do not go on alone


def _why_lost(future: Future[Lost | None]) -> Lost | None:
    """What a worker's answer says of a cell without a result."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, pebble.ProcessExpired):
        code = error.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the machine may have been out of memory" if code == -signal.SIGKILL else ""
        return Lost("killed", f"its process ended early, {how}{hint}")
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


def _train_cell(config: Config, path: Path, index: int, keep_checkpoints: bool) -> Lost | None:
    """Train one cell; returns why it has no result, or None."""

    def stop() -> bool:
        _worker.steps[index] += 1
        return bool(_worker.stopping.value) or os.getppid() != _worker.parent

    if _worker.stopping.value:
        return None
    try:
        result = train(config, path, quiet=True, stop=stop)
    except Exception as error:
        if plan.is_out_of_memory(error):
            return Lost("out of memory", str(error).partition("\n")[0])
        return _fault(error)
    if result.status != "interrupted" and not keep_checkpoints:
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return None


def _fault(error: Exception) -> Lost:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({Path(place.filename).name}:{place.lineno})"
    shown = "; ".join(str(error).splitlines()) or type(error).__name__
    return Lost(
        "error",
        shown if isinstance(error, InputError) else f"{type(error).__name__}: {shown}{where}",
    )
