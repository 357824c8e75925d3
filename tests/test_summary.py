"""What may be said of outcomes: arms, contrasts, and words bounded by intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from gpt import schedule
from gpt.compare.analysis.outcomes import (
    EXTREMES,
    RESULT_COLUMNS,
    WORST_COLUMNS,
    Outcome,
    column_value,
)
from gpt.compare.analysis.results import Summary
from gpt.compare.analysis.statistics import (
    Interval,
    Threshold,
    holm,
    lr50,
    mean_interval,
    newcombe,
)
from gpt.compare.analysis.summary import summarize
from gpt.compare.analysis.verdicts import Verdict
from gpt.compare.analysis.wording import (
    failures_text,
    limits,
    lr50_text,
    margins_text,
    rates_text,
    threshold_text,
)
from gpt.compare.execution.cell_runs import CellError
from gpt.compare.grid import Cell, Column, Grid
from gpt.compare.registration import Registered
from gpt.compare.report.cells_csv import csv_row, csv_text
from gpt.config import Config, validate

RATES = (1e-3, 1e-2, 1e-1, 1.0)
VOCABULARY = 256
CAP = math.log(VOCABULARY)
ARMS = ("pre, cold", "pre, warm", "post, cold", "post, warm")


def grid(**changes: Any) -> Grid:
    tree: dict[str, Any] = {
        "base": {},
        "arms": {
            "placement": {"pre": {}, "post": {"model.norm.placement": "post"}},
            "warm-up": {"cold": {"schedule.warmup": "none"}, "warm": {}},
        },
        "grid": {"optimizer.learning_rate": list(RATES)},
        "seeds": 6,
        "contrasts": [
            {
                "question": "Does it?",
                "measure": "log_lr50",
                "of": ["post, warm", "post, cold"],
                "against": ["pre, warm", "pre, cold"],
            }
        ],
        "pairs": [["post, cold", "pre, cold"]],
        **changes,
    }
    if any("model.layers" in (c.get("slope"), *c.get("at", ())) for c in tree["contrasts"]):
        tree["grid"]["model.layers"] = [2, 3, 4, 6, 8, 12]
    return validate(Grid, tree)


def outcome(
    arm: str,
    rate: float,
    seed: int,
    loss: float | None,
    *,
    status: str = "trained",
    layers: int = 0,
    falling: bool = False,
) -> Outcome:
    tree = {"seed": seed, "optimizer": {"learning_rate": rate}, "model": {"layers": layers or 6}}
    config = validate(Config, tree)
    setting = {"model.layers": layers} if layers else {}
    found = Verdict(
        status=status,  # type: ignore[arg-type]
        step=7 if status == "diverged" else None,
        layer=None,
        reason="by hand",
        still_falling=falling,
        fell_back=status == "regressed",
        initial_loss=5.0,
        final_val_loss=loss,
        best_val_loss=loss,
        final_train_loss=loss,
        loss_spikes=0,
        grad_spikes=0,
        loss_spike_score=0.0,
        grad_spike_score=0.0,
        early_rise=0.125,
        max_grad_norm=1.0,
        clipped=None,
        steps=10,
    )
    varied = {"optimizer.learning_rate": rate, **setting}
    cell = Cell(f"{arm}-{rate}-{seed}-{layers}", arm, varied, setting, config)
    return Outcome(cell, Path("nowhere"), found, unigram_entropy=3.3, vocabulary=VOCABULARY)


def outcomes(
    threshold: Callable[[str, int], float], seeds: int = 6, **options: Any
) -> list[Outcome]:
    """Runs that fail at and above a threshold of their arm and seed."""
    found = []
    for arm in ARMS:
        for seed in range(seeds):
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
    assert (arm.arm, arm.runs, arm.failures, arm.seeds) == ("post, cold", 24, 18, 6)
    assert [at.failures for at in arm.by_rate] == [0, 6, 6, 6]
    assert arm.by_rate[0].interval.high == pytest.approx(0.3903, abs=1e-4)
    assert arm.highest_stable_rate == 1e-3
    assert arm.lr50.rate == pytest.approx(10**-2.5, rel=0.2)
    assert (arm.best_rate, arm.best_loss) == (1e-3, 2.5)
    assert arm.lr_sensitivity == pytest.approx(0.75 * 0.9)
    assert arm.best_at_edge == 6
    assert any("a better one may lie beyond" in line for line in limits(grid(), summary(MOVED)))


def test_the_contrast_is_the_difference_of_two_shifts_of_log_lr50():
    found = summary(MOVED).contrasts[0]
    assert found is not None
    assert found.parts[1] == pytest.approx(0.0)
    assert found.value == pytest.approx(found.parts[0] - found.parts[1])
    assert found.parts[0] == pytest.approx(math.log(100), rel=0.15)
    assert found.interval is not None
    assert found.interval.low > 0
    assert found.answer == "supported"


def test_a_contrast_the_other_way_is_contradicted():
    turned = by_arm({"pre, cold": 0.01, "pre, warm": 1.0, "post, cold": 0.1, "post, warm": 0.1})
    found = summary(turned).contrasts[0]
    assert found is not None
    assert found.answer == "contradicted"
    assert "contradict" in summary(turned).conclusions[0]


def test_seeds_that_agree_are_still_uncertain_by_the_grids_spacing():
    one_step = by_arm({"pre, cold": 0.1, "pre, warm": 0.1, "post, cold": 0.01, "post, warm": 0.1})
    found = summary(one_step).contrasts[0]
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
    found = summary(by_arm(dict(zip(ARMS, thresholds, strict=True)))).contrasts[0]
    assert found is not None
    assert found.answer == answer
    assert len(found.bounds) >= 1
    assert found.interval is not None
    assert math.isinf(found.interval.high if answer == "supported" else found.interval.low)
    assert found.reach == (("at least", "") if answer == "supported" else found.reach)
    assert "at least" in found.reach


def test_failures_that_do_not_rise_with_the_rate_leave_the_question_open():
    runs = outcomes(MOVED)
    upside_down = [
        outcome(o.cell.arm, o.rate, o.seed, 3.4, status="plateaued" if o.rate < 0.05 else "trained")
        if o.cell.arm == "pre, cold"
        else o
        for o in runs
    ]
    found = summarize(grid(), upside_down).contrasts[0]
    assert found is not None
    assert found.answer == "open"
    assert "no single threshold" in found.bounds[0]


def test_failure_and_loss_are_paired_by_seed():
    contrast = {"question": "?", "of": ["post, cold", "pre, cold"]}
    runs = outcomes(lambda arm, seed: 0.01 if arm == "post, cold" and seed else 1.0)
    failure = summarize(grid(contrasts=[{**contrast, "measure": "failure"}]), runs).contrasts[0]
    assert failure is not None
    assert failure.value == pytest.approx(0.5 * 5 / 6)
    loss = summarize(grid(contrasts=[{**contrast, "measure": "loss"}]), runs).contrasts[0]
    assert loss is not None
    assert loss.value == pytest.approx(0.9 * 0.5 * 5 / 6)
    assert loss.interval is not None
    assert 0 <= loss.interval.low < loss.value < loss.interval.high


def test_a_contrasts_differences_are_taken_seed_by_seed():
    """Seeds that are good for one arm are bad for the other; ranks would agree exactly."""
    runs = [outcome("post, cold", 1e-3, seed, 2 + 0.1 * seed) for seed in range(6)]
    runs += [outcome("pre, cold", 1e-3, seed, 2 - 0.1 * seed) for seed in range(6)]
    contrast = {"question": "?", "measure": "loss", "of": ["post, cold", "pre, cold"]}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs).contrasts[0]
    expected = mean_interval([0.2 * seed for seed in range(6)])
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.interval is not None
    assert expected is not None
    assert found.interval.low == pytest.approx(expected.low)
    assert found.interval.high == pytest.approx(expected.high)


def test_a_diverged_run_counts_as_a_uniform_guess_whatever_its_first_loss():
    runs = [outcome("post, cold", 1e-3, seed, None, status="diverged") for seed in range(3)]
    runs[0] = replace(runs[0], verdict=replace(runs[0].verdict, initial_loss=7.0))
    assert [run.loss for run in runs] == [CAP] * 3
    arm = summarize(grid(contrasts=[], pairs=[]), runs).arms[0]
    assert arm.median_loss == CAP
    assert arm.failures == 3


def test_no_loss_is_above_that_of_a_uniform_guess():
    assert outcome("pre, cold", 1.0, 0, 9.0).loss == CAP
    assert outcome("pre, cold", 1.0, 0, 5.5).loss == 5.5


def test_lost_cells_are_in_no_number_and_are_named():
    runs = outcomes(MOVED)
    gone = Outcome(runs[0].cell, Path("nowhere"), None, CellError("killed", "by SIGKILL"))
    found = summarize(grid(), [gone, *runs[1:]])
    assert (found.planned, found.with_result) == (96, 95)
    assert found.lost == {runs[0].cell.id: "killed"}
    assert found.arms[0].lost == 1
    assert found.arms[0].by_rate[0].n == 5
    row = csv_row(gone)
    assert (row["status"], row["reason"]) == ("killed", "by SIGKILL")


def test_the_columns_of_cells_csv_and_their_order():
    """Measures of layers are at the end, and only those that some cell has."""
    runs = [outcome("pre, cold", 0.1, seed, 2.5) for seed in range(3)]
    runs[0] = replace(runs[0], verdict=None)
    runs[2] = replace(runs[2], extremes={"stream_rms": 1.0, "attention_entropy": 2.0})
    header, lost, *_, last = csv_text(runs).splitlines()
    assert header == (
        "id,optimizer.learning_rate,seed,arm,status,diverged_at,final_val_loss,best_val_loss,"
        "spikes,max_grad_norm,seconds,failed,seen_at,layer,initial_val_loss,capped_loss,"
        "final_train_loss,spike_score,grad_norm_spikes,grad_norm_spike_score,clipped,steps,"
        "still_falling,early_rise,reason,"
        "min_attention_entropy,max_stream_rms"
    )
    assert lost.endswith('"pre, cold",missing,,,,,,,,,,,,,,,,,,,,not run,,')
    assert last.endswith(",10,False,0.125,by hand,2.0,1.0")


def test_pairs_are_tested_seed_by_seed_and_corrected_together():
    runs = outcomes(MOVED)
    found = summarize(grid(pairs=[["post, cold", "pre, cold"], ["post, warm", "pre, warm"]]), runs)
    first, second = found.pairs
    assert first.loss.mean == pytest.approx(0.9 / 4)
    assert (first.loss.n, first.loss.p, first.loss.least_p) == (6, 1 / 32, 1 / 32)
    at = next(test for test in first.by_rate if test.rate == 1e-2)
    assert (at.failures.only_a, at.failures.only_b) == (6, 0)
    assert at.failures.p == 1 / 32
    assert at.failures.interval == newcombe(0, 6, 0, 0)
    assert [first.holm_p, second.holm_p] == holm([first.loss.p, second.loss.p])
    assert first.holm_p == 2 / 32  # two tests of the loss; failures at single rates are not tested


def test_pairs_with_rates_of_their_own_use_the_common_ones():
    runs = [outcome("post, cold", rate, s, 3.0) for rate in (1e-3, 1e-2) for s in range(3)]
    runs += [outcome("pre, cold", rate, s, 2.0) for rate in (1e-2, 1e-1) for s in range(3)]
    (pair,) = summarize(grid(contrasts=[]), runs).pairs
    assert [test.rate for test in pair.by_rate] == [1e-2]
    assert pair.loss.mean == 1.0
    assert pair.dropped == 2


def test_a_cell_that_was_not_run_takes_its_seed_from_all_arms_of_a_contrast():
    """Or else arms that are alike would differ by what is missing."""
    alike = outcomes(by_arm(dict.fromkeys(ARMS, 1.0)))
    left = [r for r in alike if not (r.cell.arm == "pre, cold" and r.rate == 1.0 and r.seed == 2)]
    contrast = {"question": "?", "measure": "failure", "of": ["post, cold", "pre, cold"]}
    found = summarize(grid(contrasts=[contrast]), left)
    assert found.contrasts[0] is not None
    assert found.contrasts[0].value == 0.0
    assert (found.contrasts[0].dropped, found.contrasts[0].dropped_seeds) == (0, 1)
    assert "1 seed is left out, because runs are missing" in found.conclusions[0]
    assert (found.pairs[0].loss.n, len(found.pairs[0].by_rate)) == (5, 4)


@pytest.mark.parametrize(("cost", "answer"), [(0.05, "open"), (1.5, "supported")])
def test_a_lost_run_counts_at_its_best_and_at_its_worst(cost: float, answer: str):
    """Its arm has the loss 2.5 + cost with all other seeds; a uniform guess has 5.5."""
    runs = losses({("post, cold", 1e-2): 2.5 + cost, ("post, warm", 1e-2): 2.5})
    gone = [
        replace(o, verdict=None, error=CellError("killed", "by SIGKILL"), vocabulary=2)
        if (o.cell.arm, o.seed) == ("post, cold", 3)
        else o
        for o in runs
    ]
    contrast = grid(contrasts=[LOSS], pairs=[])
    (found,) = summarize(contrast, gone).contrasts
    assert found is not None
    assert (found.answer, found.seeds, found.dropped) == (answer, 8, 0)
    ends = []
    for loss in (2.5 + cost, CAP):
        (there,) = summarize(
            contrast,
            [outcome(o.cell.arm, o.rate, o.seed, loss) if o.verdict is None else o for o in gone],
        ).contrasts
        assert there is not None
        assert there.interval is not None
        ends.append(there)
    low, high = ends
    assert found.interval == Interval(
        min(e.interval.low for e in ends if e.interval),
        max(e.interval.high for e in ends if e.interval),
    )
    assert found.value == pytest.approx((low.value + high.value) / 2)
    assert found.p == max(low.p or 0, high.p or 0)
    assert found.bounds == (
        "1 run without a result counts at its best and at its worst: "
        f"{low.value:+.3f} to {high.value:+.3f} nats",
    )


def test_a_lost_run_of_the_arm_that_is_subtracted_turns_the_bounds():
    runs = outcomes(by_arm(dict.fromkeys(ARMS, 0.0)), seeds=8)
    contrast = {**LOSS, "measure": "failure"}
    gone = [
        replace(o, verdict=None, error=CellError("out of memory", "5 GB"))
        if (o.cell.arm, o.seed, o.rate) == ("post, warm", 3, 1.0)
        else o
        for o in runs
    ]
    (found,) = summarize(grid(contrasts=[contrast], pairs=[]), gone).contrasts
    assert found is not None
    assert found.value == pytest.approx(1 / 4 / 8 / 2)  # at its worst it failed, like all others
    assert found.answer == "open"
    assert found.bounds[0].endswith("at its worst: +0 to +3 percentage points")


def test_a_cell_that_was_not_run_and_one_of_another_measure_are_left_out():
    runs = outcomes(MOVED)
    first = runs[0]
    for error, measure in ((None, "loss"), (CellError("killed", "by hand"), "sensitivity")):
        gone = [replace(first, verdict=None, error=error), *runs[1:]]
        contrast = {"question": "?", "measure": measure, "of": ["post, cold", "pre, cold"]}
        (found,) = summarize(grid(contrasts=[contrast], pairs=[]), gone).contrasts
        assert found is not None
        assert (found.dropped, found.dropped_seeds, found.bounds) == (0, 1, ())


def test_regret_is_to_the_best_of_all_arms_with_the_same_seed():
    """And a difference of regrets is one of losses."""
    runs = losses(
        {
            ("post, cold", 1e-3): 3.4,
            ("post, cold", 1e-2): 3.4,
            ("post, warm", 1e-3): 2.0,
            ("post, warm", 1e-2): 2.4,
        }
    )
    found = summarize(grid(contrasts=[LOSS], pairs=[]), runs)
    cold, warm = found.arms
    assert (cold.lr_sensitivity, warm.lr_sensitivity) == (0.0, pytest.approx(0.2))
    assert cold.regret == pytest.approx(1.4)
    assert warm.regret == pytest.approx(0.2)
    best = [2.0 + 0.01 * (-1) ** seed for seed in range(8)]
    expected = mean_interval([3.4 - loss for loss in best])
    assert cold.regret_interval is not None
    assert expected is not None
    assert cold.regret_interval.low == pytest.approx(expected.low)
    assert found.contrasts[0] is not None
    assert cold.regret - warm.regret == pytest.approx(found.contrasts[0].value)


def test_regret_is_within_a_setting():
    runs = [
        outcome("pre, cold", 0.1, 0, 2.0, layers=6),
        outcome("pre, cold", 0.1, 0, 3.0, layers=9),
    ]
    assert [a.regret for a in summarize(grid(contrasts=[], pairs=[]), runs).arms] == [0.0, 0.0]


def test_failures_are_counted_at_other_margins():
    """H₁ is 3.3."""
    ends = [(3.29, "plateaued"), (3.26, "plateaued"), (3.22, "trained"), (2.0, "regressed")]
    runs = [outcome("pre, cold", 0.1, s, loss, status=t) for s, (loss, t) in enumerate(ends)]
    runs.append(outcome("pre, cold", 0.1, 4, None, status="diverged"))
    runs += [outcome("pre, warm", 0.1, seed, 2.0) for seed in range(5)]
    found = summarize(grid(contrasts=[], pairs=[]), runs)
    assert found.arms[0].failures_at == {0.02: 3, 0.05: 4, 0.1: 5, 0.2: 5}
    assert found.arms[0].failures == 4
    assert margins_text(found) == (
        "Failed runs if the margin is 0.02, 0.05, 0.1 and 0.2 nats below H₁: 'pre, cold': "
        "3, 4, 5, 5. In all other arms, the number is the same at each margin."
    )
    same = summarize(grid(contrasts=[], pairs=[]), runs[5:])
    assert "does not matter here" in margins_text(same)


def test_an_lr50_of_seeds_with_different_rates_is_unclear():
    runs = [run for run in outcomes(MOVED) if run.seed < 2 or run.rate == 1e-2]
    arm = summarize(grid(contrasts=[], pairs=[]), runs).arms[2]
    assert (arm.lr50.bound, arm.lr50.unequal, arm.lr50_interval) == ("unclear", True, None)
    assert lr50_text(arm) == "not estimated, as the seeds differ in their rates"


def test_the_early_rise_of_an_arm_is_a_mean_over_its_runs():
    runs = [outcome("pre, cold", 0.1, seed, 2.5) for seed in range(3)]
    runs[0] = replace(runs[0], verdict=replace(runs[0].verdict, early_rise=0.375))
    runs[1] = replace(runs[1], verdict=replace(runs[1].verdict, early_rise=None))
    assert summarize(grid(contrasts=[], pairs=[]), runs).arms[0].early_rise == 0.25


def test_arms_without_a_common_rate_have_no_contrast():
    runs = [outcome("post, cold", 1e-3, s, 3.0) for s in range(6)]
    runs += [outcome("pre, cold", 1e-1, s, 2.0) for s in range(6)]
    contrast = {"question": "?", "of": ["post, cold", "pre, cold"]}
    found = summarize(grid(contrasts=[contrast]), runs)
    assert found.contrasts[0] is None
    assert found.pairs == ()
    assert "its arms have no runs in common" in found.conclusions[0]
    assert found.conclusions[1].startswith("No two arms ran at the same rate")


def test_a_contrast_of_lost_arms_is_said_and_does_not_fail():
    runs = [run for run in outcomes(MOVED) if run.cell.arm == "pre, cold"]
    contrast = {"question": "?", "of": ["post, warm", "post, cold"]}
    words = summarize(grid(contrasts=[contrast]), runs).conclusions
    assert "its arms have no runs in common" in words[0]
    assert words[1].startswith("No two arms ran at the same rate")


def test_a_seed_that_one_setting_lacks_is_not_an_error():
    runs = outcomes(MOVED, layers=6) + [r for r in outcomes(MOVED, layers=12) if r.seed]
    found = summarize(grid(), runs).contrasts[0]
    assert found is not None
    assert (found.seeds, found.dropped, found.dropped_seeds) == (5, 0, 1)


def test_a_run_not_finite_at_its_start_counts_as_knowing_nothing():
    run = outcome("pre, cold", 1.0, 0, None, status="diverged")
    assert run.verdict is not None
    lost = replace(run, verdict=replace(run.verdict, initial_loss=None))
    assert (lost.loss, lost.initial_loss) == (CAP, CAP)


def test_arms_are_described_by_medians_means_and_shares():
    runs = [
        outcome("pre, cold", rate, seed, loss)
        for seed, losses in enumerate([(2.0, 3.0), (2.2, 3.0), (2.6, 4.0), (2.2, 3.0), (2.2, 3.0)])
        for rate, loss in zip((1e-3, 1e-2), losses, strict=True)
    ]
    spiked = replace(runs[0], verdict=replace(runs[0].verdict, loss_spikes=1, clipped=0.5))
    rest = [replace(r, verdict=replace(r.verdict, clipped=0.1)) for r in runs[1:]]
    (arm,) = summarize(grid(contrasts=[], pairs=[]), [spiked, *rest]).arms
    assert (arm.by_rate[0].mean_loss, arm.by_rate[0].median_loss) == (pytest.approx(2.24), 2.2)
    assert arm.by_rate[0].loss_interval == mean_interval([2.0, 2.2, 2.6, 2.2, 2.2])
    assert (arm.best_rate, arm.best_loss) == (1e-3, 2.2)
    assert arm.median_loss == 2.8  # of 2, 2.2, 2.2, 2.2, 2.6, 3, 3, 3, 3 and 4
    assert arm.spiked == 1
    assert arm.clipped == pytest.approx((0.5 + 9 * 0.1) / 10)
    assert arm.initial_loss == 5.0
    config = runs[0].cell.config
    shares = [
        schedule.lr_multiplier(config.schedule, n, config.training.steps) for n in range(1, 1001)
    ]
    assert arm.summed_rate == pytest.approx(sum(shares))
    assert arm.lr50_interval is not None
    assert arm.lr50_interval.low == pytest.approx(1e-2)  # no run failed: it lies above
    assert arm.lr50_interval.high == math.inf


def test_settings_are_summarized_separately_and_their_contrasts_averaged():
    deep = outcomes(by_arm(dict(zip(ARMS, (0.1, 0.1, 0.01, 0.01), strict=True))), layers=12)
    shallow = outcomes(MOVED, layers=6)
    found = summarize(grid(), [*shallow, *deep])
    assert [(arm.arm, arm.setting) for arm in found.arms[:4]] == [(arm, "layers 6") for arm in ARMS]
    assert found.contrasts[0] is not None
    alone = summarize(grid(), shallow).contrasts[0]
    assert alone is not None
    assert found.contrasts[0].value == pytest.approx(alone.value / 2)


@pytest.mark.parametrize(
    ("failures", "n", "slow", "words"),
    [
        (0, 3, 0, "no failure in 3 seeds (at most 56%)"),
        (3, 3, 0, "failure in all 3 seeds (at least 44%)"),
        (3, 3, 2, "failure in all 3 seeds (at least 44%), 2 of which were still falling"),
        (1, 1, 0, "failure in 1 seed (at least 21%)"),
        (1, 3, 1, "1 failure in 3 seeds (6% to 79%), 1 of which was still falling"),
        (2, 3, 0, "2 failures in 3 seeds (21% to 94%)"),
    ],
)
def test_words_are_bounded_by_the_interval(failures: int, n: int, slow: int, words: str):
    runs = [
        outcome("pre, cold", 0.1, seed, 3.4, status=status, falling=seed < slow)
        for seed, status in enumerate(["plateaued"] * failures + ["trained"] * (n - failures))
    ]
    (at,) = summarize(grid(contrasts=[], pairs=[]), runs).arms[0].by_rate
    assert failures_text(at) == words
    assert (at.stuck, at.slow) == (failures - slow, slow)


def test_three_seeds_never_support_that_an_arm_does_not_fail():
    calm = summarize(grid(), outcomes(by_arm(dict.fromkeys(ARMS, math.inf)), seeds=3))
    assert calm.contrasts[0] is not None
    assert calm.contrasts[0].answer == "open"
    assert "no interval; 3 seeds)" in calm.conclusions[0]
    assert calm.conclusions[0].count("changes by an unknown factor") == 2
    assert "ratio" not in calm.conclusions[0]
    assert calm.conclusions[1] == "No run failed: no failure in 3 seeds (at most 56%) at each rate."


def test_the_bound_of_no_failure_is_that_of_the_fewest_seeds():
    runs = outcomes(by_arm(dict.fromkeys(ARMS, math.inf)))
    left = [r for r in runs if not (r.cell.arm == "post, warm" and r.rate == 1.0 and r.seed)]
    assert "no failure in 1 seed (at most 79%)" in summarize(grid(), left).conclusions[1]


@pytest.mark.parametrize("measure", ["log_lr50", "failure", "loss"])
@pytest.mark.parametrize(("seeds", "answer"), [(3, "open"), (5, "open"), (6, "supported")])
def test_few_seeds_settle_nothing_however_clear_they_are(measure: str, seeds: int, answer: str):
    """A paired test of five seeds gives p = 1/16 at least."""
    sure = by_arm({"pre, cold": 0.1, "pre, warm": 0.1, "post, cold": 1.0, "post, warm": 0.01})
    of = ["post, warm", "post, cold"] if measure != "log_lr50" else ["post, cold", "post, warm"]
    contrast = {"question": "?", "measure": measure, "of": of}
    found = summarize(grid(contrasts=[contrast]), outcomes(sure, seeds=seeds)).contrasts[0]
    assert found is not None
    assert (found.interval is None) == (seeds < 5)
    assert found.interval is None or found.interval.low > 0
    assert found.answer == answer
    assert ("too few to settle" in found.why) == (seeds == 5)
    assert ("needs at least 5 seeds" in found.why) == (seeds == 3)
    assert ("(p = " in found.why) == (seeds == 5 and measure != "log_lr50")  # which has no test


def test_the_conclusions_are_two_sentences():
    words = summary(MOVED).conclusions
    assert len(words) == 2
    assert "support the claim" in words[0]
    assert "At rate" in words[1]
    assert "'post, cold': failure in all 6 seeds (at least 61%)" in words[1]
    assert "chosen after the runs" in words[1]


def test_one_seed_gives_no_interval_and_no_answer():
    runs = [run for run in outcomes(MOVED) if run.seed == 0]
    found = summarize(grid(), runs)
    assert found.contrasts[0] is not None
    assert found.contrasts[0].interval is None
    assert found.contrasts[0].answer == "open"
    assert "these arms share one seed" in found.conclusions[0]


def test_an_arm_without_a_result_leaves_no_contrast():
    runs = [run for run in outcomes(MOVED) if run.cell.arm != "post, warm"]
    found = summarize(grid(), runs)
    assert found.contrasts[0] is None
    assert "cannot be computed" in found.conclusions[0]


def test_arms_that_fail_equally_often_are_not_distinguished():
    words = summary(by_arm(dict.fromkeys(ARMS, 0.0))).conclusions
    assert words[1] == (
        "At every rate tried, the same fraction of each arm's runs failed: their failures do not "
        "tell the arms apart."
    )


@pytest.mark.parametrize(
    ("bound", "text"),
    [("", "0.05"), ("above", "above 0.05"), ("below", "below 0.05"), ("unclear", "unclear")],
)
def test_a_threshold_is_given_with_its_bound(bound: str, text: str):
    assert threshold_text(Threshold(0.05, bound, None, None)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.2, 5, "0.2 to 5"), (0.2, math.inf, "0.2 or more"), (0, 5, "5 or less")],
)
def test_an_open_end_of_an_interval_of_rates_is_named(low: float, high: float, text: str):
    assert rates_text(Interval(low, high)) == text


def test_a_measures_question_is_answered_in_its_own_unit():
    contrast = {"question": "?", "measure": "loss", "of": ["post, cold", "pre, cold"]}
    (answer, _) = summary(MOVED, contrasts=[contrast]).conclusions
    assert answer.startswith(
        "YES: the mean loss changes by +0.225 nats from 'pre, cold' to 'post, cold'"
    )
    contrast["measure"] = "failure"
    (answer, _) = summary(MOVED, contrasts=[contrast]).conclusions
    assert answer.startswith(
        "YES: the fraction of failed runs changes by +25 percentage points from 'pre, cold'"
    )
    both = {"of": ["post, cold", "pre, cold"], "against": ["post, warm", "pre, warm"]}
    (answer, _) = summary(MOVED, contrasts=[{**contrast, **both}]).conclusions
    assert "changes by +25 percentage points from 'pre, cold' to 'post, cold', and by " in answer


# ---------------------------------------------------------------------------------------------
# Several contrasts: where they are made, what they claim, and their order

LOSS = {"question": "?", "measure": "loss", "of": ["post, cold", "post, warm"]}


def losses(values: dict[tuple[str, float], float], seeds: int = 8) -> list[Outcome]:
    """Runs of each arm and rate with a loss that varies a little between seeds."""
    return [
        outcome(arm, rate, seed, loss + 0.01 * (-1) ** seed * arm.endswith("warm"))
        for (arm, rate), loss in values.items()
        for seed in range(seeds)
    ]


def answers(runs: list[Outcome], *contrasts: dict[str, Any]) -> list[str]:
    found = summarize(grid(contrasts=list(contrasts), pairs=[]), runs)
    return [result.answer for result in found.contrasts if result is not None]


def test_a_contrast_at_fixed_rates_uses_no_others():
    runs = losses(
        {
            ("post, cold", 1e-2): 3.0,
            ("post, warm", 1e-2): 2.0,
            ("post, cold", 1e-1): 2.0,
            ("post, warm", 1e-1): 3.0,
        }
    )
    everywhere = summarize(grid(contrasts=[LOSS], pairs=[]), runs).contrasts[0]
    at = {**LOSS, "at": {"optimizer.learning_rate": [0.01]}}
    there = summarize(grid(contrasts=[at], pairs=[]), runs).contrasts[0]
    assert everywhere is not None
    assert there is not None
    assert everywhere.value == pytest.approx(0.0, abs=0.02)
    assert there.value == pytest.approx(1.0, abs=0.02)
    assert (there.answer, there.seeds, there.p) == ("supported", 8, 2 / 2**8)


def test_arms_can_be_compared_each_at_its_own_rate():
    runs = losses({("post, cold", 1e-3): 2.6, ("post, warm", 1e-2): 2.4, ("post, warm", 1e-3): 9.0})
    own = {**LOSS, "rates": {"post, cold": 1e-3, "post, warm": 1e-2}}
    found = summarize(grid(contrasts=[own], pairs=[]), runs).contrasts[0]
    assert found is not None
    assert found.value == pytest.approx(0.2, abs=0.02)
    assert (found.answer, found.dropped) == ("supported", 0)


@pytest.mark.parametrize(
    ("claim", "margin", "cost", "answer"),
    [
        ("above", 0.0, 0.02, "supported"),
        ("above", 0.05, 0.02, "contradicted"),
        ("below", 0.05, 0.02, "supported"),  # not worse by the margin, though worse
        ("below", 0.05, 0.0, "supported"),
        ("below", 0.05, 0.05, "open"),
        ("below", 0.05, 0.08, "contradicted"),
        ("within", 0.05, 0.02, "supported"),
        ("within", 0.05, -0.02, "supported"),
        ("within", 0.05, -0.05, "open"),
        ("within", 0.05, 0.08, "contradicted"),
        ("within", 0.05, -0.08, "contradicted"),
    ],
)
def test_a_claim_is_judged_at_its_margin(claim: str, margin: float, cost: float, answer: str):
    runs = losses({("post, cold", 1e-2): 2.5 + cost, ("post, warm", 1e-2): 2.5})
    assert answers(runs, {**LOSS, "claim": claim, "margin": margin}) == [answer]


def test_sensitivity_is_contrasted_seed_by_seed():
    """Excess over the best rate, 0 and 1 for one arm, 0 and 0.4 for the other."""
    runs = losses(
        {
            ("post, cold", 1e-3): 2.0,
            ("post, cold", 1e-2): 3.0,
            ("post, warm", 1e-3): 2.0,
            ("post, warm", 1e-2): 2.4,
        }
    )
    contrast = {**LOSS, "measure": "sensitivity"}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs).contrasts[0]
    assert found is not None
    assert found.value == pytest.approx(0.3)


def test_a_column_is_contrasted_seed_by_seed_and_its_log_as_a_factor():
    runs = losses({("post, cold", 1e-2): 2.5, ("post, warm", 1e-2): 2.5})
    runs = [
        replace(run, extremes={"stream_rms": (3 if run.cell.arm == "post, cold" else 1) + run.seed})
        for run in runs
    ]
    contrast = {**LOSS, "measure": "column", "column": "max_stream_rms"}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs)
    assert found.contrasts[0] is not None
    assert found.contrasts[0].value == pytest.approx(2)
    assert "the mean of max_stream_rms changes by +2 from" in found.conclusions[0]
    logs = summarize(grid(contrasts=[{**contrast, "measure": "log_column"}], pairs=[]), runs)
    assert logs.contrasts[0] is not None
    seeds = {run.seed for run in runs}
    mean = sum(math.log((3 + seed) / (1 + seed)) for seed in seeds) / len(seeds)
    assert logs.contrasts[0].value == pytest.approx(mean)
    assert f"max_stream_rms rises {math.exp(mean):.2g}-fold" in logs.conclusions[0]


def test_a_column_that_a_run_lacks_leaves_the_question_open():
    runs = losses({("post, cold", 1e-2): 2.5, ("post, warm", 1e-2): 2.5})
    contrast = {**LOSS, "measure": "column", "column": "max_stream_rms"}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs)
    assert found.contrasts == (None,)
    assert "post, cold-0.01-0-0 has no value in column max_stream_rms" in found.conclusions[0]


def test_every_column_of_a_contrast_is_a_number_of_cells_csv():
    columns = get_args(Column)
    assert set(columns) <= {*RESULT_COLUMNS, *WORST_COLUMNS}
    assert set(WORST_COLUMNS) <= set(columns)
    run = replace(outcome(ARMS[0], 1e-2, 0, 2.5), extremes=dict.fromkeys(EXTREMES, 1.0))
    assert all(isinstance(column_value(run, column), float) for column in columns)


@pytest.mark.parametrize("measure", ["loss", "failure", "log_lr50", "sensitivity"])
def test_a_slope_is_that_of_the_measure_over_the_log_of_the_axis(measure: str):
    """Per unit of log depth, one arm's loss falls by 0.3 and its threshold by a factor."""
    runs = []
    for layers in (2, 4, 8):
        for seed in range(6):
            for rate in (1e-3, 1e-2, 1e-1, 1.0):
                for arm in ("post, cold", "post, warm"):
                    limit = 10.0 ** (1.5 - math.log2(layers)) if arm == "post, cold" else 2.0
                    loss = (
                        3.4
                        if rate > limit
                        else 2.0 - 0.3 * math.log(layers) * (arm == "post, cold")
                    )
                    status = "plateaued" if rate > limit else "trained"
                    runs.append(outcome(arm, rate, seed, loss, status=status, layers=layers))
    contrast = {**LOSS, "measure": measure, "at": {}, "slope": "model.layers", "claim": "below"}
    if measure == "loss":
        contrast["at"] = {"optimizer.learning_rate": [1e-3]}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs)
    result = found.contrasts[0]
    assert result is not None

    def of(arm: str, layers: int) -> float:
        some = [r for r in runs if (r.cell.arm, r.cell.setting["model.layers"]) == (arm, layers)]
        if measure == "loss":
            return sum(r.loss for r in some if r.rate == 1e-3) / 6
        if measure == "failure":
            return sum(r.failed for r in some) / len(some)
        if measure == "log_lr50":
            return math.log(lr50([r.rate for r in some], [r.failed for r in some]).rate)
        losses = {r.rate: r.loss for r in some}
        return sum(losses.values()) / len(losses) - min(losses.values())

    depths = (2, 4, 8)
    slopes = [
        float(np.polyfit(np.log(depths), [of(arm, layers) for layers in depths], 1)[0])
        for arm in contrast["of"]
    ]
    assert result.parts[0] == pytest.approx(slopes[0] - slopes[1])
    words = {
        "loss": "the slope of the mean loss over the log of layers changes by -0.300 nats",
        "failure": "the slope of the fraction of failed runs over the log of layers",
        "log_lr50": "the exponent of the rate at which half of the runs fail as a power of layers",
        "sensitivity": "the slope of the sensitivity to the learning rate over the log of layers",
    }
    assert words[measure] in found.conclusions[0]


