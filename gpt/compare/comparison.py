"""A comparison from beginning to end: grid -> cells -> runs -> summary -> report.

    runs/NAME/
      grid.yaml       the grid, its base spelt out: it alone reproduces the comparison
      command.json    the commands that ran it, and when
      cells/CELL/     a run directory each
      lost.json       cells that ended without a result, and why; only if there are any
      probes.json     the networks at their start
      cells.csv       one row a cell
      summary.json    arms, contrasts, verdict
      report.html, report.md, figures/

A directory belongs to one grid: its contrast was registered there before the runs.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gpt.compare import grid as grids
from gpt.compare.estimate import Estimate, check_affordable, check_cells, estimate, free_bytes
from gpt.compare.grid import Cell, Grid
from gpt.compare.outcomes import Outcome, csv_rows, read_outcome
from gpt.compare.report import Command, read_commands, write_report
from gpt.compare.runner import Task, has_ended, read_lost, run_cells, tasks
from gpt.compare.starts import Start, measure_starts, read_starts
from gpt.compare.summary import Summary, summarize
from gpt.config import DataConfig, read_yaml
from gpt.data import preparation
from gpt.errors import InputError, printable
from gpt.io.console import Console, duration
from gpt.io.files import is_partial, lock_directory, refuse_links, write_text
from gpt.io.wait import interruptible
from gpt.run.directory import command_line

STOPPED = "stopped; cells that have ended are saved, and the same command continues"


def compare(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    beside: Path | None = None,
) -> Summary | None:
    """Run what is missing of a comparison, and write its report.

    Args:
        workers: processes.
        beside: see `report`.

    Returns:
        The summary; None if `stop` came true, and then nothing is reported.

    Raises:
        InputError: the directory holds another comparison, or the grid cannot be run here.
        StoppedError: `stop` came true before the cells or after them.
    """
    check_cells(cells, probes=grid.probes)
    check_directory(grid, directory)
    with lock_directory(directory, f"{directory}: another process runs this comparison"):
        before = directory / "grid.yaml"
        if before.is_file() and read_yaml(before).get("keep_checkpoints"):  # what was kept stays
            grid = grid.model_copy(update={"keep_checkpoints": True})
        vocabulary = [
            preparation.prepare(data, console, stop).encoding.n_vocab for data in _datas(cells)
        ]
        todo = tasks([cell for cell in cells if not has_ended(directory, cell)], grid.runner)
        if todo:
            estimated = interruptible(
                lambda stop: estimate(
                    todo, max(vocabulary), workers, keep_checkpoints=grid.keep_checkpoints
                ),
                stop,
                STOPPED,
            )
            check_affordable(estimated, directory, grid.hours)
            console.say(describe(grid, cells, directory, estimated, todo, workers))
        else:
            console.say(f"{directory}: all {len(cells)} cells have ended before; reporting again")
        write_text(directory / "grid.yaml", grid.to_yaml())
        if todo:
            _note_command(directory)
        finished = run_cells(
            cells,
            directory,
            runner=grid.runner,
            workers=workers,
            keep_checkpoints=grid.keep_checkpoints,
            console=console,
            stop=stop,
            verdict=lambda cell: _said(read_outcome(cell, directory)),
        )
        if not finished:
            return None
        if grid.probes and not (directory / "probes.json").is_file():
            console.say("measuring the networks at their start, half a minute or more")
            starts = interruptible(lambda stop: measure_starts(cells, stop), stop, STOPPED)
            if starts is None:
                return None
            write_text(directory / "probes.json", _starts_json(starts))
        return interruptible(lambda stop: report(grid, cells, directory, beside), stop, STOPPED)


def report(
    grid: Grid, cells: Sequence[Cell], directory: Path, beside: Path | None = None
) -> Summary:
    """Write cells.csv, summary.json, report.html, report.md and figures/ from what was run.

    Args:
        beside: another comparison directory, to be shown next to this one.

    Raises:
        InputError: no cell has a result, a file is damaged, or there is a symbolic link.
    """
    refuse_links(directory)
    outcomes = read_outcomes(cells, directory)
    starts = read_starts(directory, [arm.name for arm in grid.all_arms()])
    commands = read_commands(directory)
    summary = summarize(grid, outcomes)
    other = None if beside is None else (beside, read_comparison(beside))
    write_text(directory / "cells.csv", _to_csv(csv_rows(outcomes)))
    write_text(directory / "summary.json", _to_json(asdict(summary)))
    write_report(directory, grid, summary, outcomes, starts, commands, other)
    return summary


def read_comparison(directory: Path) -> tuple[Grid, Summary, list[Outcome]]:
    """A comparison from its directory alone.

    Raises:
        InputError: it is none, or has no result yet.
    """
    if not (directory / "grid.yaml").is_file():
        raise InputError(f"{directory}: holds no comparison (no grid.yaml)")
    grid, cells = grids.load(directory / "grid.yaml")
    outcomes = read_outcomes(cells, directory)
    return grid, summarize(grid, outcomes), outcomes


def read_outcomes(cells: Sequence[Cell], directory: Path) -> list[Outcome]:
    """All cells' outcomes; at least one has a result.

    Raises:
        InputError: none has.
    """
    lost = read_lost(directory)
    outcomes = [read_outcome(cell, directory, lost.get(cell.id)) for cell in cells]
    if not any(outcome.verdict is not None for outcome in outcomes):
        raise InputError(f"{directory}: no cell has a result yet")
    return outcomes


def check_directory(grid: Grid, directory: Path) -> None:
    """Refuse a directory that belongs to something else.

    Raises:
        InputError: it holds another grid, or no comparison.
    """
    path = directory / "grid.yaml"
    if not path.is_file():
        if directory.exists() and (
            not directory.is_dir() or not all(map(is_partial, directory.iterdir()))
        ):
            raise InputError(f"{directory}: exists and is no comparison; choose another --out-dir")
        return
    mine, theirs = yaml.safe_load(grid.to_yaml()), read_yaml(path)
    different = [
        key for key in {**theirs, **mine} if key not in FREE and mine.get(key) != theirs.get(key)
    ]
    if different:
        raise InputError(
            f"{directory}: holds a comparison of another grid (other {', '.join(different)}), "
            "and what was registered before its runs is not changed after;\n"
            "choose another --out-dir"
        )


# Of a grid, what may be changed in its directory.
FREE = {"hours", "keep_checkpoints", "probes", "runner"}


def dry_run(grid: Grid, cells: Sequence[Cell], directory: Path, workers: int) -> str:
    """What would be run, and its cells.

    Raises:
        InputError: as `compare`.
    """
    check_cells(cells, probes=grid.probes)
    check_directory(grid, directory)
    vocabulary = max(preparation.vocab_size(data) for data in _datas(cells))
    todo = [cell for cell in cells if not has_ended(directory, cell)]
    planned = tasks(todo, grid.runner)
    estimated = estimate(planned, vocabulary, workers, keep_checkpoints=grid.keep_checkpoints)
    check_affordable(estimated, directory, grid.hours)
    names = {cell.id for cell in todo}
    lines = [f"  {cell.id}{'' if cell.id in names else '  (has ended)'}" for cell in cells]
    return "\n".join([describe(grid, cells, directory, estimated, planned, workers), *lines])


def told(summary: Summary, directory: Path) -> str:
    """The verdict, and where the report is."""
    lines = [*summary.verdict]
    if summary.lost:
        counts = Counter(summary.lost.values())
        some = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append(
            f"{len(summary.lost)} of {summary.planned} cells have no result ({some}); "
            "started again, they are tried again"
        )
    if summary.match.exceptions:
        lines.append(f"NOT MATCHED: {summary.match.exceptions[0]}")
    return "\n".join([*lines, f"  report  {directory / 'report.html'}"])


def describe(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    estimated: Estimate,
    planned: Sequence[Task],
    workers: int,
) -> str:
    """A few lines on what is about to happen."""
    arms = grid.all_arms()
    done = len(cells) - estimated.cells
    rows = {
        "question": grid.contrast.question if grid.contrast else "none is registered",
        "arms": "; ".join(arm.name for arm in arms),
        "cells": f"{len(cells)}: {len(arms)} arms, {len(grid.seeds)} seeds"
        + "".join(f", {len(values)} x {axis}" for axis, values in grid.grid.items())
        + (f"; {done} have ended before" if done else ""),
        "tokens": f"{estimated.tokens:,} to train on, {estimated.flops:.2g} FLOPs",
        "time": f"about {duration(estimated.seconds)} with {_hands(planned, workers)}, "
        "by a short timing here; start"
        + (", probes (probes: false skips them)" if grid.probes else "")
        + " and report come on top",
        "disk": f"at most {estimated.disk / 1e6:,.0f} MB of "
        f"{free_bytes(directory) / 1e9:,.0f} GB free",
        "directory": str(directory),
    }
    slow = too_long_warmups(cells)
    if slow:
        rows["warm-up"] = f"is longer than the run in {', '.join(slow)}: no full rate there"
    return "\n".join([grid.title, *(f"  {name:<10} {text}" for name, text in rows.items())])


def _hands(planned: Sequence[Task], workers: int) -> str:
    """Who trains the cells: 2 workers; 36 cells as one; both."""
    groups = [len(task.cells) for task in planned if task.as_one]
    hands = []
    if groups:
        of_each = f"{len(groups)} x " if len(groups) > 1 else ""
        hands.append(f"{of_each}up to {max(groups)} cells as one")
    if len(planned) > len(groups):
        hands.append(f"{workers} worker{'s' if workers > 1 else ''}")
    return " and ".join(hands)


def too_long_warmups(cells: Sequence[Cell]) -> list[str]:
    """Arms that never come to their full rate, the one that they are shown at."""
    arms = {
        cell.arm: None
        for cell in cells
        if cell.config.schedule.warmup != "none"
        and cell.config.schedule.warmup_steps >= cell.config.training.steps
    }
    return list(arms)


def _datas(cells: Sequence[Cell]) -> list[DataConfig]:
    """The corpora that cells read, once each."""
    datas: list[DataConfig] = []
    for cell in cells:
        if cell.config.data not in datas:
            datas.append(cell.config.data)
    return datas


def _said(outcome: Outcome) -> str:
    """A cell's verdict in a few words."""
    found = outcome.verdict
    assert found is not None
    step = f" at step {found.step}" if found.status == "diverged" else ""
    loss = "" if found.final_val_loss is None else f", {found.final_val_loss:.3f}"
    return f"{found.status}{step}{loss}"


def _starts_json(starts: Sequence[Start]) -> str:
    return json.dumps([asdict(start) for start in starts], indent=2) + "\n"


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    most = max(rows, key=len)  # a cell without a result has fewer
    columns = list(dict.fromkeys([*most, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerow({column: _csv_text(column) for column in columns})
    writer.writerows({key: _csv_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_text(value: Any) -> Any:
    """Text in one line, and behind an apostrophe where a spreadsheet would run it as a formula."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value


def _to_json(tree: dict[str, Any]) -> str:
    """Strict JSON: the open end of an interval, which is infinite here, is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(tree), indent=2, allow_nan=False) + "\n"


def _note_command(directory: Path) -> None:
    """Append this command line to command.json."""
    now = Command(command_line(), datetime.now(UTC).isoformat(timespec="seconds"))
    commands = [asdict(command) for command in (*read_commands(directory), now)]
    write_text(directory / "command.json", json.dumps(commands, indent=2) + "\n")
