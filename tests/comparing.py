"""Small comparisons that the tests run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gpt import cli, metrics
from gpt.compare import comparison, estimate
from gpt.compare.analysis.results import Summary
from gpt.compare.execution import worker
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell, load
from gpt.config import Config
from gpt.io.console import Console
from gpt.run.directory import RunDirectory

Make = Callable[..., Config]
Edges = dict[str, tuple[float, ...]]


def grid_tree(base: Config, **changes: Any) -> dict[str, Any]:
    tree = base.model_dump(mode="json")
    return {
        "title": "Is it & <b>stable</b>?",
        "base": {key: value for key, value in tree.items() if key not in ("name", "seed")},
        "arms": {
            "placement": {
                "pre": {"model.norm.placement": "pre"},
                "deepnorm": {"model.norm.placement": "deepnorm"},
            }
        },
        "grid": {"optimizer.learning_rate": [0.03, 3e4]},
        "seeds": 2,
        "contrasts": [
            {
                "question": "Does <i>anything</i> move?",
                "measure": "failure",
                "of": ["pre", "deepnorm"],
            }
        ],
        "pairs": [["pre", "deepnorm"]],
        **changes,
    }


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of compare.py, called in this process."""
    code = cli.run("compare", list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def write_grid(tiny: Make, folder: Path) -> Path:
    """Two placements at a moderate and an extreme learning rate, with two seeds."""
    base = tiny(
        diagnostics={"every": 10},
        training={"steps": 20, "batch_sequences": 8},
        sampling={"tokens": 0},
        optimizer={"clip": None, "weight_decay": 0},
    )
    return write(folder / "small.yaml", grid_tree(base))


TIMES = ("seconds", "registered")


def tables(directory: Path) -> tuple[Any, Any]:
    """cells.csv and summary.json, without times."""
    with (directory / "cells.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    summary = json.loads((directory / "summary.json").read_text())
    return rows, {key: value for key, value in summary.items() if key not in TIMES}


class TwoCells:
    """A comparison of two cells that train for a few seconds, long enough to be interrupted."""

    def __init__(self, tiny: Make, folder: Path, steps: int = 400, **changes: Any) -> None:
        training, evaluation = {"steps": steps}, {"every": steps}
        base = tiny(training=training, evaluation=evaluation, sampling={"tokens": 0})
        axis = {"optimizer.learning_rate": [0.01]}
        tree = grid_tree(base, grid=axis, seeds=1, probes=False, **changes)
        self.path, self.directory = write(folder / "slow.yaml", tree), folder / "slow"
        self.grid, self.cells = load(self.path)

    def updates(self) -> list[int]:
        """How many updates each cell has made."""
        logs = [self.directory / "cells" / cell.id / "metrics.jsonl" for cell in self.cells]
        return [
            sum(b'"loss"' in line for line in log.read_bytes().splitlines()) if log.exists() else 0
            for log in logs
        ]

    def are_training(self) -> bool:
        return min(self.updates()) > 3

    def run(self, stop: Callable[[], bool] = lambda: False) -> Summary:
        """Run it with two workers, or with one if its cells are batched."""
        return comparison.compare(
            self.grid, self.cells, self.directory, workers=2, console=Console(), stop=stop
        )

    def run_and_kill_a_worker(self) -> tuple[Summary, int]:
        """Run it and kill one worker; returns the summary and how many workers there were."""
        workers: list[psutil.Process] = []

        def kill_one() -> bool:
            if not workers and self.are_training():
                for child in psutil.Process().children():
                    if any("spawn_main" in word for word in child.cmdline()):
                        workers.append(child)
                workers[0].kill()
            return False

        return self.run(stop=kill_one), len(workers)


class Stub:
    """Writes runs instead of training; `seen` are their ids.

    Args:
        template: a finished run.

    Attributes:
        lost: the ids of cells whose runs fail with an error.
    """

    def __init__(self, template: Path) -> None:
        self.template, self.seen = template, list[str]()
        self.lost: set[str] = set()

    def __call__(self, task: Task, paths: Sequence[Path], *_: object) -> list[Any]:
        return [self.train(cell, path) for cell, path in zip(task.cells, paths, strict=True)]

    def train(self, cell: Cell, path: Path) -> Any:
        self.seen.append(cell.id)
        if cell.id in self.lost:
            return MemoryError("too little")
        shutil.copytree(self.template, path, dirs_exist_ok=True)
        shutil.rmtree(path / "checkpoints")
        run = RunDirectory(path)
        run.config.write_text(cell.config.to_yaml())
        records = metrics.read(run.metrics)
        self.change(cell, run, records)
        run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        return run.read_result()

    def change(self, cell: Cell, run: RunDirectory, records: list[metrics.Record]) -> None:
        """Make the copy of the template the run of a cell."""
        raise NotImplementedError

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "_train", self)
        monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)


class Trainer(Stub):
    """Its runs end as a table says.

    Attributes:
        edges: arm -> seed -> the highest rate at which its runs train.
    """

    def __init__(self, template: Path) -> None:
        super().__init__(template)
        self.edges: Edges = {}
        self.slow_below = 0.0

    def change(self, cell: Cell, run: RunDirectory, records: list[metrics.Record]) -> None:
        rate = cell.config.optimizer.learning_rate
        slow = rate < self.slow_below and not cell.longer
        trained = not slow and rate <= self.edges[cell.arm][cell.config.seed]
        for number, record in enumerate(records):
            if "loss" in record:
                record["loss"] = 5 - 0.01 * number if slow else 3.0
            if "val_loss" in record:
                record["val_loss"] = 1.0 if trained else 5.0


def compare(
    path: Path, directory: Path, stop: Callable[[], bool] = lambda: False, *, extend: bool = False
) -> Summary:
    grid, cells = load(path)
    return comparison.compare(
        grid, cells, directory, workers=1, console=Console(), stop=stop, extend=extend
    )
