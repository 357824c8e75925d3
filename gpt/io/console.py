"""Printing: text from users and files is encoded and escaped in one place.

Progress goes to stderr, as a bar on a terminal or in a notebook, and as plain lines otherwise;
stdout carries results only. This module's output is for people; machine-readable records are in
gpt/metrics.py.
"""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gpt.errors import printable

if TYPE_CHECKING:
    from tqdm import tqdm


def set_encoding() -> None:
    """Make redirected output UTF-8 on every platform; a terminal keeps its own encoding.

    Characters that an encoding cannot express are escaped; they never cause an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def show(text: str, file: TextIO | None = None) -> None:
    """Print lines for people, to stdout unless `file` is given.

    Control characters are escaped, since file names and values in the text may contain anything.
    """
    print(printable(text, "\n\t"), file=file or sys.stdout, flush=True)


def write_result(text: str) -> None:
    """Write `text` to stdout unchanged; on a terminal, control characters are escaped."""
    sys.stdout.write(printable(text, "\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def labeled(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `  label      text`, wrapped at 80 columns, but not between a number and its unit."""
    wrapper = textwrap.TextWrapper(
        80, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )
    return [
        line.replace("\xa0", " ")
        for label, text in rows
        for line in wrapper.wrap(
            f"  {label:<10} " + re.sub(r"(\d) (?=[a-zA-Z]+\b)", "\\1\xa0", text)
        )
    ]


class Console:
    """Prints messages and progress to stderr; nothing if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    @property
    def live(self) -> bool:
        """Whether there is a progress bar, so that more progress takes no more lines."""
        return self._bar is not None

    def say(self, text: str) -> None:
        """Print a message, above the progress bar if there is one."""
        if not self._quiet:
            if self._bar is not None:
                self._bar.write(printable(text, "\n\t"), file=sys.stderr)
            else:
                show(text, sys.stderr)

    def warn(self, lines: Iterable[str]) -> None:
        """Print each line as a warning."""
        for line in lines:
            self.say(f"warning: {line}")

    def start(
        self,
        total: int | None,
        done: int = 0,
        *,
        what: str = "",
        unit: str = "step",
        every: float = 0.0,
    ) -> None:
        """Start to show progress, with `done` of `total` units completed.

        Args:
            what: the activity, such as "encoding".
            unit: "step", or "B" for bytes.
            every: minimum seconds between plain lines.
        """
        self._total, self._first, self._what, self._unit = total, done, what, unit
        self._every, self._began = every, time.monotonic()
        self._printed = self._began
        if (sys.stderr.isatty() or _in_notebook()) and not self._quiet:
            self._bar = _bar_class()(
                total=total,
                initial=done,
                desc=what or None,
                unit=unit,
                unit_scale=unit == "B",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def progress(self, done: int, numbers: str = "") -> None:
        """Show that `done` units are completed, with the latest `numbers`, such as the loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._quiet or now - self._printed < self._every:
            return
        self._printed = now
        rate = max(done - self._first, 1) / max(now - self._began, 1e-9)  # units per second
        left = "" if self._total is None else f"{duration((self._total - done) / rate)} left"
        if self._unit == "B":
            of = "" if self._total is None else f" of {self._total / 1e6:,.1f}"
            count, numbers = f"{self._what} {done / 1e6:,.1f}{of} MB", f"{rate / 1e6:,.1f} MB/s"
        else:
            count = f"{self._unit} {done}/{self._total}"
        self.say("  ".join(part for part in (count, numbers, left) if part))

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _in_notebook() -> bool:
    """Whether stderr is the output of a notebook's cell, which can show a bar too."""
    return type(sys.stderr).__module__.startswith("ipykernel.")


def _bar_class() -> type[tqdm[Any]]:
    """A bar of text; in a notebook with ipywidgets, a widget."""
    if _in_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook
    from tqdm import tqdm

    return tqdm


def format_loss(loss: float) -> str:
    """A loss with four decimals, unless it has exploded."""
    return f"{loss:.4f}" if abs(loss) < 1e4 else f"{loss:.1e}"


def duration(seconds: float) -> str:
    """Format a duration as `1:02:03` or `2:03`, and from two days on as `2.1 days`."""
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:,.{1 if seconds < 1e6 else 0}f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
