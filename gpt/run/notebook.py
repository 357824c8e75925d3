"""How a notebook shows the result of a run: its numbers and its picture."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt import metrics
from gpt.errors import InputError, printable
from gpt.run.plot import NOTEBOOK_DPI, draw_run, to_bytes


def to_html(
    name: str, outcome: str, numbers: Mapping[str, str], advice: Sequence[str], metrics_file: Path
) -> str:
    """The outcome of a run, what to try next, the numbers as a table, and the plot.

    Args:
        advice: as result.json holds it, with flags.
        metrics_file: its metrics.jsonl; without records there is no plot.
    """
    head = "".join(f"<th>{title}</th>" for title in numbers)
    body = "".join(f"<td>{number}</td>" for number in numbers.values())
    tips = "".join(f"<li>{_escape(_as_options(tip))}</li>" for tip in advice)
    return (
        f"<p>{_escape(f'{name}: {outcome}')}</p>"
        + (f"<p>What to try next, one change at a time:</p><ul>{tips}</ul>" if tips else "")
        + f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
        + _picture(metrics_file, name)
    )


def _picture(metrics_file: Path, title: str) -> str:
    """The plot of losses, learning rate and gradient norm; empty if there is nothing to plot."""
    try:
        records = metrics.read(metrics_file)
    except InputError:
        return ""
    if not records:
        return ""
    png = to_bytes(draw_run(records, title), dpi=NOTEBOOK_DPI)
    return f'<img alt="losses" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _as_options(tip: str) -> str:
    """A tip with its flags as options: `--optimizer.clip 1.0` becomes `optimizer.clip: 1.0`."""
    tip = tip.replace(" --", ", --")  # between two flags
    return re.sub(r"--([\w.-]+) ", lambda flag: flag[1].replace("-", "_") + ": ", tip)


def _escape(text: str) -> str:
    return html.escape(printable(text))
