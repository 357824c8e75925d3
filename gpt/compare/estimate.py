"""The cost of a comparison, estimated before it runs: cells, tokens, FLOPs, time and disk.

The time is extrapolated from updates of each kind, timed here on one thread; for batched cells,
from an update of a few of them, whose time per cell is an upper bound. The estimate ignores that
workers slow each other down, and that runs may diverge early.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell
from gpt.compare.probes import DEPTHS
from gpt.config import Config
from gpt.ensemble import BatchedTrainer
from gpt.errors import InputError
from gpt.hardware import memory
from gpt.hardware.device import pick_device
from gpt.hardware.memory import release_memory
from gpt.hardware.size import check_probing
from gpt.model.gpt2 import GPT
from gpt.plan.size import checkpoint_bytes
from gpt.plan.timing import TIMED_FLOPS, evaluation_seconds, make_trainer, now, update_seconds
from gpt.trainer import Trainer

TIMED_TOGETHER = 8  # cells of a batch that are timed, at most
TIMED_SECONDS = 1.0  # of all kinds of updates together; each is timed at least once
START_SECONDS = 2.0  # of a cell: reading the data, making the model, drawing loss.png
METRICS_BYTES = 300  # a step
CELL_BYTES = 400_000  # loss.png, the digests of its weights, its part of the report
KEPT = 3  # checkpoints of a cell at once, while it runs


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of the cells still to run.

    Attributes:
        cells: that have no result yet.
        tokens, flops: of their training, without evaluation.
        seconds: of the batched cells, and then of the others, on all workers.
        disk: bytes at most.
    """

    cells: int
    tokens: int
    flops: float
    seconds: float
    disk: int


def check_cells(cells: Sequence[Cell], *, probes: bool = False) -> None:
    """Reject cells that cannot run on this machine, before anything runs.

    Args:
        probes: whether the networks will be measured at initialization.

    Raises:
        InputError: the device is unavailable, or there is too little memory.
    """
    for cell in cells:
        try:
            memory.check_fits(cell.config, pick_device(cell.config.training.device))
            if probes:
                check_probing(cell.config.model, max(DEPTHS))
        except InputError as error:
            raise InputError(f"arm {cell.arm!r}: {error}") from None


def estimate(
    tasks: Sequence[Task], vocab_size: int, workers: int, *, keep_checkpoints: bool
) -> Estimate:
    """Time each kind of update, and add up.

    Args:
        tasks: the cells to run.
        vocab_size: tokens of the vocabulary.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker
    configs = {_kind_of_update(task.cells[0].config): task.cells[0].config for task in tasks}
    measured = {
        kind: _measure(config, vocab_size, TIMED_SECONDS / len(configs))
        for kind, config in configs.items()
    }
    tokens, flops, disk, largest = 0, 0.0, 0, 0
    as_one = alone = 0.0  # seconds
    for task in tasks:
        config, count = task.cells[0].config, len(task.cells)
        update, per_token, checkpoint = measured[_kind_of_update(config)]
        steps, batch = config.training.steps, config.batch_sequences
        seconds = START_SECONDS + evaluation_seconds(config, update)
        if task.batched:
            seconds += steps * _measure_together(config, vocab_size, count)
            as_one += seconds * count
        else:
            alone += seconds + steps * update
        tokens += count * steps * batch * config.model.context
        flops += float(per_token) * count * steps * batch * config.model.context
        disk += count * (METRICS_BYTES * steps + CELL_BYTES)
        largest = max(largest, KEPT * checkpoint * (count if task.batched else workers))
        disk += count * KEPT * checkpoint if keep_checkpoints else 0
    torch.set_num_threads(threads)
    for device in {task.cells[0].config.training.device for task in tasks}:
        release_memory(pick_device(device))
    disk += 0 if keep_checkpoints else largest
    cells = sum(len(task.cells) for task in tasks)
    separate = sum(not task.batched for task in tasks)
    seconds = as_one + alone / max(1, min(workers, separate))
    return Estimate(cells, tokens, flops, seconds, disk)


def check_affordable(estimated: Estimate, directory: Path, hours: float) -> None:
    """Reject a comparison that needs too much disk space or time.

    Raises:
        InputError: the disk is too small, or the time longer than the grid allows.
    """
    free = free_bytes(directory)
    if estimated.disk > free:
        raise InputError(
            f"{directory}: needs about {estimated.disk / 1e9:,.1f} GB, but only "
            f"{free / 1e9:,.1f} GB are free; choose another --out-dir, or shrink the grid"
        )
    if estimated.seconds > 3600 * hours:
        raise InputError(
            f"{directory}: is estimated to take {_span(estimated.seconds)}, but the grid allows "
            f"{_span(3600 * hours)};\nraise its `hours`, use more --workers, or shrink the grid"
        )


def _span(seconds: float) -> str:
    """A duration such as `1.5 hours`, in the largest unit that gives at least one."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.2g} seconds"


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is, or will be."""
    path = directory.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _kind_of_update(config: Config) -> str:
    """A key of the options on which the time of an update depends."""
    model = config.model.model_dump(exclude={"init"})
    training = config.training.model_dump(exclude={"steps"})
    return repr((model, training, config.optimizer.name))


def _measure(config: Config, vocab_size: int, seconds: float) -> tuple[float, int, int]:
    """Seconds of an update, FLOPs of a token, and bytes of a checkpoint.

    Args:
        seconds: to spend on it, with at least one update.
    """
    trainer = make_trainer(config, vocab_size, pick_device(config.training.device))
    model = trainer.model
    update = update_seconds(trainer, vocab_size, seconds, longer=1)
    return update, model.flops_per_token(), checkpoint_bytes(model, config.optimizer)


def _measure_together(config: Config, vocab_size: int, cells: int) -> float:
    """Seconds per run of an update of `cells` runs in one batch."""
    device = pick_device(config.training.device)
    with torch.device("meta"):
        flops = GPT(config.model, vocab_size).flops_per_token()
    update = flops * config.batch_sequences * config.model.context
    affordable = max(1, int(TIMED_FLOPS[device.type] // update))
    most = memory.models_at_once(config, vocab_size, device)
    count = min(cells, TIMED_TOGETHER, most, affordable)
    trainers = [Trainer(config, vocab_size, device) for _ in range(count)]
    for trainer in trainers:
        trainer.reset()
    batched = BatchedTrainer(trainers)
    tokens = torch.randint(vocab_size, (count, config.batch_sequences, config.model.context))
    began = 0.0
    for _ in range(2):  # the first update warms up
        began = now(device)
        batched.update([1.0] * count, *batched.backward(tokens, tokens))
    return (now(device) - began) / count
