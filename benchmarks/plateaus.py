"""Are plateaus stuck, or only slow? Run those of a finished comparison again, three times as long.

    python benchmarks/plateaus.py runs/thresholds [--times 3] [--workers 2]

Reports call a plateau slow if its loss is still falling (`still_falling`), and searches repeat
those still above H1 (`is_too_slow`) with more updates. Both judge by the loss. Here each plateaued
cell runs again, with its seed, rate and warm-up, for a multiple of its updates, in DIR-x3. The
table, printed last, shows how many then train, by arm and by what the plateau had been called.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from gpt.cli.common import StopSignals
from gpt.compare.analysis.outcomes import Outcome, read_outcome
from gpt.compare.comparison import read_comparison
from gpt.compare.execution.cell_runs import has_result
from gpt.compare.execution.runner import run_tasks
from gpt.compare.execution.tasks import make_tasks
from gpt.compare.grid import Cell
from gpt.compare.messages import format_outcome
from gpt.config import Config, merge, validate
from gpt.io.console import Console


def longer(cell: Cell, times: int) -> Cell:
    """The cell with a multiple of its updates, evaluated at their end."""
    steps = times * cell.config.training.steps
    changes = {"training": {"steps": steps}, "evaluation": {"every": steps}}
    tree = merge(cell.config.model_dump(), {**changes, "diagnostics": {"every": None}})
    return replace(cell, config=validate(Config, tree))


def called(outcome: Outcome) -> str:
    """What a plateau is called after its own updates."""
    if outcome.too_slow:
        return "too slow"
    slow = outcome.verdict is not None and outcome.verdict.still_falling
    return "still falling" if slow else "stuck"


def main() -> None:
    """Run the plateaus again, and print how they end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="of a finished comparison")
    parser.add_argument("--times", type=int, default=3, help="times as many updates (default: 3)")
    parser.add_argument("--workers", type=int, default=2)
    flags = parser.parse_args()
    grid, _, outcomes = read_comparison(flags.directory)
    plateaus = [each for each in outcomes if each.status == "plateaued"]
    target = flags.directory.with_name(f"{flags.directory.name}-x{flags.times}")
    cells = {each.cell.id: longer(each.cell, flags.times) for each in plateaus}
    missing = [cell for cell in cells.values() if not has_result(target, cell)]
    with StopSignals(None) as stop, closing(Console()) as console:
        ended = run_tasks(
            make_tasks(missing, grid.runner),
            [*cells.values()],
            target,
            workers=flags.workers,
            keep_checkpoints=False,
            console=console,
            stop=stop,
            describe=lambda cell: format_outcome(read_outcome(cell, target)),
        )
    if not ended:
        parser.exit(75, "interrupted: run the same command to resume\n")
    counts: dict[tuple[str, str], Counter[str]] = {}
    for each in plateaus:
        status = read_outcome(cells[each.cell.id], target).status
        counts.setdefault((each.cell.arm, called(each)), Counter())[status] += 1
    print(f"| arm | called | plateaus | trained with {flags.times} times the updates |")
    print("|---|---|---|---|")
    for (arm, name), statuses in sorted(counts.items()):
        print(f"| {arm} | {name} | {statuses.total()} | {statuses['trained']} |")


if __name__ == "__main__":
    main()
