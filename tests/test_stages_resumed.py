"""Comparisons with two stages that are stopped and resumed, or extended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comparing import Make, Trainer, compare, write
from test_stages import ALWAYS, ARMS, EDGES, FIRST, disagree, first_contrast, tree

from gpt.compare import comparison
from gpt.compare.grid import load
from gpt.errors import InputError, StoppedError


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """Post-norm always fails, and pre-norm never."""
    trainer.edges = EDGES
    return trainer


def files(directory: Path) -> list[str]:
    texts = [(directory / name).read_text() for name in ("summary.json", "cells.csv")]
    return [re.sub('"registered": .*', "", text) for text in texts]


@pytest.mark.parametrize(
    ("agreeing", "stops"), [(True, [2 * FIRST - 1]), (False, [1, 2 * FIRST, 2 * FIRST + 1])]
)
def test_it_resumes_in_either_stage(
    tiny: Make, tmp_path: Path, trainer: Trainer, agreeing: bool, stops: list[int]
):
    if not agreeing:
        disagree(trainer)
    path = write(tmp_path / "grid.yaml", tree(tiny))
    compare(path, tmp_path / "whole")
    order, trainer.seen = trainer.seen, []
    for cells in stops:
        with pytest.raises(StoppedError):
            compare(path, tmp_path / "run", stop=lambda cells=cells: len(trainer.seen) >= cells)
        assert len(trainer.seen) == cells
    compare(path, tmp_path / "run")
    assert trainer.seen == order
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_other_arms_run_the_stages_that_the_first_contrast_has(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    path = write(tmp_path / "grid.yaml", tree(tiny))
    compare(path, tmp_path / "run")
    trainer.edges = {**trainer.edges, "peri": (ALWAYS,) * 10}
    more = {arm: {"model.norm.placement": arm} for arm in (*ARMS, "peri")}
    grown = write(tmp_path / "more.yaml", tree(tiny, arms={"placement": more}))
    found = compare(grown, tmp_path / "run", extend=True)
    assert [cell[:4] for cell in trainer.seen[2 * FIRST :]] == ["peri"] * FIRST
    assert first_contrast(found).confirmatory
    assert found.lost == {}


def test_seeds_are_not_added_to_a_comparison_that_has_stopped(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    compare(write(tmp_path / "grid.yaml", tree(tiny)), tmp_path / "run")
    more = load(write(tmp_path / "more.yaml", tree(tiny, seeds=10)))
    with pytest.raises(InputError, match="its first stage answered the first contrast"):
        comparison.check_directory(*more, tmp_path / "run", extend=True)
    assert len(trainer.seen) == 2 * FIRST


def test_added_seeds_run_in_the_second_stage(tiny: Make, tmp_path: Path, trainer: Trainer):
    disagree(trainer)
    compare(write(tmp_path / "grid.yaml", tree(tiny)), tmp_path / "run")
    found = compare(
        write(tmp_path / "more.yaml", tree(tiny, seeds=10)), tmp_path / "run", extend=True
    )
    assert first_contrast(found).seeds == 10
    assert not first_contrast(found).confirmatory
    for changes in ({"seeds": [9, *range(9)]}, {"first_stage": 7}, {"first_stage": None}):
        other = load(write(tmp_path / "other.yaml", tree(tiny, **{"seeds": 10, **changes})))
        with pytest.raises(InputError, match="first_stage: neither it nor its seeds can change"):
            comparison.check_directory(*other, tmp_path / "run", extend=True)
