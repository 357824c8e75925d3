"""A comparison from beginning to end: grid -> cells -> runs -> summary -> report.

    runs/NAME/
      grid.yaml       the grid with its base included: it alone reproduces the comparison
      command.json    the commands that ran it, and when
      registration.json  seeds, hash of seeds and contrasts, before first result; later additions
      cells/CELL/     a run directory each
      lost.json       cells without a result, and why; only if there are any
      cluster/        of tasks that run on other machines (execution/remote.py), until they end
      search.json     the runs of each search, and what was decided after each; only of searches
      probes.json     measurements of the networks at initialization
      cells.csv       one row per cell
      summary.json    arms, contrasts, pairs, verdict
      report.html, report.md, figures/

A directory belongs to one grid, which can grow: `extend` adds arms, rates, seeds or contrasts, and
`reuse` copies finished runs of other comparisons. How many results were known then is recorded.

A grid that searches for thresholds has only the first cell of each search. The rest are chosen in
rounds: every search proposes its next cell, all of these run, and so on until none proposes any. A
grid with a first stage has two rounds; its first contrast decides whether there is a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gpt.compare import grid as grids
from gpt.compare import registration
from gpt.compare.analysis.outcomes import NO_RESULT, Outcome, read_outcome
from gpt.compare.analysis.results import VERSION, Summary
from gpt.compare.analysis.searches import choose, has_stopped, read_outcomes, write_log
from gpt.compare.analysis.summary import summarize
from gpt.compare.estimate import check_affordable, check_cells, estimate
from gpt.compare.execution.cell_runs import read_lost
from gpt.compare.execution.engine import Engine
from gpt.compare.execution.runner import run_tasks
from gpt.compare.execution.tasks import Task, make_tasks
from gpt.compare.grid import Cell, Grid
from gpt.compare.init_probes import measure_init_probes, read_init_probes, write_init_probes
from gpt.compare.messages import describe, format_outcome
from gpt.compare.registration import Growth
from gpt.compare.report import write_report
from gpt.compare.report.cells_csv import csv_text
from gpt.compare.reuse import copy_run, find_reusable
from gpt.config import DataConfig, read_yaml
from gpt.data import preparation
from gpt.errors import InputError, StoppedError
from gpt.io.console import Console
from gpt.io.files import (
    is_partial,
    lock_directory,
    lock_file,
    read_json,
    refuse_links,
    write_text,
)
from gpt.io.wait import interruptible
from gpt.run.directory import command_line

STOPPED = "interrupted: the cells are saved; the same command resumes"
CHANGEABLE = {"hours", "keep_checkpoints", "probes", "runner"}  # of a grid that has been run
REPORT_LOCK = ".report.lock"  # locked while a process writes the report
REPORT_WAIT = 600.0  # seconds to wait for another process that writes the report
Result = TypeVar("Result")


def compare(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    *,
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    beside: Path | None = None,
    extend: bool = False,
    reuse: Sequence[Path] = (),
    engine: Engine | None = None,
) -> Summary:
    """Run the missing cells of a comparison, and write its report.

    Args:
        beside: see `report`.
        cells, workers, extend, reuse, engine: see `run`.

    Raises:
        InputError, StoppedError: as `run`.
    """

    def finish(grid: Grid) -> Summary:
        return report(grid, cells, directory, beside, workers=workers, wait=REPORT_WAIT)

    return run(
        grid,
        cells,
        directory,
        finish,
        workers=workers,
        console=console,
        stop=stop,
        extend=extend,
        reuse=reuse,
        engine=engine,
    )


def run(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    finish: Callable[[Grid], Result],
    *,
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    extend: bool = False,
    reuse: Sequence[Path] = (),
    engine: Engine | None = None,
) -> Result:
    """Run the missing cells of a grid, and return the result of `finish`, such as a report.

    Args:
        cells: of the grid; where it searches, the first cell of each search.
        finish: called with the grid once all cells were tried.
        workers: how many tasks run at once, at most.
        extend: see `check_directory`.
        reuse: other comparisons' directories, whose finished runs are copied where they fit.
        engine: where the tasks run; by default in processes on this machine.

    Raises:
        InputError: the directory holds another comparison, or the grid cannot be run here.
        StoppedError: `stop` became true; `finish` is not called, or was interrupted.
    """
    check_cells(cells, probes=grid.probes)
    check_reuse(grid, reuse)
    check_directory(grid, cells, directory, extend=extend)  # before anything is made
    with lock_directory(directory, f"{directory}: another process runs this comparison"):
        growth = check_directory(grid, cells, directory, extend=extend)
        copies = find_reusable(cells, directory, reuse)
        before = directory / "grid.yaml"
        if before.is_file() and read_yaml(before).get("keep_checkpoints"):
            grid = grid.model_copy(update={"keep_checkpoints": True})  # do not delete kept ones
        vocabulary = [
            preparation.prepare(data, console, stop).encoding.n_vocab for data in _datas(cells)
        ]
        copied = {name for names in copies.values() for name in names}
        known: dict[str, Outcome] = {}
        chosen, missing = choose(grid, cells, directory, {}, known)  # lost ones are tried again
        results = len(chosen) - len(missing)
        missing = [cell for cell in missing if cell.id not in copied]
        tasks = make_tasks(missing, grid.runner)
        if tasks:
            possible = possible_tasks(grid, cells, chosen, missing)
            estimated = interruptible(
                lambda stop: estimate(
                    possible, max(vocabulary), workers, keep_checkpoints=grid.keep_checkpoints
                ),
                stop,
                STOPPED,
            )
            check_affordable(estimated, directory, grid.hours)
            finished = len(chosen) - len(missing)
            console.say(describe(grid, cells, directory, estimated, tasks, workers, finished))
            console.warn(registration.cautions(grid, growth, results))
        elif not copied:
            console.say(f"{directory}: all {len(chosen)} cells have a result; reporting again")
        trained = {cell.id for cell in (*missing, *growth.cells)} - copied
        registration.register(directory, grid, cells, growth, trained, results)
        new = {cell.id for cell in growth.cells}
        new_arms = {cell.arm for cell in growth.cells} - {c.arm for c in cells if c.id not in new}
        if grid.probes and new_arms:
            (directory / "probes.json").unlink(missing_ok=True)  # it lacks the new arms
        write_text(directory / "grid.yaml", grid.to_yaml())
        if tasks or copied:
            append_command(directory)
        _copy_runs(copies, grid, cells, directory, results, console, stop)
        _train(grid, cells, directory, tasks, chosen, known, workers, console, stop, engine)
        if grid.probes and not (directory / "probes.json").is_file():
            _probe(cells, directory, console, stop)
        return interruptible(lambda stop: finish(grid), stop, STOPPED)


def _copy_runs(
    copies: Mapping[Path, Mapping[str, Path]],
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    results: int,
    console: Console,
    stop: Callable[[], bool],
) -> None:
    """Copy finished runs of other comparisons, and record that.

    Args:
        copies: see `find_reusable`.
        results: how many cells had a result.

    Raises:
        StoppedError: `stop` became true.
    """
    for source, runs in copies.items():
        registration.register_copies(directory, grid, list(runs), source, results)
        for cell in cells:
            if stop():
                raise StoppedError(STOPPED)
            if cell.id in runs:
                copy_run(runs[cell.id], cell, directory)
        console.say(f"{registration.count(len(runs))} copied from {source}")


def _train(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    tasks: Sequence[Task],
    chosen: Sequence[Cell],
    known: dict[str, Outcome],
    workers: int,
    console: Console,
    stop: Callable[[], bool],
    engine: Engine | None,
) -> None:
    """Run the tasks, and those of later rounds, which depend on the results.

    Args:
        tasks, chosen, known: of the first round; see `choose`.

    Raises:
        StoppedError: `stop` became true.
    """
    for number in range(grid.rounds):
        if number > 0:
            chosen, missing = choose(grid, cells, directory, read_lost(directory), known)
            tasks = make_tasks(missing, grid.runner)
            if not tasks:
                return
        done = run_tasks(
            tasks,
            chosen,
            directory,
            workers=workers,
            keep_checkpoints=grid.keep_checkpoints,
            console=console,
            stop=stop,
            describe=lambda cell: format_outcome(read_outcome(cell, directory)),
            engine=engine,
        )
        if not done:
            raise StoppedError(STOPPED)


def possible_tasks(
    grid: Grid, cells: Sequence[Cell], chosen: Sequence[Cell], missing: Sequence[Cell]
) -> list[Task]:
    """The tasks of the missing cells, and of all that may follow: a second stage, or searches.

    Args:
        cells: of the grid.
        chosen: those so far.
    """
    if grid.search is None:
        known = {cell.id for cell in chosen}
        later = [cell for cell in cells if missing and cell.id not in known]
        return make_tasks([*missing, *later], grid.runner)
    tried = Counter(map(_search_of, chosen))
    rounds = [
        [cell for cell in missing if tried[_search_of(cell)] + number <= grid.rounds]
        for number in range(grid.rounds)
    ]
    return [task for cells in rounds for task in make_tasks(cells, grid.runner)]


def _search_of(cell: Cell) -> tuple[str, str, int]:
    return cell.arm, cell.setting_text, cell.config.seed


def check_reuse(grid: Grid, sources: Sequence[Path]) -> None:
    """Refuse to copy runs into searches and stages, whose cells are not known beforehand.

    Raises:
        InputError: the grid has a search or stages, and there are runs to copy.
    """
    if grid.rounds > 1 and sources:
        what = "a search" if grid.search else "a comparison with a first stage"
        raise InputError(f"--reuse: {what} chooses its cells as it runs, so it cannot reuse runs")


def _probe(
    cells: Sequence[Cell], directory: Path, console: Console, stop: Callable[[], bool]
) -> None:
    """Measure the networks at initialization, and write probes.json.

    Raises:
        StoppedError: `stop` became true.
    """
    console.say("all runs have ended; measuring the networks at initialization:")
    stopped = (
        "interrupted: all runs are saved; the same command measures the networks again, and "
        "--report-only reports without"
    )
    try:
        init_probes = interruptible(
            lambda stop: measure_init_probes(cells, stop, console), stop, stopped
        )
    finally:
        console.close()
    if init_probes is None:
        raise StoppedError(stopped)
    write_init_probes(directory, init_probes)


@contextlib.contextmanager
def writing_report(directory: Path, wait: float) -> Iterator[None]:
    """A context in which no other process writes the report of a directory.

    Args:
        wait: seconds to wait for one that does.

    Raises:
        InputError: there is no directory, there is a symbolic link in it, or the wait was in vain.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: {NO_RESULT}")
    refuse_links(directory)
    busy = f"{directory}: another process is writing its report; run this again in a minute"
    with lock_file(directory / REPORT_LOCK, busy, wait):
        yield


