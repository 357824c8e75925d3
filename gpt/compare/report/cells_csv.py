"""cells.csv: one row per cell, with its factors and its outcome."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from gpt.compare.outcomes import Outcome
from gpt.errors import printable


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """The file: the columns of a cell with a result, empty where a cell has none."""
    rows = [csv_row(outcome) for outcome in outcomes]
    longest = max(rows, key=len)
    columns = list(dict.fromkeys([*longest, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerow({column: _safe(column) for column in columns})
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def csv_row(outcome: Outcome) -> dict[str, Any]:
    """Column -> value."""
    found, cell = outcome.verdict, outcome.cell
    row: dict[str, Any] = {"id": cell.id, **cell.factors, "seed": outcome.seed}
    row |= {"arm": cell.arm, "status": outcome.status}
    if found is not None:
        row |= {
            "diverged_at": found.step if found.status == "diverged" else None,
            "final_val_loss": found.final_val_loss,
            "best_val_loss": found.best_val_loss,
            "spikes": found.loss_spikes,
            "max_grad_norm": found.max_grad_norm,
            "seconds": round(outcome.seconds, 2),
            "failed": found.failed,
            "seen_at": found.step,
            "layer": found.layer,
            "initial_val_loss": found.initial_loss,
            "capped_loss": outcome.loss,
            "final_train_loss": found.final_train_loss,
            "spike_score": found.loss_spike_score,
            "grad_norm_spikes": found.grad_spikes,
            "grad_norm_spike_score": found.grad_spike_score,
            "clipped": found.clipped,
            "steps": found.steps,
        }
    return row | {"reason": outcome.reason, **outcome.extremes}


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
