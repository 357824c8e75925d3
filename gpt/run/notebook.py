"""How a notebook shows the result of a run: its numbers and its picture."""

from __future__ import annotations

import base64
import html
import re
from typing import TYPE_CHECKING

from gpt import metrics
from gpt.errors import InputError, printable
from gpt.io.console import duration, format_loss

if TYPE_CHECKING:
    from gpt.run.directory import RunResult


def to_html(result: RunResult) -> str:
    """The outcome, the numbers as a table, and the plot."""
    losses = {
        "validation loss": result.val_loss,
        "lowest": result.best_val_loss,
        "bits per byte": result.val_bits_per_byte,
        "training loss": result.train_loss,
    }
    rows = {
        **{name: format_loss(loss) for name, loss in losses.items() if loss is not None},
        "updates": f"{result.step:,}",
        "tokens": f"{result.tokens:,}",
        "time": duration(result.seconds),
        "tokens/s": f"{result.tokens_per_second:,.0f}",
    }
    head = "".join(f"<th>{name}</th>" for name in rows)
    body = "".join(f"<td>{value}</td>" for value in rows.values())
    outcome = _escape(f"{result.directory}: {result.status}: {result.reason}")
    tips = [_escape(_as_options(tip)) for tip in (result.failure.advice if result.failure else ())]
    advice = "".join(f"<li>{tip}</li>" for tip in tips)
    return (
        f"<p>{outcome}</p>"
        + (f"<p>What to try next, one change at a time:</p><ul>{advice}</ul>" if advice else "")
        + f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
        + _picture(result)
    )


def _picture(result: RunResult) -> str:
    """The plot of losses, learning rate and gradient norm; empty if there is nothing to plot."""
    from gpt.run.directory import RunDirectory
    from gpt.run.plot import NOTEBOOK_DPI, draw_run, to_bytes

    try:
        records = metrics.read(RunDirectory(result.directory).metrics)
    except InputError:
        return ""
    if not records:
        return ""
    png = to_bytes(draw_run(records, str(result.directory)), dpi=NOTEBOOK_DPI)
    return f'<img alt="losses" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _as_options(tip: str) -> str:
    """A tip with its flags as options: `--optimizer.clip 1.0` becomes `optimizer.clip: 1.0`."""
    tip = tip.replace(" --", ", --")  # between two flags
    return re.sub(r"--([\w.-]+) ", lambda flag: flag[1].replace("-", "_") + ": ", tip)


def _escape(text: str) -> str:
    return html.escape(printable(text))
