"""What a comparison registered before its first result, and what was added to it later.

    DIR/registration.json   the seeds, the number of contrasts, a hash of both, of the search and
                            of the first stage; later additions

An answer is confirmatory only if its contrast and its cells were fixed before any result was known.
So the first start records the contrasts and seeds, and every later addition records how many cells
had a result by then. The hash can be published beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gpt.compare.grid import Cell, Contrast, Grid, Search, as_text
from gpt.errors import InputError, printable
from gpt.io.files import read_json, write_text

UNKNOWN = "what was registered before the runs is not recorded"
NEWER = {"column", "slope"}  # of a contrast: hashed only if set, so that older hashes hold
CHANGED = "the contrasts or seeds are not those that were registered"


@dataclass(frozen=True)
class Addition:
    """Cells or contrasts that were added when results were known.

    Attributes:
        time: in ISO 8601.
        cells: ids of the cells that were added.
        contrasts: how many contrasts were added.
        results: how many cells had a result.
        source: the directory from which `cells` were copied; empty if they were to be trained.
    """

    time: str
    cells: list[str]
    contrasts: int
    results: int
    source: str = ""

    def __str__(self) -> str:
        if self.source:
            return f"copied from {self.source} on {self.time}: {count(len(self.cells))}"
        added = added_text(len(self.cells), self.contrasts)
        return f"added on {self.time}, {self.when}: {added}"

    @property
    def when(self) -> str:
        """`when 12 cells had a result`; their number is unknown if they have been deleted."""
        number = f"{count(self.results)} had a result" if self.results else "results were known"
        return f"when {number}"


@dataclass(frozen=True)
class Registration:
    """The contents of registration.json.

    Attributes:
        time: of the first start, in ISO 8601.
        sha256: see `fingerprint`.
        seeds, contrasts: the registered seeds, and how many contrasts there were.
    """

    time: str
    sha256: str
    seeds: list[int]
    contrasts: int
    additions: list[Addition] = field(default_factory=list)


class Growth(NamedTuple):
    """What a grid adds to the grid of a directory.

    Attributes:
        contrasts: their number.
    """

    cells: Sequence[Cell] = ()
    contrasts: int = 0


@dataclass(frozen=True)
class Registered:
    """What may be said about the registration of a comparison.

    Attributes:
        text: when it was registered, and what was added since; empty if that is unknown.
        late: contrast, by its number -> why its answer is exploratory.
    """

    text: str = ""
    late: Mapping[int, str] = field(default_factory=dict)


UNSAID = Registered()


def fingerprint(
    contrasts: Sequence[Contrast],
    seeds: Sequence[int],
    search: Search | None = None,
    first_stage: int | None = None,
) -> str:
    """SHA-256 of contrasts, seeds, search and stages, in hexadecimal; 1 and 1.0 are the same.

    Of the search, it covers the rule, and the first rates of the arms that are contrasted.
    """
    dumped = [
        {
            key: value
            for key, value in each.model_dump(mode="json").items()
            if key not in NEWER or value
        }
        for each in contrasts
    ]
    for each in dumped:
        each["at"] = {key: list(map(as_text, values)) for key, values in each["at"].items()}
    tree: dict[str, Any] = {"contrasts": dumped, "seeds": [*seeds]}
    if search is not None:
        arms = {arm for each in contrasts for arm in each.arms}
        start = {arm: search.start_of(arm) for arm in arms}
        tree["search"] = {**search.model_dump(mode="json"), "start": start}
    if first_stage is not None:
        tree["first_stage"] = first_stage
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def register(
    directory: Path,
    grid: Grid,
    cells: Sequence[Cell],
    growth: Growth,
    trained: Collection[str],
    results: int,
) -> None:
    """Record the contrasts and seeds; once there are results, record only what is added.

    Args:
        cells: of the grid.
        growth: see `gpt.compare.comparison.check_directory`.
        trained: the ids of the cells that are to be trained.
        results: how many cells have a result.
    """
    sha256 = fingerprint(grid.contrasts, grid.seeds, grid.search, grid.first_stage)
    added = [cell.id for cell in growth.cells]
    known = {cell.id for cell in cells}.difference(added)
    before = read_registration(directory)
    if before is not None and before.additions:
        kept = _carried_out(before, known, len(grid.contrasts) - growth.contrasts, trained)
        if kept != before:
            before = kept
            _write(directory, kept)
    seen = results or (directory / "summary.json").exists() or (before and before.additions)
    if seen:
        _add(directory, grid, [name for name in added if name in trained], results)
    elif before is None or before.sha256 != sha256:
        _write(directory, Registration(_now(), sha256, [*grid.seeds], len(grid.contrasts)))


def _carried_out(
    before: Registration, known: Collection[str], contrasts: int, trained: Collection[str]
) -> Registration:
    """A registration without the additions that a start recorded, but was killed before making.

    It may have been killed before it wrote its grid, or before it copied all runs. Cells that it
    was to copy and that are trained now still count as added, unless there was no result then.

    Args:
        known, contrasts: the cells of the directory's grid, and how many contrasts it has.
        trained: as in `register`.
    """
    additions: list[Addition] = []
    left = contrasts - before.contrasts
    for addition in before.additions:
        cells = [name for name in addition.cells if name in known]
        copied = [name for name in cells if not (addition.source and name in trained)]
        number = min(addition.contrasts, left)
        left -= number
        if copied or number:
            additions.append(replace(addition, cells=copied, contrasts=number))
        if len(copied) < len(cells) and addition.results:
            rest = [name for name in cells if name in trained]
            additions.append(replace(addition, cells=rest, contrasts=0, source=""))
    return replace(before, additions=additions)


def register_copies(
    directory: Path, grid: Grid, names: Sequence[str], source: Path, results: int
) -> None:
    """Record that cells, by their ids, are copied with their results from another comparison."""
    _add(directory, grid, names, results, printable(str(source)))


def _add(directory: Path, grid: Grid, names: Sequence[str], results: int, source: str = "") -> None:
    """Record what is not in registration.json yet; do nothing if there is no such file."""
    before = read_registration(directory)
    if before is None:
        return
    known = {name for addition in before.additions for name in addition.cells}
    new = [name for name in names if name not in known]
    contrasts = len(grid.contrasts) - before.contrasts - sum(a.contrasts for a in before.additions)
    if new or contrasts:
        addition = Addition(_now(), new, contrasts, results, source)
        _write(directory, replace(before, additions=[*before.additions, addition]))


def read_registration(directory: Path) -> Registration | None:
    """The contents of registration.json; None if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = directory / "registration.json"
    return read_json(path, Registration) if path.is_file() else None