def test_after_a_question_that_is_not_settled_answers_are_exploratory():
    runs = losses({("post, cold", 1e-2): 2.6, ("post, warm", 1e-2): 2.5})
    other = {**LOSS, "of": ["post, warm", "post, cold"]}
    found = summarize(grid(contrasts=[LOSS, other, LOSS], pairs=[]), runs)
    results = [result for result in found.contrasts if result is not None]
    assert [r.answer for r in results] == ["supported", "contradicted", "supported"]
    assert [r.confirmatory for r in results] == [True, True, False]
    assert ["exploratory" in sentence for sentence in found.conclusions] == [
        False,
        False,
        True,
        False,
    ]


def test_a_difference_of_failures_is_uncertain_where_all_seeds_agree():
    """Eight of eight against none is not a difference of exactly one."""
    runs = outcomes(lambda arm, seed: 0.0 if arm == "post, cold" else math.inf, seeds=8)
    contrast = {**LOSS, "measure": "failure"}
    found = summarize(grid(contrasts=[contrast], pairs=[]), runs).contrasts[0]
    assert found is not None
    assert (found.value, found.answer) == (1.0, "supported")
    assert found.interval is not None
    assert found.interval.low < 0.7


def test_failures_are_reported_at_registered_rates_if_there_are_any():
    runs = outcomes(MOVED)
    at = {**LOSS, "at": {"optimizer.learning_rate": [0.1, 1.0]}}
    words = summarize(grid(contrasts=[at], pairs=[]), runs).conclusions[-1]
    assert words.startswith("At rate 0.1, where failures differ most among the registered rates")
    assert "'post, cold': failure in all 6 seeds" in words


