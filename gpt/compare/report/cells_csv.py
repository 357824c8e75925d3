"""cells.csv: one row per cell, with the options in which cells differ and its outcome."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from gpt.compare.analysis.outcomes import RESULT_COLUMNS, WORST_COLUMNS, Outcome
from gpt.errors import printable


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """The text of cells.csv; the columns of a result are empty for a cell that has none."""
    rows = [csv_row(outcome) for outcome in outcomes]
    columns = [
        column
        for column in rows[0]
        if column not in WORST_COLUMNS or any(row[column] is not None for row in rows)
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
        **{column: found and value(outcome, found) for column, value in RESULT_COLUMNS.items()},
        "reason": outcome.reason,
        **{column: outcome.extremes.get(measure) for column, measure in WORST_COLUMNS.items()},
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
