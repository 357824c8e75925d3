"""What a comparison prints: what it is about to run, how each cell ended, what it concluded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpt.compare.analysis.headline import matching_text, mean_table
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import Summary
from gpt.compare.estimate import Estimate, free_bytes
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell, Grid
from gpt.io.console import duration, labeled

MOST_ROWS = 50  # of a table in the terminal


def describe(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    estimated: Estimate,
    tasks: Sequence[Task],
    workers: int,
    with_result: int,
) -> str:
    """The comparison that is about to run, in a few lines.

    Args:
        cells: of the grid; where it searches, the first cell of each search.
        tasks: the first ones to run.
        with_result: how many cells have a result.
    """
    arms, search = grid.all_arms(), grid.search
    most = "up to " if estimated.cells > sum(len(task.cells) for task in tasks) else ""
    every = len(grid.seeds) * sum(
        math.prod(map(len, {**grid.grid, **arm.axes}.values())) for arm in arms
    )
    questions = " ".join(contrast.question for contrast in grid.contrasts)
    rows = {
        **({"question": questions} if questions else {}),
        "arms": "; ".join(arm.name for arm in arms),
        "cells": f"{most}{with_result + estimated.cells}: "
        f"{_count(len(arms), 'arm')}, {_count(len(grid.seeds), 'seed')}"
        + (
            f" (stops after {grid.first_stage} if they answer the first contrast)"
            if grid.first_stage
            else ""
        )
        + "".join(
            f", {_count(len(values), 'value')} of {axis}"
            for axis, values in grid.grid.items()
            if not any(axis in arm.axes for arm in arms)  # which have values of their own
        )
        + (f", up to {search.most_runs} rates of each, chosen by a search" if search else "")
        + (f"; {_count(every - len(cells), 'combination')} left out" if len(cells) < every else "")
        + (f"; {with_result} have a result already" if with_result else ""),
        "tokens": f"{most}{estimated.tokens:,} to train on, {estimated.flops:.2g} FLOPs",
        "time": (most or "about ")
        + f"{duration(estimated.seconds)} with {format_workers(tasks, workers)}, "
        "estimated from a short benchmark on this machine; process start-up"
        + (", probes (probes: false skips them)" if grid.probes else "")
        + " and report not included",
        "disk": f"at most {estimated.disk / 1e6:,.0f} MB of "
        f"{free_bytes(directory) / 1e9:,.0f} GB free",
    }
    slow = too_long_warmups(cells)
    if slow:
        rows["warm-up"] = f"lasts as long as the run, or longer, in {'; '.join(slow)}"
    return "\n".join([grid.title, *labeled(rows.items()), f"  directory  {directory}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_workers(tasks: Sequence[Task], workers: int) -> str:
    """`2 workers`, `3 batches of up to 36 cells`, or both."""
    batches = [len(task.cells) for task in tasks if task.batched]
    parts = []
    if batches:
        batch = f"{len(batches)} batches" if len(batches) > 1 else "a batch"
        parts.append(f"{batch} of up to {max(batches)} cells")
    if len(tasks) > len(batches):
        parts.append(f"{workers} worker{'s' if workers > 1 else ''}")
    return " and ".join(parts)


def too_long_warmups(cells: Sequence[Cell]) -> list[str]:
    """Arms whose warm-up lasts at least as long as the run."""
    arms = {
        cell.arm: None
        for cell in cells
        if cell.config.schedule.effective_warmup_steps >= cell.config.training.steps
    }
    return list(arms)


def format_outcome(outcome: Outcome) -> str:
    """`trained, 2.345` or `diverged at step 17`."""
    found = outcome.verdict
    assert found is not None
    step = f" at step {found.step}" if found.status == "diverged" else ""
    loss = "" if found.final_val_loss is None else f", {found.final_val_loss:.3f}"
    return f"{found.status}{step}{loss}"


def format_summary(summary: Summary, directory: Path) -> str:
    """Each question with its answer, the mean losses, what is missing, and where the report is."""
    lines = []
    for number, sentence in enumerate(summary.conclusions):
        result = summary.contrasts[number] if number < len(summary.contrasts) else None
        if result is not None:
            lines.append(result.question)
        lines.append(f"  {sentence}" if result is not None else sentence)
    lines += ["", *format_means(summary), ""]
    if summary.lost:
        counts = Counter(summary.lost.values())
        by_status = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append(
            f"{len(summary.lost)} of {summary.planned} cells have no result ({by_status}); "
            "run the same command to retry them"
        )
    lines += filter(None, [summary.stages, matching_text(summary.match)])
    return "\n".join([*lines, f"  report  {directory / 'report.html'}"])


def format_means(summary: Summary) -> list[str]:
    """A table of mean and standard deviation of the final loss by arm and rate."""
    rows = [("arm", "rate", "mean ± sd", "failed"), *mean_table(summary)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    left_out = len(lines) - MOST_ROWS
    more = [f"... {left_out} more rows in report.md"] if left_out > 0 else []
    return [*lines[:MOST_ROWS], *more]
