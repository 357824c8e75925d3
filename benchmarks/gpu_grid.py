"""Many small runs on one GPU: cells of one shape in one batch, or one after another.

    python benchmarks/gpu_grid.py [--grid configs/compare/single-gpu.yaml] [--small]

The cells are those of a grid file, cut down to `--steps` updates. Cells of the grid's first shape
run one after another (`gpt.train`), in processes that share the GPU, and batched (`gpt.ensemble`)
in growing numbers; cells of every other shape only run batched. This measures the seconds of one
update of all cells (the median, without the first quarter) and the peak memory. The last lines
extrapolate to the whole grid, which compare.py runs. `--small` does the same at a size for a CPU
and proves nothing about a GPU. The table is printed last; `--json` also writes the measurements.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt import metrics
from gpt.compare import grid as grids
from gpt.compare.execution.cell_runs import cell_directory
from gpt.compare.execution.runner import run_tasks
from gpt.compare.execution.tasks import make_tasks
from gpt.compare.grid import Cell
from gpt.config import merge
from gpt.data.preparation import prepare
from gpt.ensemble import train_together
from gpt.hardware.device import pick_device
from gpt.io.console import Console
from gpt.training import train

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {  # a size for a CPU
    "model": {"layers": 4, "width": 32, "heads": 2, "context": 32},
    "training": {"batch_sequences": 4, "precision": "fp32"},
}


@dataclass(frozen=True)
class Row:
    """One way of training some cells.

    Attributes:
        update_seconds: of one update of all the cells.
        start_seconds: of everything else, per cell.
        peak_bytes: of GPU memory; None on a CPU, and for processes.
    """

    way: str
    arm: str
    cells: int
    update_seconds: float
    start_seconds: float
    peak_bytes: int | None

    @property
    def cell_updates(self) -> float:
        """Updates of cells per second."""
        return self.cells / self.update_seconds


def cut(path: Path, steps: int, small: bool) -> list[Cell]:
    """The grid's cells, cut to `steps` updates, with an evaluation at either end."""
    options: dict[str, Any] = {
        "training": {"steps": steps, "log_every": max(1, steps // 4)},
        "evaluation": {"every": steps},
    }
    return grids.load(path, merge(options, SMALL if small else {}))[1]


def update_seconds(directory: Path, cells: Sequence[Cell]) -> list[float]:
    """The median seconds of each cell's steps, without the first quarter of them."""
    medians = []
    for cell in cells:
        records = metrics.read(cell_directory(directory, cell) / "metrics.jsonl")
        taken = [r["step_seconds"] for r in records if "step_seconds" in r]
        medians.append(statistics.median(taken[len(taken) // 4 :]))
    return medians


def one_after_another(cells: Sequence[Cell], directory: Path) -> float:
    """Train each alone."""
    for cell in cells:
        train(cell.config, cell_directory(directory, cell), quiet=True)
    return sum(update_seconds(directory, cells))


def batched(cells: Sequence[Cell], directory: Path) -> float:
    """Train all together."""
    paths = [cell_directory(directory, cell) for cell in cells]
    configs = [cell.config for cell in cells]
    for ended in train_together(
        configs, paths, stop=lambda: False, on_update=lambda index: None, save_checkpoints=False
    ):
        if isinstance(ended, Exception):
            raise ended
    return max(update_seconds(directory, cells))


def in_processes(cells: Sequence[Cell], directory: Path) -> float:
    """Train each in a process, all at the same time."""
    run_tasks(
        make_tasks(cells, "processes"),
        cells,
        directory,
        workers=len(cells),
        keep_checkpoints=False,
        console=Console(quiet=True),
        stop=lambda: False,
        describe=lambda cell: "",
    )
    return max(update_seconds(directory, cells))


WAYS: dict[str, Callable[[Sequence[Cell], Path], float]] = {
    "one after another": one_after_another,
    "in processes": in_processes,
    "batched": batched,
}


def measure(way: str, cells: Sequence[Cell], answers: Any) -> None:
    """In a process of its own: measure, and send back the row or the error."""
    torch.set_num_threads(1)
    on_gpu = pick_device("auto").type == "cuda"
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "cells").mkdir()
            began = time.monotonic()
            seconds = WAYS[way](cells, Path(folder))
            rest = time.monotonic() - began - seconds * cells[0].config.training.steps
        peak = torch.cuda.max_memory_allocated() if on_gpu and way != "in processes" else None
        answers.put(Row(way, cells[0].arm, len(cells), seconds, rest / len(cells), peak))
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}".partition("\n")[0])


def measure_in_process(way: str, cells: Sequence[Cell]) -> Row | str:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=measure, args=(way, cells, answers))
    process.start()
    while process.is_alive() and answers.empty():
        process.join(0.2)
    answer: Row | str = "its process died" if answers.empty() else answers.get()
    process.join()
    return answer


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", type=Path, default=ROOT / "configs/compare/single-gpu.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="a size for a CPU")
    parser.add_argument(
        "--seconds", type=float, default=420, help="start no measurement later than this"
    )
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args(argv)
    on_gpu = pick_device("auto").type == "cuda"
    if not on_gpu and not flags.small:
        print("gpu_grid.py: needs a GPU; --small runs it at a size for a CPU", file=sys.stderr)
        raise SystemExit(2)
    began = time.monotonic()
    cells = cut(flags.grid, flags.steps, flags.small)
    full = grids.load(flags.grid)[1]
    for cell in cells[:1]:
        prepare(cell.config.data)
    shapes = [list(task.cells) for task in make_tasks(cells, "batched")]
    first = shapes[0][: 8 if flags.small else None]
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < len(first)]
    plans = [("one after another", first[:2]), ("batched", first)]
    plans += [("batched", shape[: len(first)]) for shape in shapes[1:]]
    plans += [("batched", first[:n]) for n in sizes]
    plans += [("in processes", first[: 2 if flags.small else 8])]
    rows: list[Row] = []
    missing: list[str] = []
    for way, some in plans:
        name = f"{some[0].arm}, {len(some)} cells, {way}"
        found = (
            measure_in_process(way, some)
            if time.monotonic() - began < flags.seconds
            else "out of time"
        )
        print(f"{time.monotonic() - began:5.0f} s  {name}: {found}", file=sys.stderr)
        if isinstance(found, Row):
            rows.append(found)
        else:
            missing.append(f"{name}: not measured: {found}")
    report(rows, missing, shapes, full[0].config.training.steps, flags.json, small=flags.small)