def report(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    beside: Path | None = None,
    *,
    workers: int = 1,
    wait: float = 0.0,
) -> Summary:
    """Write cells.csv, summary.json, report.html, report.md and figures/ from finished cells.

    Other cells may be running.

    Args:
        beside: another comparison directory, to be shown next to this one.
        workers: how many would train further seeds, for the estimate of their time.
        wait: seconds to wait for another process that writes this report.

    Raises:
        InputError: no cell has a result, a file is damaged, there is a symbolic link, or another
            process writes this report.
    """
    with writing_report(directory, wait):
        every = read_outcomes(grid, cells, directory)
        outcomes = [outcome for outcome in every if not outcome.cell.longer]
        init_probes = read_init_probes(directory, [arm.name for arm in grid.all_arms()])
        commands = [f"{each.began}  {shlex.join(each.argv)}" for each in read_commands(directory)]
        registered = registration.registered(directory, grid, [o.cell for o in outcomes])
        summary = summarize(grid, every, registered, workers)
        other = None if beside is None else (beside, read_comparison(beside))
        write_text(directory / "cells.csv", csv_text(outcomes))
        write_log(directory, grid, every)
        results = {"version": VERSION, **asdict(summary)}
        results["verdict"] = results.pop("conclusions")  # the key that the file has always had
        write_text(directory / "summary.json", to_json(results))
        write_report(directory, grid, summary, outcomes, init_probes, commands, other)
        return summary


