"""Two stages: the rule and its levels, and comparisons that follow it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import Make, Trainer, called, compare, grid_tree, write
from test_summary import grid, outcome

from gpt.compare import comparison, registration
from gpt.compare.analysis.results import ContrastResult, Summary
from gpt.compare.analysis.stages import decide, level
from gpt.compare.analysis.statistics import fraction_interval, least_p, mean_interval
from gpt.compare.analysis.summary import summarize
from gpt.compare.grid import load
from gpt.errors import InputError, StoppedError

ARMS = ("pre", "post")
SEEDS, FIRST = 8, 6
ALWAYS, NEVER = 1.0, 0.0  # the highest rate at which runs train; they run at 0.01
EDGES = {"pre": (ALWAYS,) * 10, "post": (NEVER,) * 10}


@pytest.mark.parametrize(
    ("differences", "margin", "decision"),
    [
        ([0.11, 0.12, 0.13, 0.11, 0.12, 0.13], 0.0, "answered"),
        ([-0.11, -0.12, -0.13, -0.11, -0.12, -0.13], 0.0, "answered"),  # with NO
        ([0.11, 0.12, 0.13, 0.11, 0.12, 0.13], 0.1, "answered"),
        ([0.11, 0.12, 0.13, 0.11, 0.12, -0.01], 0.0, "open"),
        ([0.11, 0.12, 0.13, 0.11, 0.12, 0.0], 0.0, "open"),
        ([0.11, 0.12, 0.13, 0.11, 0.12, 0.13], 0.12, "open"),
        ([0.05, 0.06, 0.04, 0.05, 0.06, 0.9], 0.0, "open"),  # the interval contains 0
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0.0, "open"),
    ],
)
def test_it_stops_if_the_first_contrast_is_answered(
    differences: list[float], margin: float, decision: str
):
    contrast = {"question": "?", "of": ["post, cold", "pre, cold"], "margin": margin}
    compared = grid(contrasts=[contrast], pairs=[], seeds=SEEDS, first_stage=FIRST)
    runs = [outcome("pre, cold", 0.1, seed, 2.5) for seed in range(FIRST)]
    runs += [outcome("post, cold", 0.1, s, 2.5 + each) for s, each in enumerate(differences)]
    assert decide(compared, runs) == decision
    (result,) = summarize(compared, runs).contrasts
    assert result is not None
    assert (result.answer == "open") == (decision == "open")


def test_the_levels_add_up():
    assert (level(None, None), level(6, "answered")) == (0.05, 2 / 64)
    for decision in ("undecided", "open", "a run was lost", "the second has results"):
        assert level(6, decision) == 0.05 - 2 / 64


@pytest.mark.parametrize(("first", "seeds"), [(6, 7), (6, 10), (8, 11)])
def test_the_rule_errs_in_at_most_five_percent_of_all_signs(first: int, seeds: int):
    """Without an effect all signs of given differences are equally likely: count the rejections."""
    sizes = np.random.default_rng(seeds).lognormal(sigma=0.2, size=seeds)
    signs = np.array(list(itertools.product((-1, 1), repeat=seeds)))
    sums = np.abs(signs @ sizes)
    p = (sums[None, :] >= sums[:, None] * (1 - 1e-12)).mean(axis=1)
    stops = np.abs(signs[:, :first].sum(1)) == first  # the only ones that reach the level
    interval = mean_interval(sizes[:first].tolist(), level(first, "answered"))
    assert interval is not None
    assert interval.low > 0  # so all of them are answered
    rejected = np.where(stops, True, p <= level(first, "open"))
    assert stops.mean() == level(first, "answered") == least_p(first)
    assert stops.mean() <= rejected.mean() <= 0.05


# ---------------------------------------------------------------------------------------------
# Comparisons


def tree(tiny: Make, **changes: Any) -> dict[str, Any]:
    base = tiny(sampling={"tokens": 0}, training={"steps": 20}, evaluation={"every": 20})
    asked = [
        {"question": "Does it fail?", "of": ["post", "pre"], "measure": measure}
        for measure in ("failure", "loss")
    ]
    return grid_tree(
        base,
        **{
            "arms": {"placement": {arm: {"model.norm.placement": arm} for arm in ARMS}},
            "grid": {"optimizer.learning_rate": [0.01]},
            "seeds": SEEDS,
            "first_stage": FIRST,
            "probes": False,
            "contrasts": asked,
            "pairs": [],
            **changes,
        },
    )


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """Post-norm always fails, and pre-norm never."""
    trainer.edges = EDGES
    return trainer


def disagree(trainer: Trainer) -> None:
    """Neither arm fails with seed 3."""
    trainer.edges = {**trainer.edges, "post": (NEVER,) * 3 + (ALWAYS,) + (NEVER,) * 6}


def first_contrast(found: Summary) -> ContrastResult:
    assert found.contrasts[0] is not None
    return found.contrasts[0]


def test_it_stops_where_all_differences_agree(
    tiny: Make, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "grid.yaml", tree(tiny))
    code, out, err = called(capsys, path, "--out-dir", tmp_path / "run")
    assert code == 0
    assert len(trainer.seen) == 2 * FIRST
    said = " ".join(err.split())
    assert "up to 16: 2 arms, 8 seeds (stops after 6 if they answer the first contrast)" in said
    assert "no result" not in out
    found = comparison.report(*load(path), tmp_path / "run")
    assert (found.planned, found.with_result, found.lost) == (2 * FIRST, 2 * FIRST, {})
    result = first_contrast(found)
    assert (result.seeds, result.alpha, result.p) == (FIRST, 2 / 64, 2 / 64)
    assert result.interval == fraction_interval([1.0] * FIRST, alpha=2 / 64)
    assert result.answer == "supported"
    assert [each and (each.confirmatory, each.alpha) for each in found.contrasts] == [
        (True, 2 / 64),
        (True, 2 / 64),
    ]
    words = "Stopped after the first stage of 6 seeds, which answered the first contrast"
    assert words in out
    assert "96.9% interval" in out
    for name in ("report.html", "report.md"):
        text = (tmp_path / "run" / name).read_text()
        assert words in text
        assert "96.9%" in text
        assert "no result" not in text
    assert "all 12 cells have a result" in called(capsys, path, "--out-dir", tmp_path / "run")[2]
    assert len(trainer.seen) == 2 * FIRST


def test_it_runs_all_seeds_where_they_do_not(tiny: Make, tmp_path: Path, trainer: Trainer):
    disagree(trainer)
    found = compare(write(tmp_path / "grid.yaml", tree(tiny)), tmp_path / "run")
    assert [cell[-1] for cell in trainer.seen[2 * FIRST :]] == ["6", "6", "7", "7"]
    assert found.with_result == len(trainer.seen) == 2 * SEEDS
    result = first_contrast(found)
    assert (result.seeds, result.alpha, result.p) == (SEEDS, 0.05 - 2 / 64, 2 / 128)
    expected = fraction_interval([1.0] * 3 + [0.0] + [1.0] * 4, alpha=0.05 - 2 / 64)
    assert result.interval == expected
    assert result.answer == "supported"
    assert found.stages.startswith("Not stopped after the first stage of 6 seeds, which left the")
    assert "98.1% interval" in found.conclusions[0]


def test_a_report_before_the_first_stage_ends(tiny: Make, tmp_path: Path, trainer: Trainer):
    path = write(tmp_path / "grid.yaml", tree(tiny))
    with pytest.raises(StoppedError):
        compare(path, tmp_path / "run", stop=lambda: len(trainer.seen) >= 3)
    found = comparison.report(*load(path), tmp_path / "run")
    assert found.stages == "The first stage of 6 seeds has not ended."
    assert (found.planned, found.with_result) == (2 * FIRST, 3)


def test_a_lost_run_continues_it_for_good(tiny: Make, tmp_path: Path, trainer: Trainer):
    trainer.lost = {"pre_learning-rate-0.01_seed-2"}
    path = write(tmp_path / "grid.yaml", tree(tiny))
    found = compare(path, tmp_path / "run")
    assert first_contrast(found).alpha == 0.05 - 2 / 64
    assert "the first stage of 6 seeds, in which a run was lost" in found.stages
    assert len(trainer.seen) == 2 * SEEDS
    trainer.lost = set()
    retried = compare(path, tmp_path / "run")
    assert "later seeds had run before its end" in retried.stages
    assert retried.with_result == 2 * SEEDS
    assert (first_contrast(retried).seeds, first_contrast(retried).alpha) == (8, 0.05 - 2 / 64)


def test_a_dry_run_and_reuse(tiny: Make, tmp_path: Path, trainer: Trainer):
    grid, cells = load(write(tmp_path / "grid.yaml", tree(tiny)))
    text = comparison.dry_run(grid, cells, tmp_path / "run", 1)
    assert "and up to 4 more, which run unless the first stage ends the comparison" in text
    assert text.count("_seed-") == 2 * FIRST
    assert registration.fingerprint(grid.contrasts, grid.seeds, None, FIRST) in text
    with pytest.raises(InputError, match="--reuse: a comparison with a first stage chooses"):
        comparison.dry_run(grid, cells, tmp_path / "run", 1, reuse=[tmp_path])
    compare(tmp_path / "grid.yaml", tmp_path / "run")
    assert "which run unless" not in comparison.dry_run(grid, cells, tmp_path / "run", 1)
    written = json.loads((tmp_path / "run/registration.json").read_text())
    assert written["sha256"] == registration.fingerprint(grid.contrasts, grid.seeds, None, FIRST)
    assert written["sha256"] != registration.fingerprint(grid.contrasts, grid.seeds)


ASK: dict[str, Any] = {"question": "?", "of": ARMS}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_stage": 5}, "first_stage: 5 is not between 6 and 16"),
        ({"first_stage": 8}, "first_stage: 8 is not below the number of seeds, 8"),
        ({"contrasts": []}, "first_stage: needs a contrast"),
        ({"contrasts": [{**ASK, "claim": "within", "margin": 1}]}, "the claim above or below"),
        ({"contrasts": [{**ASK, "measure": "log_lr50"}]}, "a value for each seed (not log_lr50)"),
        (
            {
                "contrasts": [{**ASK, "measure": "log_threshold"}],
                "grid": {},
                "search": {"start": 0.01},
            },
            "first_stage: cannot be combined with a search",
        ),
    ],
)
def test_a_wrong_first_stage_is_refused(
    tiny: Make, tmp_path: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path / "grid.yaml", tree(tiny, **changes)))
    assert words in str(caught.value)


def test_a_flag_cannot_leave_too_few_seeds(tiny: Make, tmp_path: Path):
    with pytest.raises(InputError, match="6 is not below the number of seeds, 4"):
        load(write(tmp_path / "grid.yaml", tree(tiny)), seeds="4")