def report(
    rows: Sequence[Row],
    missing: Sequence[str],
    shapes: Sequence[Sequence[Cell]],
    steps: int,
    path: Path | None,
    *,
    small: bool,
) -> None:
    """Print and write the measurements."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    facts = {"torch": torch.__version__, "device": device, "small": small}
    alone = next((row for row in rows if row.way == "one after another"), None)
    whole = [
        row for row in rows if row.way == "batched" and row.cells == max(r.cells for r in rows)
    ]
    cells = sum(map(len, shapes))
    projected: dict[str, float] = {}
    if alone is not None:
        update = alone.update_seconds / alone.cells
        projected["one after another"] = cells * (steps * update + alone.start_seconds)
    if len(whole) == len(shapes):
        projected["batched"] = sum(
            len(shape) * (steps * row.update_seconds / row.cells + row.start_seconds)
            for shape, row in zip(shapes, whole, strict=True)
        )
    if path is not None:
        tree = {**facts, "rows": [asdict(row) for row in rows], "missing": list(missing)}
        path.write_text(json.dumps({**tree, "projected_seconds": projected}, indent=2) + "\n")
    print(f"torch {torch.__version__}, {device}" + (", at a size for a CPU" if small else ""))
    print("| cells | way | ms per update of all | cell updates/s | speed-up | peak GB | start |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row.cell_updates / alone.cell_updates:.2f}x" if alone else "not measured"
        peak = "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        print(
            f"| {row.cells} ({row.arm}) | {row.way} | {1e3 * row.update_seconds:.1f} | "
            f"{row.cell_updates:,.1f} | {ratio} | {peak} | {row.start_seconds:.2f} s |"
        )
    for line in missing:
        print(line)
    for way, seconds in projected.items():
        print(f"{cells} cells of {steps:,} updates, {way}: {seconds / 60:,.1f} minutes, projected")


if __name__ == "__main__":
    main()
