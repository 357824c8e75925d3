"""Cells copied from another comparison, which trained them with the same config."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gpt.compare import grid as grids
from gpt.compare.analysis.outcomes import read_outcome
from gpt.compare.execution.cell_runs import cell_directory, has_result
from gpt.compare.grid import Cell
from gpt.errors import InputError, printable
from gpt.io.files import PARTIAL_PREFIX, make_folder, remove_partial, write_text
from gpt.run.directory import RunDirectory


def find_reusable(
    cells: Sequence[Cell], directory: Path, sources: Sequence[Path]
) -> dict[Path, dict[str, Path]]:
    """Finished runs of other comparisons, for cells that have not begun here.

    A run fits if its config differs at most in its name and in where prepared data is cached.
    Whether it saw the same data with the same software is checked as for all cells, by `match`.

    Args:
        directory: of this comparison; need not exist.
        sources: directories of other comparisons; the first that has a run wins.

    Returns:
        Source -> id of a cell -> its run directory there.

    Raises:
        InputError: a source is not a comparison, or a run that fits is damaged or has links in it.
    """
    wanted = {_key(cell): cell for cell in cells if not cell_directory(directory, cell).exists()}
    found: dict[Path, dict[str, Path]] = {}
    for source in sources:
        path = source / "grid.yaml"
        if not path.is_file():
            raise InputError(f"--reuse: {source}: is not a comparison directory (no grid.yaml)")
        for theirs in grids.load(path)[1]:
            cell = wanted.get(_key(theirs))
            if cell is not None and has_result(source, theirs):
                read_outcome(theirs, source)  # raises if a report could not be made from it
                check_links(cell_directory(source, theirs))
                found.setdefault(source, {})[cell.id] = cell_directory(source, theirs)
                del wanted[_key(theirs)]
    return found


def check_links(run: Path) -> None:
    """Refuse a run that contains a symbolic link, which a copy would follow.

    Raises:
        InputError: naming the link.
    """
    for path in run.rglob("*"):
        if path.is_symlink():
            raise InputError(f"--reuse: {path}: is a symbolic link; replace it with its target")


def copy_run(run: Path, cell: Cell, directory: Path) -> None:
    """Copy a finished run, without its checkpoints, as a cell of the comparison in `directory`.

    Raises:
        OSError: it cannot be read, or the copy cannot be written.
    """
    target = cell_directory(directory, cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent)
    partial = make_folder(target.parent, PARTIAL_PREFIX)
    ignored = shutil.ignore_patterns("checkpoints", ".lock", f"{PARTIAL_PREFIX}*")
    shutil.copytree(  # without modes: the source may be read-only
        run, partial / "run", ignore=ignored, copy_function=shutil.copyfile
    )
    for folder in (partial / "run", *(p for p in (partial / "run").rglob("*") if p.is_dir())):
        shutil.copymode(partial, folder)
    copy = RunDirectory(partial / "run")
    result = copy.read_result()
    assert result is not None
    write_text(copy.config, cell.config.to_yaml())
    copy.note("copied", result.step, source=printable(str(run)))
    copy.path.rename(target)
    partial.rmdir()


def _key(cell: Cell) -> str:
    """A config as text, without the options that do not affect its run."""
    return cell.config.model_dump_json(exclude={"name": True, "data": {"cache_dir": True}})