def registered(directory: Path, grid: Grid, cells: Sequence[Cell]) -> Registered:
    """What may be said about the registration of the comparison in a directory.

    Raises:
        InputError: registration.json is damaged.
    """
    found = read_registration(directory)
    if found is None:
        return Registered(late=dict.fromkeys(range(len(grid.contrasts)), UNKNOWN))
    mine = fingerprint(
        grid.contrasts[: found.contrasts], found.seeds, grid.search, grid.first_stage
    )
    if mine != found.sha256 or not set(found.seeds) <= set(grid.seeds):
        return Registered(late=dict.fromkeys(range(len(grid.contrasts)), CHANGED))
    late = {
        number: reason
        for number, contrast in enumerate(grid.contrasts)
        if (reason := _late(number, contrast, found, cells))
    }
    text = f"Registered on {found.time}, before any result (SHA-256 {found.sha256})"
    return Registered("; ".join([text, *map(str, found.additions)]) + ".", late)


def _late(
    number: int, contrast: Contrast, registration: Registration, cells: Sequence[Cell]
) -> str:
    """Why the answer to a contrast is exploratory; empty if nothing was added to it."""
    known = registration.contrasts
    for addition in registration.additions:
        if known <= number < known + addition.contrasts:
            return f"the question was added {addition.when}"
        known += addition.contrasts
    if number >= known:
        return CHANGED
    included = {cell.id for cell in cells if contrast.includes(cell)}
    for addition in registration.additions:
        own = len(included.intersection(addition.cells))
        if own and addition.source:
            return f"it includes {count(own)} copied with results from {addition.source}"
        if own:
            return f"it includes {count(own)} added {addition.when}"
    return ""


def cautions(grid: Grid, growth: Growth, results: int) -> list[str]:
    """What a user should know before cells are added to a comparison with so many results."""
    late = sum(any(map(each.includes, growth.cells)) for each in grid.contrasts)
    if not late or not results:
        return []
    return [
        f"questions that become exploratory, as they include cells that are added now: {late} of "
        f"{len(grid.contrasts)}; in another --out-dir, the answers here stay as they are"
    ]


def count(cells: int) -> str:
    """`1 cell` or `12 cells`."""
    return f"{cells} cell{'' if cells == 1 else 's'}"


def added_text(cells: int, contrasts: int) -> str:
    """`12 cells, 1 question`; a count of 0 is left out."""
    questions = f"{contrasts} question{'' if contrasts == 1 else 's'}"
    return ", ".join([count(cells)] * bool(cells) + [questions] * bool(contrasts))


def check_growth(old: tuple[Grid, list[Cell]], new: tuple[Grid, list[Cell]]) -> None:
    """Check that a grid only adds to another: all its cells, contrasts and pairs remain.

    Raises:
        InputError: something would be lost or changed; the message says only what.
    """
    configs = {cell.id: cell.config for cell in new[1]}
    for cell in old[1]:
        if cell.id not in configs:
            raise InputError(f"the new grid has no cell {cell.id}")
        if configs[cell.id] != cell.config:
            raise InputError(f"the new grid changes cell {cell.id}")
    if _rule(old[0]) != _rule(new[0]):
        raise InputError("search: only the first rates of new arms can be added")
    if _first_stage(old[0]) != _first_stage(new[0]):
        raise InputError("first_stage: neither it nor its seeds can change")
    for name in ("contrasts", "pairs"):
        before, now = getattr(old[0], name), getattr(new[0], name)
        if now[: len(before)] != before:
            raise InputError(f"{name}: new ones must come after the existing ones")


def _rule(grid: Grid) -> dict[str, Any] | None:
    """The search without first rates, which the cells show."""
    return None if grid.search is None else grid.search.model_dump(exclude={"start"})


def _first_stage(grid: Grid) -> tuple[int, ...] | None:
    """The seeds that decide whether to stop, in any order; None without stages."""
    return None if grid.first_stage is None else tuple(sorted(grid.first_seeds))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(directory: Path, registration: Registration) -> None:
    text = json.dumps(asdict(registration), indent=2) + "\n"
    write_text(directory / "registration.json", text)