def to_json(tree: dict[str, Any]) -> str:
    """Strict JSON, with null for the infinite end of an open interval."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(tree), indent=2, allow_nan=False) + "\n"


def read_comparison(directory: Path) -> tuple[Grid, Summary, list[Outcome]]:
    """A comparison from its directory alone.

    Raises:
        InputError: it does not hold a comparison, or none of its cells has a result.
    """
    if not (directory / "grid.yaml").is_file():
        raise InputError(f"{directory}: is not a comparison directory (no grid.yaml)")
    grid, cells = grids.load(directory / "grid.yaml")
    outcomes = read_outcomes(grid, cells, directory)
    registered = registration.registered(directory, grid, [o.cell for o in outcomes])
    summary = summarize(grid, outcomes, registered)
    return grid, summary, [outcome for outcome in outcomes if not outcome.cell.longer]


def check_directory(
    grid: Grid, cells: Sequence[Cell], directory: Path, *, extend: bool = False
) -> Growth:
    """Refuse a directory that belongs to something else.

    Args:
        extend: whether the grid may add to the directory's grid.

    Returns:
        What is added.

    Raises:
        InputError: it holds another grid, or something that is not a comparison.
    """
    path = directory / "grid.yaml"
    if not path.is_file():
        if directory.exists() and (
            not directory.is_dir()
            or not all(p.name == "registration.json" or is_partial(p) for p in directory.iterdir())
        ):
            raise InputError(
                f"{directory}: exists and is not a comparison; choose another --out-dir"
            )
        return Growth()
    mine, theirs = yaml.safe_load(grid.to_yaml()), read_yaml(path)
    different = [
        key
        for key in {**theirs, **mine}
        if key not in CHANGEABLE and mine.get(key) != theirs.get(key)
    ]
    if not different:
        return Growth()
    holds = f"{directory}: holds a comparison of another grid (different {', '.join(different)})"
    before = grids.load(path)
    try:
        registration.check_growth(before, (grid, list(cells)))
    except InputError as error:
        raise InputError(
            f"{holds}, and after its runs a grid can only grow: {error};\nchoose another --out-dir"
        ) from None
    if set(grid.seeds) != set(before[0].seeds) and has_stopped(*before, directory):
        raise InputError(
            f"{holds}: its first stage answered the first contrast,\nso more seeds would not run; "
            "choose another --out-dir"
        )
    known = {cell.id for cell in before[1]}
    added = [cell for cell in cells if cell.id not in known]
    growth = Growth(added, len(grid.contrasts) - len(before[0].contrasts))
    if not extend:
        more = registration.added_text(len(added), growth.contrasts) or "the changes"
        raise InputError(f"{holds};\n--extend adds {more} to it; or choose another --out-dir")
    return growth


def dry_run(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    workers: int,
    *,
    extend: bool = False,
    reuse: Sequence[Path] = (),
    engine: Engine | None = None,
) -> str:
    """A description of what would be run, the list of cells, and what the engine would submit.

    Args:
        extend, reuse, engine: as for `compare`.

    Raises:
        InputError: as `compare`.
    """
    check_cells(cells, probes=grid.probes)
    check_reuse(grid, reuse)
    growth = check_directory(grid, cells, directory, extend=extend)
    copied = set().union(*find_reusable(cells, directory, reuse).values())
    vocabulary = max(preparation.vocab_size(data) for data in _datas(cells))
    chosen, missing = choose(grid, cells, directory, {}, {})
    missing = [cell for cell in missing if cell.id not in copied]
    tasks = make_tasks(missing, grid.runner)
    possible = possible_tasks(grid, cells, chosen, missing)
    estimated = estimate(possible, vocabulary, workers, keep_checkpoints=grid.keep_checkpoints)
    check_affordable(estimated, directory, grid.hours)
    names = {cell.id for cell in missing}
    lines = [
        f"  {cell.id}"
        + ("  (is copied)" if cell.id in copied else "" if cell.id in names else "  (has a result)")
        for cell in chosen
    ]
    if grid.rounds > 1 and estimated.cells > len(missing):
        who = "searches choose" if grid.search else "run unless the first stage ends the comparison"
        lines.append(f"  and up to {estimated.cells - len(missing)} more, which {who}")
    before = registration.read_registration(directory)
    if before is None:
        sha256 = registration.fingerprint(grid.contrasts, grid.seeds, grid.search, grid.first_stage)
        also = ", and of the search" if grid.search else ""
        also += ", and of the first stage" if grid.first_stage else ""
        lines.append(f"SHA-256 of the contrasts and seeds{also}: {sha256}")
    else:
        lines.append(f"registered on {before.time}: SHA-256 {before.sha256}")
    finished = len(chosen) - len(missing)
    lines += [f"warning: {line}" for line in registration.cautions(grid, growth, finished)]
    described = describe(grid, cells, directory, estimated, tasks, workers, finished)
    submitted = engine.preview(tasks, directory, workers) if engine is not None and tasks else ""
    return "\n".join([described, *lines, *([submitted] if submitted else [])])


@dataclass(frozen=True)
class Command:
    """A command line that ran a comparison, and when it began, in ISO 8601."""

    argv: list[str]
    began: str


def read_commands(directory: Path) -> list[Command]:
    """The contents of command.json; empty if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = directory / "command.json"
    if not path.is_file():
        return []
    return read_json(path, list[Command], "delete it to continue")


def append_command(directory: Path) -> None:
    """Append this process's command line to command.json."""
    now = Command(command_line(), datetime.now(UTC).isoformat(timespec="seconds"))
    commands = [asdict(command) for command in (*read_commands(directory), now)]
    write_text(directory / "command.json", json.dumps(commands, indent=2) + "\n")


def _datas(cells: Sequence[Cell]) -> list[DataConfig]:
    """The corpora that cells read, once each."""
    datas: list[DataConfig] = []
    for cell in cells:
        if cell.config.data not in datas:
            datas.append(cell.config.data)
    return datas
