"""The runs and comparisons in a folder: where they are, how far they have come, how they ended.

A damaged directory is listed too, with what is wrong with it.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gpt import metrics
from gpt.config import MAX_BYTES, Config, leaves, read_yaml
from gpt.config.strict_yaml import parse_yaml
from gpt.errors import InputError
from gpt.io.console import duration, format_loss
from gpt.io.files import is_locked, read_json, read_small, reading
from gpt.io.text import decode
from gpt.run.directory import RunDirectory, Status

MARKS = {"config.yaml", "environment.json", "metrics.jsonl", "result.json"}  # any of them: a run


@dataclass(frozen=True)
class RunSummary:
    """A run, or a comparison, in a line. What is not known is None.

    Attributes:
        name: its path below the folder that was searched.
        status: running if a process trains there; interrupted if it can be resumed; damaged if a
            file cannot be read.
        step, steps: updates made, and planned.
        train_loss, val_loss, best_val_loss: of the last update, the last evaluation, and the lowest
            of all evaluations; nats per token.
        parameters: of the model.
        tokens: training tokens seen.
        seconds: wall-clock time; of a run without a result, of its updates.
        note: of a comparison, its cells in words; of a damaged run, what is damaged.
        options: all options by dotted path; empty for comparisons and damaged runs.
    """

    name: str
    path: Path
    status: Status | Literal["running", "damaged"]
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    learning_rate: float | None = None
    parameters: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def find(folder: Path) -> Iterator[Path]:
    """All runs and comparisons in `folder`, itself included, sorted; none inside another.

    A link is followed only to a run or comparison, since one to a folder may lead back.

    Raises:
        InputError: `folder` cannot be read.
    """
    with reading(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    if {entry.name for entry in entries} & MARKS or is_comparison(folder):
        yield folder
        return
    for entry in entries:
        path = Path(entry.path)
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if entry.is_symlink():
            yield from (
                [path]
                if is_comparison(path) or any((path / name).exists() for name in MARKS)
                else []
            )
            continue
        try:
            yield from find(path)
        except InputError:
            yield path  # its summary says what is wrong


def find_runs(folder: Path) -> Iterator[Path]:
    """All runs in `folder`, those of comparisons included; see `find`."""
    for path in find(folder):
        yield from find(path / "cells") if is_comparison(path) else [path]


def is_comparison(path: Path) -> bool:
    """Whether a directory holds a comparison."""
    return (path / "grid.yaml").is_file() and (path / "cells").is_dir()


def _natural(name: str) -> list[Any]:
    """A key that sorts `seed-10` after `seed-9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def summarize(path: Path, name: str) -> RunSummary:
    """The summary of a run or a comparison; one that cannot be read is damaged."""
    try:
        return _comparison(path, name) if is_comparison(path) else _run(path, name)
    except (InputError, OSError) as error:
        note = str(error).replace(f"{path}{os.sep}", "").removeprefix(f"{path}: ").splitlines()[0]
        return RunSummary(name, path, "damaged", note=note)


def _run(path: Path, name: str) -> RunSummary:
    run = RunDirectory(path)
    options = read_options(run)
    summary = RunSummary(
        name,
        path,
        "running" if is_locked(path) else "interrupted",
        steps=options["training.steps"],
        learning_rate=options["optimizer.learning_rate"],
        parameters=_parameters(run),
        options=options,
    )
    result = run.read_result()
    if result is None:
        return replace(summary, **_progress(metrics.read(run.metrics)))
    return replace(
        summary,
        status=result.status if summary.status == "interrupted" else summary.status,
        step=result.step,
        train_loss=result.train_loss,
        val_loss=result.val_loss,
        best_val_loss=result.best_val_loss,
        tokens=result.tokens,
        seconds=result.seconds,
    )


def _progress(records: list[metrics.Record]) -> dict[str, Any]:
    """How far a run without a result has come."""
    updates = [record for record in records if "loss" in record]
    losses = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    last: metrics.Record = updates[-1] if updates else {"step": 0, "tokens": 0}
    return {
        "step": last["step"],
        "train_loss": last.get("loss"),
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
        "tokens": last.get("tokens"),
        "seconds": sum(record.get("step_seconds") or 0.0 for record in updates),
    }


def _parameters(run: RunDirectory) -> int | None:
    """The number of parameters, from the initial weights' shapes in environment.json."""
    if not run.environment.is_file():
        return None
    tree = read_json(run.environment, dict[str, Any])
    try:
        return sum(math.prod(each["shape"]) for each in tree["initial_weights"].values())
    except (KeyError, TypeError, AttributeError):
        return None  # written by an earlier version


def read_options(run: RunDirectory) -> dict[str, Any]:
    """The options of a run by dotted path, without the checks of `load`.

    An option that is newer than the run has today's default. This takes a tenth of the time of
    `load`, since a section that several runs have in common is parsed only once.

    Raises:
        InputError: config.yaml is missing or damaged.
    """
    path = run.config
    if not path.is_file():
        what = "is not a run (no config.yaml)" if run.path.is_dir() else "no such directory"
        raise InputError(f"{run.path}: {what}")
    with reading(path):
        text = decode(read_small(path, MAX_BYTES), str(path))
    options = dict(_defaults())
    try:
        for section in re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE):  # at each top-level key
            options |= _section(section)
    except InputError:
        read_yaml(path)  # its message has the right line
        raise InputError(f"{path}: is damaged") from None
    number = {"training.steps": int, "optimizer.learning_rate": int | float}
    if not all(isinstance(options[key], kind) for key, kind in number.items()):
        raise InputError(f"{path}: is damaged")
    return options


@functools.lru_cache(maxsize=4096)
def _section(text: str) -> dict[str, Any]:
    """The options in one top-level key of a config."""
    tree = parse_yaml(text, "")
    if tree is not None and not isinstance(tree, dict):
        raise InputError
    return dict(leaves(tree or {}))


@functools.cache
def _defaults() -> dict[str, Any]:
    return dict(leaves(Config().model_dump(mode="json")))


def _comparison(path: Path, name: str) -> RunSummary:
    """The cells of a comparison together: sums and ranges, without reading their metrics."""
    results, statuses = [], Counter[str]()
    for cell in find(path / "cells"):
        run = RunDirectory(cell)
        try:
            result = run.read_result()
        except InputError:
            statuses["damaged"] += 1
            continue
        locked = result is None and is_locked(cell)
        statuses["running" if locked else result.status if result else "interrupted"] += 1
        results += [] if result is None else [result]
    count = sum(statuses.values())
    complete = (path / "summary.json").is_file() and not {"running", "interrupted"} & set(statuses)
    losses = [r.best_val_loss for r in results if r.best_val_loss is not None]
    seconds = sum(result.seconds for result in results)
    note = [
        f"{count} cell{'' if count == 1 else 's'}"
        + (": " if count else "")
        + ", ".join(f"{n} {status}" for status, n in statuses.items()),
        *(
            [f"best losses {format_loss(min(losses))} to {format_loss(max(losses))}"]
            if losses
            else []
        ),
        f"{duration(seconds)} in all",
    ]
    return RunSummary(
        name,
        path,
        "running" if is_locked(path) else "finished" if complete else "interrupted",
        best_val_loss=min(losses, default=None),
        tokens=sum(result.tokens for result in results),
        seconds=seconds,
        note="; ".join(note),
    )
