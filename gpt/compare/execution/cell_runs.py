"""A cell on disk: its run directory, whether it has a result, and why if it has none.

    DIR/cells/CELL/   an ordinary run directory
    DIR/lost.json     cells without a result, and why: {id: {"status", "reason"}}

Divergence is a result. A cell is lost if its process was killed, ran out of memory or met an
unexpected error; the next start of the comparison tries it again.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpt.compare.grid import Cell
from gpt.config import describe_differences
from gpt.errors import InputError
from gpt.hardware.memory import is_out_of_memory
from gpt.io.files import read_json, write_text
from gpt.run.directory import RunDirectory


@dataclass(frozen=True)
class CellError:
    """Why a cell has no result."""

    status: Literal["killed", "out of memory", "error"]
    reason: str

    @classmethod
    def of(cls, error: Exception) -> CellError:
        """The cell error for an exception that training raised."""
        if is_out_of_memory(error):
            return cls("out of memory", str(error).partition("\n")[0])
        message = "; ".join(str(error).splitlines()) or type(error).__name__
        if isinstance(error, InputError):
            return cls("error", message)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return cls("error", f"{type(error).__name__}: {message} ({where})")


def cell_directory(directory: Path, cell: Cell) -> Path:
    """The run directory of a cell."""
    return directory / "cells" / cell.id


def has_result(directory: Path, cell: Cell) -> bool:
    """Whether a cell has a result.

    Raises:
        InputError: its directory holds a run of another config, or a damaged one.
    """
    run = RunDirectory(cell_directory(directory, cell))
    if not run.config.is_file():
        return False
    differences = describe_differences(run.read_config().differences(cell.config))
    if differences:
        raise InputError(
            f"{run.path}: contains a run with a different config ({differences[0]}); "
            "choose another --out-dir"
        )
    result = run.read_result()
    return result is not None and result.status != "interrupted"


def read_lost(directory: Path) -> dict[str, CellError]:
    """The errors of lost cells, by the cells' ids.

    Raises:
        InputError: lost.json is damaged.
    """
    path = directory / "lost.json"
    if not path.is_file():
        return {}
    return read_json(path, dict[str, CellError], "delete it to try its cells again")


def write_lost(directory: Path, lost: dict[str, CellError]) -> None:
    """Write lost.json, or remove it if no cell is lost."""
    path = directory / "lost.json"
    if lost:
        tree = {name: asdict(error) for name, error in lost.items()}
        write_text(path, json.dumps(tree, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)
