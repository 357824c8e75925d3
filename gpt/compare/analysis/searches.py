"""The cells of a comparison so far, and searches: their thresholds and their log.

    DIR/search.json   for each search its runs in their order, and what was decided after each

Searches (gpt/compare/search.py) and stages (stages.py) decide what to run next from nothing but the
outcomes so far, so every decision can be repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt.compare.analysis.outcomes import NO_RESULT, Outcome, read_outcome
from gpt.compare.analysis.results import SearchResult
from gpt.compare.analysis.stages import begun, decide
from gpt.compare.execution.cell_runs import CellError, has_result, read_lost
from gpt.compare.grid import Cell, Grid, Search
from gpt.compare.search import Bracket, Ending, Next, bracket, next_step
from gpt.errors import InputError
from gpt.io.files import write_text


def read_outcomes(grid: Grid, cells: Sequence[Cell], directory: Path) -> list[Outcome]:
    """All outcomes of a comparison so far, at least one of which is a result.

    Args:
        cells: of the grid; where it searches, the first cell of each search.

    Raises:
        InputError: no cell has a result, or a file is damaged.
    """
    outcomes = _so_far(grid, cells, directory, read_lost(directory), {})
    if not any(outcome.verdict is not None for outcome in outcomes):
        raise InputError(f"{directory}: {NO_RESULT}")
    return outcomes


class Chosen(NamedTuple):
    """The cells of a comparison so far: all of them, and those that are to be trained."""

    cells: list[Cell]
    missing: list[Cell]


def choose(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    lost: Mapping[str, CellError],
    known: dict[str, Outcome],
) -> Chosen:
    """The cells of a grid: with two stages, of those that have begun; where it searches, those
    tried, and the next one of each search.

    Args:
        cells: see `read_outcomes`.
        lost: the errors of the cells that are not to be tried again, by their ids.
        known: outcomes that have been read, by the ids of their cells; those read now are added.

    Raises:
        InputError: a file is damaged.
    """
    if grid.rounds == 1:
        return Chosen([*cells], [c for c in cells if not has_result(directory, c)])
    outcomes = _so_far(grid, cells, directory, lost, known)
    return Chosen([o.cell for o in outcomes], [o.cell for o in outcomes if o.status == "missing"])


def has_stopped(grid: Grid, cells: Sequence[Cell], directory: Path) -> bool:
    """Whether a comparison has ended after its first stage.

    Args:
        cells: of the grid.

    Raises:
        InputError: a file is damaged.
    """
    if grid.first_stage is None:
        return False
    return decide(grid, [_read(cell, directory, {}, {}) for cell in cells]) == "answered"


def _so_far(
    grid: Grid,
    cells: Sequence[Cell],
    directory: Path,
    lost: Mapping[str, CellError],
    known: dict[str, Outcome],
) -> list[Outcome]:
    if grid.search is None:
        return begun(grid, [_read(cell, directory, lost, known) for cell in cells])
    return [o for cell in cells for o in follow(grid, cell, directory, lost, known)]


def _read(
    cell: Cell, directory: Path, lost: Mapping[str, CellError], known: dict[str, Outcome]
) -> Outcome:
    outcome = known.get(cell.id) or read_outcome(cell, directory, lost.get(cell.id))
    if outcome.verdict is not None:
        known[cell.id] = outcome
    return outcome


def follow(
    grid: Grid,
    start: Cell,
    directory: Path,
    lost: Mapping[str, CellError],
    known: dict[str, Outcome],
) -> list[Outcome]:
    """The outcomes of a search's runs in their order; the last is "missing" if it has not ended.

    Args:
        start: its first cell.
        lost, known: see `choose`.
    """
    assert grid.search is not None
    outcomes: list[Outcome] = []
    cell: Cell | None = start
    while cell is not None:
        outcomes.append(_read(cell, directory, lost, known))
        decisions = _decisions(grid.search, outcomes)
        if len(decisions) < len(outcomes):
            break
        step, _, longer = decisions[-1].following
        cell = None
        if step is not None:
            cell = grid.at_rate(start, grid.search.rate(step), longer=longer)
    return outcomes


class _Decision(NamedTuple):
    """What a search knows after a run, and does next."""

    endings: dict[int, Ending]  # by the steps of its runs
    following: Next


def _decisions(search: Search, outcomes: Sequence[Outcome]) -> list[_Decision]:
    """The decision after each run of a search; a run that is missing has none."""
    found: list[_Decision] = []
    endings: dict[int, Ending] = {}
    for outcome in outcomes:
        if outcome.status == "missing":
            break
        step = search.step(outcome.rate)
        endings = {**endings, step: ending(outcome)}
        left = search.most_runs - len(found) - 1
        following = next_step(endings, left, step, longer=outcome.cell.longer)
        found.append(_Decision(endings, following))
    return found


def ending(outcome: Outcome) -> Ending:
    """How a run that was tried ended, for its search."""
    if outcome.verdict is None:
        return "lost"
    if not outcome.failed:
        return "trained"
    return "slow" if outcome.too_slow else "failed"


def search_results(grid: Grid, outcomes: Sequence[Outcome]) -> tuple[SearchResult, ...]:
    """What each search has found; empty if the grid has none."""
    if grid.search is None:
        return ()
    return tuple(_result(grid.search, runs) for runs in _searches(outcomes))


def _searches(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """The outcomes of each search, in the order of its runs."""
    found: dict[tuple[str, str, int], list[Outcome]] = {}
    for outcome in outcomes:
        key = outcome.cell.arm, outcome.cell.setting_text, outcome.seed
        found.setdefault(key, []).append(outcome)
    return list(found.values())


def _result(search: Search, outcomes: Sequence[Outcome]) -> SearchResult:
    decisions = _decisions(search, outcomes)
    found, first = bracket(decisions[-1].endings if decisions else {}), outcomes[0]
    low, high = _ends(search, found)
    if found.bound == "below":
        low = None  # the run there was slow
    known = [math.log(end) for end in (low, high) if end is not None]
    return SearchResult(
        arm=first.cell.arm,
        setting=first.cell.setting_text,
        seed=first.seed,
        rate=math.exp(math.fsum(known) / len(known)) if known else None,
        low=low,
        high=high,
        bound=found.bound,
        monotone=found.monotone,
        runs=len(decisions),
        ended=decisions[-1].following.why if len(decisions) == len(outcomes) else "",
    )


def _ends(search: Search, found: Bracket) -> tuple[float | None, float | None]:
    """The rates of a bracket's ends."""
    low, high = (None if end is None else search.rate(end) for end in (found.low, found.high))
    return low, high


def write_log(directory: Path, grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write search.json, if the grid searches."""
    if grid.search is not None:
        logs = [_log(grid.search, runs) for runs in _searches(outcomes)]
        write_text(directory / "search.json", json.dumps(logs, indent=2) + "\n")


def _log(search: Search, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    runs = []
    for outcome, (endings, following) in zip(outcomes, _decisions(search, outcomes), strict=False):
        low, high = _ends(search, bracket(endings))
        runs.append(
            {
                "cell": outcome.cell.id,
                "rate": outcome.rate,
                "updates": outcome.cell.config.training.steps,
                "status": outcome.status,
                "counts_as": ending(outcome),
                "low": low,
                "high": high,
                "next": None if following.step is None else search.rate(following.step),
                "why": following.why,
            }
        )
    cell = outcomes[0].cell
    return {"arm": cell.arm, "setting": cell.setting_text, "seed": cell.config.seed, "runs": runs}
