"""A table of runs: the status and numbers of each, and the options in which they differ."""

from __future__ import annotations

import csv
import html
import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.errors import InputError, option, printable
from gpt.io.console import duration, format_loss
from gpt.run.directory import AnyRun, path_of
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
        header = [*_HEADER, *map(_two_lines, options)]
        cells = [
            [printable(row.name), row.status, *_numbers(row), *_values(row, options)]
            for row in self
        ]
        full = [row for row, summary in zip(cells, self, strict=True) if not summary.note]
        widths = [
            max(map(display_width, (*title, *(row[i] for row in (cells if i < 2 else full)))))
            for i, title in enumerate(header)
        ]
        columns = len(header) if full else 2
        while width is not None and columns > len(_HEADER) and _total(widths[:columns]) > width:
            columns -= 1
        widths = widths[:columns]
        titles = [_line(line, widths) for line in zip(*header[:columns], strict=True)]
        lines = [line for line in titles if line]
        for row, summary in zip(cells, self, strict=True):
            texts = [*row[:2], printable(summary.note)] if summary.note else row[:columns]
            lines.append(_line(texts, widths if not summary.note else [*widths[:2], 0]))
        if full and columns < len(header):
            more = len(header) - columns
            text = f"{more} more option{'' if more == 1 else 's'}"
            lines.append(f"The runs differ in {text}; {option('csv')} lists them.")
        return "\n".join(lines)

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


def _total(widths: Sequence[int]) -> int:
    """Characters of a line with columns of these widths."""
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    """Texts in columns: the first two left-aligned, the others right-aligned."""
    aligned = [
        text + _blank(text, width) if i < 2 else _blank(text, width) + text
        for i, (text, width) in enumerate(zip(texts, widths, strict=True))
    ]
    return GAP.join(aligned).rstrip()


def _blank(text: str, width: int) -> str:
    """The spaces that fill up a column."""
    return " " * max(0, width - display_width(text))


def display_width(text: str) -> int:
    """The columns that `text` takes on a terminal: two for a wide letter, none for an accent."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


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


def list_runs(folder: AnyRun = "runs", *, cells: bool = False) -> RunTable:
    """A table of all runs in a folder, in a notebook or printed; a comparison is one row.

    Args:
        folder: also a single run, or a comparison, whose cells are listed.
        cells: list the cells of all comparisons.

    Raises:
        InputError: there is no such folder.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such directory"
        raise InputError(f"{folder}: {what}")
    paths = find_runs(folder) if cells or is_comparison(folder) else find(folder)

    def name(path: Path) -> str:
        return path.name if path == folder else path.relative_to(folder).as_posix()

    return RunTable([summarize(path, name(path)) for path in paths])
