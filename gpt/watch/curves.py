"""The curves of runs as numbers: loss, learning rate and gradient norm, by step, tokens or time."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt import metrics
from gpt.errors import InputError
from gpt.run.directory import AnyRun, RunDirectory, path_of
from gpt.run.plot import smooth
from gpt.watch.survey import find_runs, read_options
from gpt.watch.table import PLACES, differing, format_value

X = Literal["step", "tokens", "seconds"]
Column = NDArray[np.float64]

OBSERVING = {"checkpoint", "diagnostics", "evaluation", "sampling", "tracking"}  # not training
MOST_OPTIONS = 3  # in a label


@dataclass(frozen=True)
class Curve:
    """The numbers of one run.

    Attributes:
        label: what distinguishes it from the other runs; its name, if that is more than a few
            options.
        columns: as `read_metrics` returns them, and loss_mean, the smoothed training loss.
        diverged: whether it ended because a number was not finite.
    """

    path: Path
    label: str
    columns: Mapping[str, Column]
    diverged: bool

    def points(self, x: X, key: str) -> tuple[Column, Column]:
        """The finite values of a column, against x."""
        values = self.columns[key]
        known = np.isfinite(values)
        return self.columns[x][known], values[known]


def read_curves(runs: Sequence[AnyRun]) -> list[Curve]:
    """The curves of runs; see `gpt.watch.picture.plot`."""
    directories = [RunDirectory(path) for path in _find(runs)]
    labels = _labels(directories)
    return [_read(run, label) for run, label in zip(directories, labels, strict=True)]


def _find(runs: Sequence[AnyRun]) -> list[Path]:
    """The directories of the runs, each once."""
    if not runs:
        raise InputError("no runs given")
    paths: dict[Path, Path] = {}
    for run in runs:
        given = path_of(run)
        folders = [given] if given.exists() else [Path(p) for p in sorted(glob.glob(str(given)))]
        if not folders:
            raise InputError(f"{given}: no such directory")
        found = [path for folder in folders if folder.is_dir() for path in find_runs(folder)]
        if not found:
            raise InputError(f"{given}: {'contains no runs' if given.is_dir() else 'is not a run'}")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def _labels(runs: Sequence[RunDirectory]) -> list[str]:
    """A label for each run: its values of the options in which they differ, or else its name."""
    options = [read_options(run) for run in runs]
    different = [
        option
        for option in differing(options)
        if option not in PLACES and option.partition(".")[0] not in OBSERVING
    ]
    last = Counter(option.rpartition(".")[2] for option in different)
    short = {o: o if last[o.rpartition(".")[2]] > 1 else o.rpartition(".")[2] for o in different}
    labels = [
        ", ".join(f"{name} {format_value(each[option])}" for option, name in short.items())
        for each in options
    ]
    if 0 < len(different) <= MOST_OPTIONS and len(set(labels)) == len(labels):
        return labels
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _read(run: RunDirectory, label: str) -> Curve:
    result = run.read_result()
    columns = _columns(metrics.read(run.metrics))
    columns["loss_mean"] = smooth(columns["loss"])
    diverged = result is not None and result.status == "diverged"
    return Curve(run.path, label, columns, diverged)


def read_metrics(run: AnyRun) -> dict[str, Column]:
    """The metrics of a run as columns of numbers: `pandas.DataFrame(read_metrics(run))`.

    A row for each step, from 0, the evaluation before the first update. NaN means not measured, or
    not finite. The columns are step, tokens, seconds (of updates alone, summed), and those of
    gpt/metrics.py that the run has: loss, val_loss (nats per token), learning_rate, grad_norm and
    so on, without those of single layers.

    Args:
        run: a directory, or a result of `train`.

    Raises:
        InputError: there is no such run, or its metrics.jsonl is damaged.
    """
    directory = RunDirectory(path_of(run))
    read_options(directory)  # refuses a directory that is not a run
    return _columns(metrics.read(directory.metrics))


def _columns(records: Sequence[metrics.Record]) -> dict[str, Column]:
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if "layer" not in record:
            rows.setdefault(record["step"], {}).update(record)
    names = ["step", "tokens", "seconds", "loss", "val_loss", "learning_rate", "grad_norm"]
    names += [name for row in rows.values() for name in row if name != "batches"]
    columns = {
        name: np.array([row.get(name) for row in rows.values()], dtype=np.float64)
        for name in dict.fromkeys(names)
    }
    tokens, seconds = columns["tokens"], columns.get("step_seconds", columns["seconds"])
    columns["tokens"] = np.maximum.accumulate(np.nan_to_num(tokens))  # none before the first update
    columns["seconds"] = np.cumsum(np.nan_to_num(seconds))
    return columns
