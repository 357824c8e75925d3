"""Which cells are trained together: the tasks of a comparison.

A task is the unit of work of an engine: a single cell, or a batch of cells of one shape,
whose weights are stacked and trained in the same matrix products (see gpt/ensemble.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpt.compare.grid import Cell, Runner
from gpt.ensemble import shape, unsupported_reason
from gpt.errors import InputError
from gpt.hardware.device import pick_device
from gpt.hardware.processes import cores

GPU_WORKERS = 8


@dataclass(frozen=True)
class Task:
    """Cells for one worker: a single one, or several of one shape if `batched`."""

    cells: tuple[Cell, ...]
    batched: bool

    @property
    def name(self) -> str:
        """The id of its first cell, which names files about the task."""
        return self.cells[0].id


def make_tasks(cells: Sequence[Cell], runner: Runner) -> list[Task]:
    """Divide `cells` into tasks, batched ones first.

    Args:
        runner: "batched" batches all cells of one shape; "processes" none; "auto" those on a GPU.

    Raises:
        InputError: `runner` is "batched", and a cell has no batched form.
    """
    shapes: dict[str, list[Cell]] = {}
    single: list[Cell] = []
    for cell in cells:
        obstacle = unsupported_reason(cell.config)
        if obstacle and runner == "batched":
            raise InputError(
                f"arm {cell.arm!r}: {obstacle} cannot be batched; runner: auto trains such "
                "cells in processes"
            )
        on_gpu = pick_device(cell.config.training.device).type == "cuda"
        if obstacle or runner == "processes" or (runner == "auto" and not on_gpu):
            single.append(cell)
        else:
            shapes.setdefault(shape(cell.config), []).append(cell)
    batched = [Task(tuple(group), batched=True) for group in shapes.values()]
    return [*batched, *(Task((cell,), batched=False) for cell in single)]


def default_workers(cells: Sequence[Cell]) -> int:
    """One for each core that this process may use; at most one per cell, and eight on a GPU."""
    device = pick_device(cells[0].config.training.device)
    return min(len(cells), cores() if device.type == "cpu" else min(GPU_WORKERS, cores()))