def test_a_rate_that_was_the_only_one_was_not_chosen_after_the_runs():
    runs = outcomes(MOVED)
    at = {**LOSS, "at": {"optimizer.learning_rate": [0.1]}}
    words = summarize(grid(contrasts=[at], pairs=[]), runs).conclusions[-1]
    assert words.startswith("At rate 0.1, the only rate registered, 'post, cold': failure in all")
    one = [run for run in runs if run.rate == 0.1]
    words = summarize(grid(contrasts=[LOSS], pairs=[]), one).conclusions[-1]
    assert words.startswith("At rate 0.1, the only rate tried, 'post, cold': failure in all")


@pytest.mark.parametrize("measure", ["loss", "failure"])
def test_runs_that_learned_nothing_answer_nothing(measure: str):
    """Whatever their losses say, as 0.2 nats from H₁ to above it."""
    runs = [
        outcome(arm, rate, seed, 3.4 + 0.2 * (arm == "post, cold"), status="plateaued")
        for arm in ARMS
        for rate in RATES
        for seed in range(6)
    ]
    contrasts = [{**LOSS, "measure": measure}]
    found = summarize(grid(contrasts=contrasts, pairs=[]), runs)
    (result,) = found.contrasts
    assert result is not None
    assert (result.answer, result.learned) == ("open", False)
    assert found.conclusions[0].startswith(
        "NOT SETTLED: the runs are too short, or their learning rates are wrong: none of those"
    )
    assert "nats" not in found.conclusions[0]

    for arm, learned in (("pre, cold", False), ("post, cold", True)):  # of another arm, and its own
        one = [outcome(arm, RATES[0], 0, 2.0), *runs[1:]]
        (result,) = summarize(grid(contrasts=contrasts, pairs=[]), one).contrasts
        assert result is not None
        assert result.learned == learned


def test_rates_of_a_question_that_was_added_later_are_not_called_registered():
    at = {**LOSS, "at": {"optimizer.learning_rate": [0.1]}}
    late = Registered(late={0: "the question was added when results were known"})
    words = summarize(grid(contrasts=[at], pairs=[]), outcomes(MOVED), late).conclusions[-1]
    assert "registered" not in words
