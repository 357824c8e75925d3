"""The plot of a run: its text fits into it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import rendering
from matplotlib.figure import Figure

from gpt.errors import printable
from gpt.run import plot


@pytest.fixture(autouse=True)
def _rendered() -> Iterator[None]:
    with rendering():
        yield


@pytest.mark.parametrize(
    ("steps", "norm", "rate"),  # every pair of values once
    [
        (3, 3e-5, 1.23e-4),
        (3, 0.3, 0.012),
        (3, 4e3, 30.0),
        (500, 3e-5, 0.012),
        (500, 0.3, 30.0),
        (500, 4e3, 1.23e-4),
        (120_000, 3e-5, 30.0),
        (120_000, 0.3, 1.23e-4),
        (120_000, 4e3, 0.012),
    ],
)
def test_all_text_is_inside_the_plot(
    rate: float, norm: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Figure] = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    shares = [i / 20 for i in range(1, 21)]
    records = [
        {
            "step": round(steps * share),
            "loss": 12 - 9 * share,
            "learning_rate": rate * share,
            "grad_norm": norm * (1 + share),
        }
        for share in shares
    ]
    evaluations = [{"step": step, "val_loss": loss} for step, loss in ((0, 12.0), (steps, 2.8))]
    plot.plot_run([*records, *evaluations], tmp_path / "loss.png", "a run of some length")
    (figure,) = drawn
    with plot.literal_text():  # in which it is saved
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        labels = figure.axes[2].yaxis.get_ticklabels(which="both")
    assert not any("$" in tick.get_text() for tick in labels)
    assert min(box.x0, box.y0) > 0
    assert box.x1 < width
    assert box.y1 < height


@pytest.mark.parametrize(
    "title",
    [r"runs/$a_$\frac", "$", r"\$5 %s {}", "日本 \U0001f600", "x\x1b\n\uffff\udcff"],
)
def test_a_title_is_shown_literally(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda *args: (drawn.append(args[0]), save(*args)))
    records = [{"step": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.plot_run(records, tmp_path / "loss.png", title)
    shown = drawn[0].axes[0].title
    assert shown.get_text() == printable(title)
    assert not shown.get_parse_math()


def test_a_long_title_loses_its_beginning():
    assert plot.label("runs/a") == "runs/a"
    assert plot.label("x" * 300 + "/end") == "..." + "x" * 63 + "/end"
