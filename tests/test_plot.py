"""The plot of a run: its text fits into it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
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
    ("steps", "norm", "rate"),  # each on an axis of its own
    [(3, 3e-5, 30.0), (500, 0.3, 0.012), (120_000, 4e3, 1.23e-4)],
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
            "grad_norm": norm * 30**share,
        }
        for share in shares
    ]
    evaluations = [{"step": step, "val_loss": loss} for step, loss in ((0, 12.0), (steps, 2.8))]
    levels = {"by token frequencies (H₁)": 5.0, "uniformly (ln V)": 9.0}
    title, path = "a run of some length", tmp_path / "loss.png"
    plot.plot_run([*records, *evaluations], path, title, levels=levels, clip=1.0)
    (figure,) = drawn
    with plot.literal_text():  # as it was saved: no TeX in the labels of an axis
        figure.draw_without_rendering()
    lines = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert {f"guessing {name}": level for name, level in levels.items()}.items() <= lines.items()
    labels = [
        label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both")
    ]
    assert "".join(labels).strip("0123456789.e+-−") == ""  # no TeX
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
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


@pytest.mark.parametrize(
    ("least", "most", "labels"),
    [
        (0.25, 0.9, "0.3 0.4 0.6"),
        (0.2, 7.0, "0.3 1 3"),
        (3e-5, 4e-4, "3e-05 0.0001 0.0003"),
        (2.0, 9e5, "10 1000 100000"),
    ],
)
def test_labels_of_a_logarithmic_axis_are_plain_and_apart(least: float, most: float, labels: str):
    axes = Figure(figsize=(8, 1.2)).subplots()
    axes.set(yscale="log", ylim=(least, most))
    plot.label_plainly(axes)
    axes.figure.draw_without_rendering()
    ticks = axes.get_yticklabels(which="both")
    shown = {float(t.get_text()): t for t in ticks if t.get_text()}
    inside = [shown[value] for value in sorted(shown) if least <= value <= most]
    assert " ".join(tick.get_text() for tick in inside) == labels
    boxes = [tick.get_window_extent() for tick in inside]
    assert all(a.y1 < b.y0 for a, b in itertools.pairwise(boxes))


def test_margins_do_not_depend_on_the_users_layout():
    usual = plot.draw_run([], "run")
    with mpl.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = plot.draw_run([], "run")
        chosen.draw_without_rendering()
    places = [[axes.get_position().bounds for axes in each.axes] for each in (usual, chosen)]
    assert places[0] == places[1]


def test_a_long_title_loses_its_beginning():
    assert plot.label("runs/a") == "runs/a"
    assert plot.label("x" * 300 + "/end") == "..." + "x" * 63 + "/end"


@pytest.mark.parametrize(
    ("smoothing", "means"), [(5, [1.0, 3.0, 4.0, 19 / 3, 6.5]), (2, [1.0, 3.0, 4.4, 5.25, 19 / 3])]
)
def test_the_smoothed_loss_is_a_mean_on_both_sides(
    smoothing: int, means: list[float], monkeypatch: pytest.MonkeyPatch
):
    """By hand; the first value stays, and the last has the neighbors before it alone."""
    monkeypatch.setattr(plot, "SMOOTHING", smoothing)
    values = np.array([1.0, 2.0, np.nan, 6.0, 4.0, 9.0])
    assert plot.smooth(values) == pytest.approx([*means[:2], np.nan, *means[2:]], nan_ok=True)


def test_the_clipping_threshold_and_a_smoothed_loss_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Figure] = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    records = [
        {"step": n, "loss": 3.0 + n % 2, "learning_rate": 1e-3, "grad_norm": 0.7}
        for n in range(1, 401)
    ]
    plot.plot_run(records, tmp_path / "loss.png", "run", clip=0.5)
    plot.plot_run(records[:100], tmp_path / "loss.png", "run")
    (loss, _, norm), (short, _, unclipped) = (figure.axes for figure in drawn)
    assert set(norm.lines[1].get_ydata()) == {0.5}
    assert [line.get_label() for line in loss.lines][1] == "training, mean of 9 updates"
    assert abs(loss.lines[1].get_ydata()[200] - 3.5) < 0.1
    assert (len(short.lines), len(unclipped.lines)) == (2, 1)
