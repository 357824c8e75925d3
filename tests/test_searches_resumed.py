"""Searches that are stopped and resumed, lose a run, or are extended."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from comparing import Make, Trainer, compare, write
from test_search import tree
from test_searches import EDGES, contents

from gpt.compare import comparison
from gpt.compare.grid import load
from gpt.errors import InputError, StoppedError

# Arm -> seed -> the highest rate at which its runs train.


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    trainer.edges = EDGES
    return trainer


def test_a_stopped_search_ends_like_an_uninterrupted_one(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 2})
    compare(path, tmp_path / "whole")
    order, trainer.seen = trainer.seen, []
    for cells in (1, 4, 6, 11):  # at the first, between rounds, and within them
        with pytest.raises(StoppedError):
            compare(path, tmp_path / "run", stop=lambda cells=cells: len(trainer.seen) >= cells)
        assert len(trainer.seen) == cells
    compare(path, tmp_path / "run")
    assert sorted(trainer.seen) == sorted(order)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    comparison.report(*load(path), tmp_path / "run")
    assert len(trainer.seen) == len(order)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_lost_run_leaves_a_bound_and_is_tried_again(tiny: Make, tmp_path: Path, trainer: Trainer):
    path = write(tmp_path / "grid.yaml", tree(tiny))
    trainer.lost = {"pre_learning-rate-0.01431_seed-0"}  # the second run of this search
    found = compare(path, tmp_path / "run")
    bounded = [each for each in found.searches if each.bound]
    assert len(bounded) == 1
    assert (bounded[0].arm, bounded[0].bound, bounded[0].rate) == (
        "pre",
        "above",
        pytest.approx(0.009155),
    )
    assert list(found.lost.values()) == ["out of memory"]
    (contrast,) = found.contrasts
    assert contrast is not None
    assert contrast.reach == ("at least",)
    assert contrast.interval is not None
    assert contrast.interval.high == math.inf
    assert contrast.bounds == ("pre, seed 0: above 0.009155, because a run has no result",)
    assert "becomes at least" in found.conclusions[0]
    assert trainer.seen.count(*trainer.lost) == 1
    again = comparison.report(*load(path), tmp_path / "run")
    assert again == found
    trainer.lost = set()
    retried = compare(path, tmp_path / "run").searches[0]
    assert (retried.low, retried.high, retried.monotone) == (0.009155, 0.01144, True)


def test_a_search_grows_by_arms_and_seeds_only(tiny: Make, tmp_path: Path, trainer: Trainer):
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 1})
    compare(path, tmp_path / "run")
    before = list(trainer.seen)
    more = load(write(tmp_path / "more.yaml", {**tree(tiny), "seeds": 2}))
    rules = {"start": {"pre": 0.01, "post": 0.003}, "most_runs": 9}
    other = load(write(tmp_path / "other.yaml", {**tree(tiny), "seeds": 2, "search": rules}))
    with pytest.raises(InputError, match="only the first rates of new arms can be added"):
        comparison.check_directory(*other, tmp_path / "run", extend=True)
    added = comparison.check_directory(*more, tmp_path / "run", extend=True).cells
    assert {cell.config.seed for cell in added} == {1}
    assert trainer.seen == before
    with pytest.raises(InputError, match="--reuse: a search chooses its cells"):
        comparison.dry_run(*more, tmp_path / "new", 1, reuse=[tmp_path / "run"])
    described = comparison.dry_run(*load(path), tmp_path / "run", 1)
    assert f"{len(before)} have a result already" in described
    fresh = comparison.dry_run(*load(path), tmp_path / "new", 1)
    assert "up to 16: 2 arms, 1 seed, up to 8 rates of each" in fresh
    assert "and up to 14 more, which searches choose" in fresh
