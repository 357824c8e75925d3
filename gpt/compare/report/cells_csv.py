"""cells.csv: one row per cell, with the options in which cells differ and its outcome."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from gpt.compare.analysis.outcomes import EXTREMES, Outcome
from gpt.compare.analysis.verdicts import Verdict
from gpt.errors import printable

# Columns of a cell with a result, in order, between those of every cell.
RESULT: dict[str, Callable[[Outcome, Verdict], Any]] = {
    "diverged_at": lambda _, v: v.step if v.status == "diverged" else None,
    "final_val_loss": lambda _, v: v.final_val_loss,
    "best_val_loss": lambda _, v: v.best_val_loss,
    "spikes": lambda _, v: v.loss_spikes,
    "max_grad_norm": lambda _, v: v.max_grad_norm,
    "seconds": lambda o, _: round(o.seconds, 2),
    "failed": lambda _, v: v.failed,
    "seen_at": lambda _, v: v.step,
    "layer": lambda _, v: v.layer,
    "initial_val_loss": lambda _, v: v.initial_loss,
    "capped_loss": lambda o, _: o.loss,
    "final_train_loss": lambda _, v: v.final_train_loss,
    "spike_score": lambda _, v: v.loss_spike_score,
    "grad_norm_spikes": lambda _, v: v.grad_spikes,
    "grad_norm_spike_score": lambda _, v: v.grad_spike_score,
    "clipped": lambda _, v: v.clipped,
    "steps": lambda _, v: v.steps,
}
# Column -> measure of the layers; a column is left out if no cell has it.
WORST = {f"{worst.__name__}_{measure}": measure for measure, worst in EXTREMES.items()}


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """The text of cells.csv; the columns of a result are empty for a cell that has none."""
    rows = [csv_row(outcome) for outcome in outcomes]
    columns = [
        column
        for column in rows[0]
        if column not in WORST or any(row[column] is not None for row in rows)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writerow({column: _safe(column) for column in columns})
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def csv_row(outcome: Outcome) -> dict[str, Any]:
    """Column -> value; None is an empty field."""
    cell, found = outcome.cell, outcome.verdict
    return {
        **{"id": cell.id, **cell.varied, "seed": outcome.seed},
        **{"arm": cell.arm, "status": outcome.status},
        **{column: found and value(outcome, found) for column, value in RESULT.items()},
        "reason": outcome.reason,
        **{column: outcome.extremes.get(measure) for column, measure in WORST.items()},
    }


def _safe(value: Any) -> Any:
    """Text in one line, prefixed by an apostrophe where a spreadsheet would run it as a formula."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value
