"""What may be said of outcomes: arms, contrasts, and words bounded by intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.compare.grid import Cell, Grid
from gpt.compare.outcomes import Outcome, csv_rows
from gpt.compare.runner import Lost
from gpt.compare.statistics import wilson
from gpt.compare.summary import Summary, failures_text, summarize
from gpt.compare.verdicts import Verdict
from gpt.config import Config, validate

RATES = (1e-3, 1e-2, 1e-1, 1.0)
ARMS = ("pre, cold", "pre, warm", "post, cold", "post, warm")


def grid(**changes: Any) -> Grid:
    tree = {
        "base": {},
        "arms": {
            "placement": {"pre": {}, "post": {"model.norm.placement": "post"}},
            "warm-up": {"cold": {"schedule.warmup": "none"}, "warm": {}},
        },
        "grid": {"optimizer.learning_rate": list(RATES)},
        "seeds": 3,
        "contrast": {
            "question": "Does it?",
            "of": ["post, warm", "post, cold"],
            "against": ["pre, warm", "pre, cold"],
        },
        "pairs": [["post, cold", "pre, cold"]],
        **changes,
    }
    return validate(Grid, tree)


def outcome(
    arm: str,
    rate: float,
    seed: int,
    loss: float | None,
    *,
    status: str = "trained",
    layers: int = 0,
) -> Outcome:
    config = validate(Config, {"seed": seed, "optimizer": {"learning_rate": rate}})
    place = {"model.layers": layers} if layers else {}
    found = Verdict(
        status=status,  # type: ignore[arg-type]
        failed=status in ("plateaued", "diverged", "regressed"),
        step=7 if status == "diverged" else None,
        layer=None,
        reason="by hand",
        initial_loss=5.0,
        final_val_loss=loss,
        best_val_loss=loss,
        final_train_loss=loss,
        loss_spikes=0,
        grad_spikes=0,
        loss_spike_score=0.0,
        grad_spike_score=0.0,
        max_grad_norm=1.0,
        clipped=None,
        steps=10,
    )
    cell = Cell(
        f"{arm}-{rate}-{seed}-{layers}", arm, {"optimizer.learning_rate": rate}, place, config
    )
    return Outcome(cell, Path("nowhere"), found, unigram_entropy=3.3)


def outcomes(threshold: Callable[[str, int], float], **options: Any) -> list[Outcome]:
    """Runs that fail at and above a threshold of their arm and seed."""
    found = []
    for arm in ARMS:
        for seed in range(3):
            for rate in RATES:
                failed = rate >= threshold(arm, seed)
                status = "plateaued" if failed else "trained"
                found.append(
                    outcome(arm, rate, seed, 3.4 if failed else 2.5, status=status, **options)
                )
    return found


def summary(threshold: Callable[[str, int], float], **changes: Any) -> Summary:
    return summarize(grid(**changes), outcomes(threshold))


def by_arm(thresholds: dict[str, float]) -> Callable[[str, int], float]:
    return lambda arm, seed: thresholds[arm]


MOVED = by_arm({"pre, cold": 0.1, "pre, warm": 0.1, "post, cold": 0.01, "post, warm": 1.0})


def test_an_arm_is_counted_rate_by_rate():
    arm = summary(MOVED).arms[2]
    assert (arm.arm, arm.runs, arm.failures, arm.seeds) == ("post, cold", 12, 9, 3)
    assert [at.failures for at in arm.by_rate] == [0, 3, 3, 3]
    assert arm.by_rate[0].interval.high == pytest.approx(0.5615, abs=1e-4)
    assert arm.highest_stable_rate == 1e-3
    assert arm.lr50.rate == pytest.approx(10**-2.5, rel=0.2)
    assert (arm.best_rate, arm.best_loss) == (1e-3, 2.5)
    assert arm.lr_sensitivity == pytest.approx(0.75 * 0.9)
    assert arm.best_at_edge == 3


def test_the_contrast_is_the_difference_of_two_shifts_of_log_lr50():
    found = summary(MOVED).contrast
    assert found is not None
    assert found.parts[1] == pytest.approx(0.0)
    assert found.value == pytest.approx(found.parts[0] - found.parts[1])
    assert found.parts[0] == pytest.approx(math.log(100), rel=0.15)
    assert found.interval is not None
    assert found.interval.low > 0
    assert found.answer == "supported"


def test_a_contrast_the_other_way_is_contradicted():
    turned = by_arm({"pre, cold": 0.01, "pre, warm": 1.0, "post, cold": 0.1, "post, warm": 0.1})
    found = summary(turned).contrast
    assert found is not None
    assert found.answer == "contradicted"
    assert "contradict" in summary(turned).verdict[0]


def test_seeds_that_agree_are_still_uncertain_by_the_grids_spacing():
    one_step = by_arm({"pre, cold": 0.1, "pre, warm": 0.1, "post, cold": 0.01, "post, warm": 0.1})
    found = summary(one_step).contrast
    assert found is not None
    assert found.interval is not None
    assert found.interval.low < 0 < found.interval.high
    assert found.answer == "open"


@pytest.mark.parametrize(
    ("thresholds", "answer"),
    [
        # post, warm never fails: the true shift is larger still, so the claim stands
        ((0.1, 0.1, 0.01, math.inf), "supported"),
        # pre, warm never fails: its own shift may be larger than all that was seen
        ((0.1, math.inf, 0.01, 1.0), "open"),
        # post, cold always fails: its threshold is lower still, so the claim stands
        ((0.1, 0.1, 0.0, 1.0), "supported"),
        # pre, cold always fails: pre's own shift may be larger than all that was seen
        ((0.0, 1e-2, 1e-2, math.inf), "open"),
    ],
)
def test_a_bound_counts_only_where_it_cannot_turn_the_answer(
    thresholds: tuple[float, ...], answer: str
):
    found = summary(by_arm(dict(zip(ARMS, thresholds, strict=True)))).contrast
    assert found is not None
    assert found.answer == answer
    assert len(found.bounds) >= 1


def test_failures_that_do_not_rise_with_the_rate_leave_the_question_open():
    runs = outcomes(MOVED)
    upside_down = [
        outcome(o.cell.arm, o.rate, o.seed, 3.4, status="plateaued" if o.rate < 0.05 else "trained")
        if o.cell.arm == "pre, cold"
        else o
        for o in runs
    ]
    found = summarize(grid(), upside_down).contrast
    assert found is not None
    assert found.answer == "open"
    assert "no one threshold" in found.bounds[0]


def test_failure_and_loss_are_paired_by_seed():
    contrast = {"question": "?", "of": ["post, cold", "pre, cold"]}
    runs = outcomes(lambda arm, seed: 0.01 if arm == "post, cold" and seed else 1.0)
    failure = summarize(grid(contrast={**contrast, "measure": "failure"}), runs).contrast
    assert failure is not None
    assert failure.value == pytest.approx((0 + 0.5 + 0.5) / 3)
    loss = summarize(grid(contrast={**contrast, "measure": "loss"}), runs).contrast
    assert loss is not None
    assert loss.value == pytest.approx(0.9 * (0 + 0.5 + 0.5) / 3)
    assert loss.interval is not None
    assert 0 <= loss.interval.low < loss.value < loss.interval.high


def test_a_diverged_run_counts_as_its_first_loss():
    runs = [outcome("post, cold", 1e-3, seed, None, status="diverged") for seed in range(3)]
    assert [run.loss for run in runs] == [5.0] * 3
    arm = summarize(grid(contrast=None, pairs=[]), runs).arms[0]
    assert arm.median_loss == 5.0
    assert arm.failures == 3


def test_a_loss_above_the_first_one_counts_as_the_first():
    assert outcome("pre, cold", 1.0, 0, 9.0).loss == 5.0


def test_lost_cells_are_in_no_number_and_are_named():
    runs = outcomes(MOVED)
    gone = Outcome(runs[0].cell, Path("nowhere"), None, Lost("killed", "by SIGKILL"))
    found = summarize(grid(), [gone, *runs[1:]])
    assert (found.planned, found.with_result) == (48, 47)
    assert found.lost == {runs[0].cell.id: "killed"}
    assert found.arms[0].lost == 1
    assert found.arms[0].by_rate[0].n == 2
    row = csv_rows([gone])[0]
    assert (row["status"], row["reason"]) == ("killed", "by SIGKILL")


def test_pairs_are_tested_seed_by_seed_and_corrected_together():
    runs = outcomes(MOVED)
    found = summarize(grid(pairs=[["post, cold", "pre, cold"], ["post, warm", "pre, warm"]]), runs)
    first, second = found.pairs
    assert first.loss.mean == pytest.approx(0.9 / 4)
    assert (first.loss.n, first.loss.p, first.loss.least_p) == (3, 0.25, 0.25)
    at = next(test for test in first.by_rate if test.rate == 1e-2)
    assert (at.failures.only_a, at.failures.only_b) == (3, 0)
    assert at.failures.p == 0.25
    tests = 2 + len(first.by_rate) + len(second.by_rate)
    assert tests == 10
    assert first.holm_p == 1.0


def test_pairs_with_rates_of_their_own_use_the_common_ones():
    runs = [outcome("post, cold", rate, s, 3.0) for rate in (1e-3, 1e-2) for s in range(3)]
    runs += [outcome("pre, cold", rate, s, 2.0) for rate in (1e-2, 1e-1) for s in range(3)]
    (pair,) = summarize(grid(contrast=None), runs).pairs
    assert [test.rate for test in pair.by_rate] == [1e-2]
    assert pair.loss.mean == 1.0


def test_places_are_summarized_apart_and_their_contrasts_averaged():
    deep = outcomes(by_arm(dict(zip(ARMS, (0.1, 0.1, 0.01, 0.01), strict=True))), layers=12)
    shallow = outcomes(MOVED, layers=6)
    found = summarize(grid(), [*shallow, *deep])
    assert [(arm.arm, arm.place) for arm in found.arms[:4]] == [(arm, "layers 6") for arm in ARMS]
    assert found.contrast is not None
    alone = summarize(grid(), shallow).contrast
    assert alone is not None
    assert found.contrast.value == pytest.approx(alone.value / 2)


@pytest.mark.parametrize(
    ("failures", "n", "words"),
    [
        (0, 3, "no failure in 3 seeds (at most 56%)"),
        (3, 3, "failure in all of 3 seeds (at least 44%)"),
        (1, 1, "failure in 1 seed (at least 21%)"),
        (1, 3, "1 failure in 3 seeds (6% to 79%)"),
        (2, 3, "2 failures in 3 seeds (21% to 94%)"),
    ],
)
def test_words_are_bounded_by_the_interval(failures: int, n: int, words: str):
    assert failures_text(failures, n, wilson(failures, n)) == words


def test_three_seeds_never_support_that_an_arm_does_not_fail():
    for sentence in summary(by_arm(dict.fromkeys(ARMS, math.inf))).verdict:
        assert "never" not in sentence
        assert "does not" not in sentence
    last = summary(by_arm(dict.fromkeys(ARMS, math.inf))).verdict[1]
    assert last.startswith("No run failed")
    assert "at most 56%" in last


def test_the_verdict_is_two_sentences():
    words = summary(MOVED).verdict
    assert len(words) == 2
    assert "support the claim" in words[0]
    assert "At rate" in words[1]
    assert "post, cold: failure in all of 3 seeds (at least 44%)" in words[1]


def test_one_seed_gives_no_interval_and_no_answer():
    runs = [run for run in outcomes(MOVED) if run.seed == 0]
    found = summarize(grid(), runs)
    assert found.contrast is not None
    assert found.contrast.interval is None
    assert found.contrast.answer == "open"
    assert "one seed gives no interval" in found.verdict[0]


def test_an_arm_without_a_result_leaves_no_contrast():
    runs = [run for run in outcomes(MOVED) if run.cell.arm != "post, warm"]
    found = summarize(grid(), runs)
    assert found.contrast is None
    assert "could not be computed" in found.verdict[0]
