"""A table of runs: what each has come to, and the options in which they differ."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.errors import InputError, option, printable
from gpt.io.console import duration, format_loss
from gpt.watch.survey import RunSummary, find, find_runs, is_comparison, summarize

NUMBERS = (
    *("step", "steps", "train_loss", "val_loss", "best_val_loss"),
    *("learning_rate", "parameters", "tokens", "seconds"),
)
PLACES = {"name", "data.cache_dir"}  # options that say where a run is rather than what it is
OWN_COLUMN = {"training.steps", "optimizer.learning_rate"}
LONGEST = 24  # characters of an option's value in a printed table
GAP = "  "


@dataclass(frozen=True, repr=False)
class RunTable:
    """Runs and comparisons, a row each. Printed, or shown in a notebook, it is a table."""

    rows: Sequence[RunSummary]

    def __iter__(self) -> Iterator[RunSummary]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def differing(self) -> list[str]:
        """The options in which the runs differ, by dotted path."""
        options = differing([row.options for row in self.rows if row.options])
        return [option for option in options if option not in PLACES | OWN_COLUMN]

    def records(self) -> list[dict[str, Any]]:
        """A dict for each row, with the options that differ: `pandas.DataFrame(t.records())`."""
        return [
            {
                "name": row.name,
                "status": row.status,
                **{key: getattr(row, key) for key in NUMBERS},
                "note": row.note,
                **{option: row.options.get(option) for option in self.differing},
            }
            for row in self.rows
        ]

    def to_csv(self) -> str:
        """The records as CSV, all numbers in full."""
        return csv_text(self.records())

    def __repr__(self) -> str:
        return self.format()

    def format(self, width: int | None = None) -> str:
        """The table as text.

        Args:
            width: characters of a line; columns of options that do not fit are left out, and
                counted in a last line. None: all columns.
        """
        options = self.differing
        while True:
            lines = self._format(options)
            if width is None or not options or max(map(len, lines)) <= width:
                break
            options = options[:-1]
        left_out = len(self.differing) - len(options)
        if left_out:
            more = f"{left_out} more option{'' if left_out == 1 else 's'}"
            lines.append(f"The runs differ in {more}; {option('csv')} lists them.")
        return "\n".join(lines)

    def _format(self, options: Sequence[str]) -> list[str]:
        """The lines of the table with columns for some options; notes take the rest of a line."""
        header = [*_HEADER, *(_two_lines(option) for option in options)]
        cells = [
            [printable(row.name), row.status, *_numbers(row), *_values(row, options)]
            for row in self
        ]
        noted = [bool(row.note) for row in self]
        full = [row for row, has_note in zip(cells, noted, strict=True) if not has_note]
        widths = [
            max(map(len, (*title, *(row[i] for row in (cells if i < 2 else full)))))
            for i, title in enumerate(header)
        ]
        if not full:
            header, widths = header[:2], widths[:2]
        rows = [[title[0] for title in header], [title[1] for title in header]]
        lines = [_line(row, widths) for row in rows if any(row)]
        for row, cell in zip(self.rows, cells, strict=True):
            texts = [*cell[:2], printable(row.note)] if row.note else cell
            lines.append(_line(texts, widths if not row.note else [*widths[:2], 0]))
        return lines

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        header = [*(" ".join(title).strip() for title in _HEADER), *self.differing]
        rows = []
        for row in self:
            cells = [row.name, row.status]
            if row.note:
                rest = f'<td colspan="{len(header) - 2}" style="text-align:left">{_html(row.note)}'
            else:
                cells += [*_numbers(row), *_values(row, self.differing)]
                rest = ""
            rows.append("".join(f"<td>{_html(cell)}</td>" for cell in cells) + rest)
        head = "".join(f"<th>{_html(title)}</th>" for title in header)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_HEADER = [
    ("", "run"),
    ("", "status"),
    ("", "step"),
    ("train", "loss"),
    ("val", "loss"),
    ("best", "val loss"),
    ("learning", "rate"),
    ("", "parameters"),
    ("", "tokens"),
    ("", "time"),
]


def _two_lines(option: str) -> tuple[str, str]:
    """A dotted path as a header of two lines: its section, and its name."""
    section, dot, name = option.rpartition(".")
    return section + dot, name


def _numbers(row: RunSummary) -> list[str]:
    """The cells between the status and the options."""
    steps = "" if row.step is None else f"{row.step:,}/{row.steps:,}"
    losses = (row.train_loss, row.val_loss, row.best_val_loss)
    return [
        steps,
        *("" if loss is None else format_loss(loss) for loss in losses),
        "" if row.learning_rate is None else f"{row.learning_rate:g}",
        *("" if n is None else f"{n:,}" for n in (row.parameters, row.tokens)),
        "" if row.seconds is None else duration(row.seconds),
    ]


def _values(row: RunSummary, options: Sequence[str]) -> list[str]:
    return [format_value(row.options.get(option)) for option in options]


def format_value(value: object) -> str:
    """An option's value as in YAML, on one line; the end of a long one."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, list):
        text = ", ".join(map(format_value, value))
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= LONGEST else "..." + text[3 - LONGEST :]


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    """Texts in columns: the first two to the left, numbers and options to the right."""
    aligned = [
        text.ljust(width) if i < 2 else text.rjust(width)
        for i, (text, width) in enumerate(zip(texts, widths, strict=True))
    ]
    return GAP.join(aligned).rstrip()


def _html(text: str) -> str:
    return html.escape(printable(text))


def differing(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options, by dotted path, that do not have the same value in all of `options`."""
    keys = dict.fromkeys(key for each in options for key in each)
    return [key for key in keys if any(each.get(key) != options[0].get(key) for each in options)]


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as CSV with a header; None is an empty field."""
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()


def list_runs(folder: str | Path = "runs", *, cells: bool = False) -> RunTable:
    """A table of all runs in a folder, in a notebook or printed; a comparison is one row.

    Args:
        folder: also a single run, or a comparison, whose cells are listed.
        cells: list the cells of all comparisons.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such directory"
        raise InputError(f"{folder}: {what}")
    paths = find_runs(folder) if cells or is_comparison(folder) else find(folder)

    def name(path: Path) -> str:
        return path.name if path == folder else path.relative_to(folder).as_posix()

    return RunTable([summarize(path, name(path)) for path in paths])
