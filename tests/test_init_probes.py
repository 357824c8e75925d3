"""The networks of a comparison at initialization: which are measured, and which are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_probes
from test_summary import grid, outcome

from gpt.compare import grid as grids
from gpt.compare import init_probes
from gpt.compare.analysis.summary import summarize
from gpt.compare.figures import initialization as figures
from gpt.compare.figures.base import PlotData
from gpt.compare.init_probes import (
    InitProbe,
    measure_init_probes,
    read_init_probes,
    write_init_probes,
)
from gpt.compare.probes import probe_depths
from gpt.config import Config, ModelConfig, merge, validate
from gpt.config.shipped import names
from gpt.io.console import Console


@pytest.mark.slow
def test_the_networks_of_all_shipped_grids_can_be_measured(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Made small: four blocks, four channels, eight tokens of another text."""
    monkeypatch.setattr(init_probes, "DEPTHS", (4,))
    monkeypatch.setattr(init_probes, "probe_depths", partial(probe_depths, depths=(4,)))
    small: dict[str, Any] = {"layers": 4, "heads": 1, "width": 4, "context": 8}
    cells = []
    found = {(name, cell.arm): cell for name in names("grid") for cell in grids.load(name)[1]}
    for cell in found.values():
        base = {"mup_base_width": 2 if cell.config.model.mup_base_width else None}
        changes = {"data": tree["data"], "model": small | base}
        config = validate(Config, merge(cell.config.model_dump(), changes))
        cells.append(replace(cell, config=config))
    with few_probes():
        measured = measure_init_probes(cells)
    assert measured is not None
    arms = {cell.arm for cell in cells}
    assert {arm for each in measured for arm in each.arms} == arms
    write_init_probes(tmp_path, measured)
    assert read_init_probes(tmp_path, arms) == measured


def test_a_norm_over_several_tokens_has_no_probes_of_single_tokens():
    """Nor a curve in their figures, where the other arms keep theirs."""
    config = ModelConfig(heads=1, width=4, context=4)
    inputs, targets = torch.randint(9, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    text = tuple(probe_depths(config, 9, {0: [(inputs, targets)]}, (2, 4)))
    both = [InitProbe(("batch",), "gpt2", text, ()), InitProbe(("layer",), "gpt2", text, text)]
    levels = {name: {"model.norm.type": name} for name in ("batch", "layer")}
    compared = grid(arms={"norm": levels}, pairs=[], contrasts=[])
    data = PlotData(compared, summarize(compared, [outcome("layer", 0.01, 0, 2.0)]), [], both)
    for draw in (figures.gradient_by_depth, figures.amplification):
        drawn = draw(data)
        assert drawn is not None
        assert "layer" in drawn.alt
        assert "batch" not in drawn.alt
        assert draw(PlotData(compared, data.summary, [], both[:1])) is None
    everything = figures.start_by_layer(data)
    assert everything is not None
    assert "batch" in everything.alt


def test_progress_is_shown(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(init_probes, "PRINT_EVERY", 0.0)
    monkeypatch.setattr(init_probes, "DEPTHS", (1, 2))
    monkeypatch.setattr(init_probes, "probe_depths", partial(probe_depths, depths=(1, 2)))
    cells = [
        grids.Cell(id=name, arm=name, varied={}, setting={}, config=tiny(model={"bias": bias}))
        for name, bias in {"a": True, "b": False}.items()
    ]
    with few_probes():
        assert measure_init_probes(cells, console=Console())
    shown = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["block 1/6", "block 3/6", "block 4/6", "block 6/6"]


def test_arms_that_differ_only_in_their_batches_share_a_network(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(init_probes, "probe_depths", partial(probe_depths, depths=(1,)))
    cells = [
        grids.Cell(id=name, arm=name, varied={}, setting={}, config=tiny(data=data))
        for name, data in {"a": {}, "b": {"seed": 3}, "c": {"windows": "random"}}.items()
    ]
    with few_probes():
        (found,) = measure_init_probes(cells) or []
    assert found.arms == ("a", "b", "c")
