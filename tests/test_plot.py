"""A run's picture: what is written in it has room."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gpt import plot


@pytest.mark.parametrize("rate", [1.23e-4, 0.012, 30.0])
@pytest.mark.parametrize("norm", [3e-5, 0.3, 4e3])
@pytest.mark.parametrize("steps", [3, 500, 120_000])
def test_its_text_is_inside_it(
    rate: float, norm: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Figure] = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: drawn.append(figure))
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
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > 0
    assert box.x1 < width
    assert box.y1 < height
