"""What every engine does: it runs tasks somewhere, and reports how each one ended."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpt.compare.execution.cell_runs import CellError
from gpt.compare.execution.tasks import Task, default_workers
from gpt.compare.grid import Cell


@dataclass(frozen=True)
class Work:
    """Tasks to run, and how an engine reports on them.

    Attributes:
        directory: of the comparison.
        workers: how many tasks run at once, at most.
        keep_checkpoints: whether the checkpoints of a cell that has ended are kept.
        stop: polled often; once it returns true, the engine returns soon.
        record: called with each task that has ended, and the error of each of its cells; None for
            one that has a result, or was stopped.
        progress: called often with the number of updates of cells, by their ids.
        say: shows a message.
    """

    tasks: Sequence[Task]
    directory: Path
    workers: int
    keep_checkpoints: bool
    stop: Callable[[], bool]
    record: Callable[[Task, Sequence[CellError | None]], object]
    progress: Callable[[Mapping[str, int]], object]
    say: Callable[[str], object]


class Engine(abc.ABC):
    """Runs tasks. The fields of a subclass, a frozen dataclass, are its flags on the command line.

    It is used as a context, in which it may keep a connection.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    @abc.abstractmethod
    def run(self, work: Work) -> bool:
        """Run all tasks; returns false if `work.stop` became true.

        Raises:
            InputError: they cannot run there.
            StoppedError: `work.stop` became true, with a message that says what continues.
        """

    def workers(self, cells: Sequence[Cell], wanted: int | None) -> int:
        """How many tasks run at once, at most.

        Args:
            wanted: by the user; None leaves it to the engine.

        Raises:
            InputError: none can run.
        """
        return wanted or default_workers(cells)

    def preview(self, tasks: Sequence[Task], directory: Path, workers: int) -> str:
        """What would be submitted, for --dry-run; the arguments are those of `Work`."""
        return ""
