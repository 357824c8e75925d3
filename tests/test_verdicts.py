"""Verdicts: series with planted spikes, and hand-made records of runs that end in every way.

With noise of ±a around a level, a window of an even number K of updates has exactly that level as
its mean and a sqrt(K / (K - 1)) as its standard deviation: hence the thresholds below. Runs have
400 updates unless stated otherwise, so K = 20.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest

from gpt.compare.analysis.verdicts import (
    FAILED,
    Status,
    Verdict,
    early_rise,
    spike_score,
    spikes,
    still_falling,
    verdict,
)
from gpt.metrics import Record

H1 = 3.341


def alternating(level: float, count: int, noise: float = 0.05) -> list[float]:
    return [level + noise * (-1) ** i for i in range(count)]


def records(
    losses: list[Any], val: float | None = 2.5, norms: list[Any] | None = None
) -> list[Record]:
    """A run's log: an evaluation before the first update, the updates, one after the last."""
    norms = [0.5] * len(losses) if norms is None else norms
    return [
        {"step": 0, "val_loss": 5.3},
        *(
            {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": norm}
            for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        ),
        {"step": len(losses), "val_loss": val},
    ]


def judge(losses: list[Any], val: float | None = 2.5, **options: Any) -> Verdict:
    return verdict(records(losses, val), unigram_entropy=H1, **options)


# Spikes. Around 10 with noise of ±1, mean and (population) sigma are exactly 10 and 1.


@pytest.mark.parametrize(("value", "found"), [(15.9, []), (16.0, []), (16.03, [50]), (17, [50])])
def test_a_spike_is_more_than_6_population_standard_deviations_above_the_mean(value, found):
    """By the sample's sigma, sqrt(50 / 49), 16.03 would be none."""
    assert spikes([*alternating(10, 50, noise=1), value, *alternating(10, 20, noise=1)]) == found


def test_a_fall_is_not_a_spike():
    assert spikes([*alternating(10, 50, noise=1), -1000.0]) == []


@pytest.mark.parametrize(
    ("length", "window"), [(60, 50), (509, 50), (1000, 100), (1280, 128), (1400, 128)]
)
def test_nothing_is_scored_until_the_window_is_full(length: int, window: int):
    """A tenth of the series, at least 50 and at most 128."""
    for place, found in ((window - 1, []), (window, [window])):
        values = alternating(10, length, noise=1)
        values[place] = 1000.0
        assert spikes(values) == found


def test_a_spike_hides_others_until_it_has_left_the_window():
    for place, found in ((110, [60]), (111, [60, 111])):
        values = alternating(10, 200, noise=1)
        values[60], values[place] = 1000.0, 30.0
        assert spikes(values) == found


def test_non_finite_values_are_not_spikes_and_in_no_window():
    values: list[float | None] = [*alternating(10, 60, noise=1), 17.0]
    values[20:20] = [None, math.nan, math.inf, -math.inf]
    values[55:55] = [None] * 5
    values.append(math.inf)
    assert spikes(values) == [69]
    assert spike_score(values) == 1 / 11  # of 61 finite values, the first 50 fill the window


def test_the_spike_score_is_the_fraction_of_scored_steps():
    values = alternating(10, 100, noise=1)
    values[70] = 1000.0
    assert spike_score(values) == 1 / 50


@pytest.mark.parametrize("length", [0, 1, 50])
def test_a_series_that_cannot_be_scored_has_no_spikes(length: int):
    assert spikes([1.0] * length) == []
    assert spike_score([1.0] * length) == 0.0
    assert spikes([None] * 100) == []


@pytest.mark.parametrize("constant", [3.3, -3.3])
def test_rounding_above_a_constant_is_not_a_spike_but_a_rise_is(constant: float):
    values = [float(np.float32(constant))] * 300
    assert spikes(values) == []
    values[100] = float(np.nextafter(np.float32(constant), np.float32(4)))
    assert spikes(values) == []
    values[200] += 0.01
    assert spikes(values) == [200]


def test_spikes_agree_with_the_definition_written_out():
    """Also after a value of 1e12, which ruins differences of cumulative sums."""
    rng = np.random.default_rng(0)
    values = [*([1e12] * 3), *rng.standard_t(2, size=2000).tolist()]
    values[900] = math.nan
    expected = []
    for i in range(len(values)):
        past = [v for v in values[:i] if math.isfinite(v)][-128:]
        if len(past) == 128 and math.isfinite(values[i]):
            limit = statistics.fmean(past) + 6 * statistics.pstdev(past)
            expected += [i] * (values[i] > limit)
    assert len(expected) > 5
    assert spikes(values) == expected


# Trained and spiked


def test_a_run_that_learned_is_trained():
    result = judge(alternating(2.5, 400), val=2.6)
    assert (result.status, result.failed, result.step) == ("trained", False, None)
    assert result.reason == "final loss 2.600 is 0.741 below H1 = 3.341"


def test_the_numbers_of_a_run():
    losses = [*alternating(3.0, 380), *[2.0] * 20]
    log = records(losses, val=2.3)
    log.insert(200, {"step": 199, "val_loss": 2.2})
    result = verdict(log, unigram_entropy=H1)
    assert result.initial_loss == 5.3
    assert result.final_val_loss == 2.3
    assert result.best_val_loss == 2.2
    assert result.final_train_loss == 2.0
    assert result.steps == 400


def test_a_run_with_a_loss_spike_that_recovered_is_spiked_at_the_first():
    losses = alternating(2.5, 400)
    losses[299] = losses[359] = 4.0
    result = judge(losses)
    assert (result.status, result.failed, result.step) == ("spiked", False, 300)
    assert result.loss_spikes == 2
    assert result.loss_spike_score == 2 / 350
    assert result.grad_spikes == 0


def test_gradient_spikes_are_counted_but_do_not_change_the_status():
    norms = alternating(0.5, 400)
    norms[299] = 168.0
    log = records(alternating(2.5, 400), norms=norms)
    result = verdict(log, unigram_entropy=H1)
    assert result.status == "trained"
    assert (result.grad_spikes, result.grad_spike_score) == (1, 1 / 350)
    assert (result.loss_spikes, result.loss_spike_score) == (0, 0.0)


# Plateaued


def test_a_final_loss_at_exactly_the_margin_is_a_plateau():
    losses = alternating(3.3, 400)
    assert judge(losses, val=H1 - 0.05).status == "plateaued"
    assert judge(losses, val=math.nextafter(H1 - 0.05, 0)).status == "trained"
    result = judge(losses, val=3.349)
    assert result.failed
    assert result.reason == (
        "final loss 3.349 is not more than 0.05 below H1 = 3.341; stuck: no clear fall of the loss"
    )


def falling(fall: float, noise: float = 0.05) -> list[float]:
    """A loss that is level for 300 updates, and then falls in a straight line."""
    line = [3.4] * 300 + [3.4 - fall * i / 100 for i in range(100)]
    return [a + b for a, b in zip(line, alternating(0, 400, noise), strict=True)]


def test_a_plateau_is_stuck_or_slow():
    stuck, slow = judge(falling(0.0), val=3.35), judge(falling(0.1), val=3.35)
    assert (stuck.status, stuck.still_falling, stuck.slow) == ("plateaued", False, False)
    assert (slow.status, slow.still_falling, slow.slow) == ("plateaued", True, True)
    assert slow.reason.endswith("H1 = 3.341; slow: the loss was still falling")


def test_a_run_that_trained_may_still_fall_but_is_not_slow():
    found = judge(falling(0.1), val=2.5)
    assert (found.status, found.still_falling, found.slow) == ("trained", True, False)
    assert not judge(falling(0.1), val=2.5, diverged_at=400).still_falling


def test_a_rise_or_a_loss_that_is_too_short_is_not_a_fall():
    assert not still_falling(falling(-0.1))
    assert still_falling([5 - 0.1 * i for i in range(20)])
    assert not still_falling([5 - 0.1 * i for i in range(19)])  # a quarter of four updates
    assert not still_falling([3.4] * 400)


def test_the_trend_is_a_t_test_of_the_slope_of_five_means():
    """By the formula; near the critical value of t with 3 degrees of freedom, 4.541."""
    noise = np.random.default_rng(0).normal(0, 0.1, size=100)
    found = []
    for fall in np.linspace(0.0, 0.3, 61):
        losses = [9.0] * 300 + (3.4 - fall * np.arange(100) / 100 + noise).tolist()
        means = np.array(losses[300:]).reshape(5, 20).mean(axis=1)
        x = np.arange(5) - 2.0
        slope = (x @ means) / (x @ x)
        rest = means - means.mean() - slope * x
        t = slope / math.sqrt((rest @ rest) / 3 / (x @ x))
        found.append(t < -4.5407)
        assert still_falling(losses) == found[-1]
    assert {True, False} == set(found)


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.015), (0.5, 0.02), (0.9, 0.05)])
def test_a_loss_without_a_trend_rarely_seems_to_fall(correlation: float, most: float):
    """The last 50 of 200 updates, with noise of an autoregressive process of order 1."""
    random = np.random.default_rng(1)
    found = 0
    for _ in range(1000):
        noise = random.normal(size=200)
        for i in range(1, 200):
            noise[i] += correlation * noise[i - 1]
        found += still_falling(noise.tolist())
    assert found / 1000 <= most


# The early rise


def test_the_early_rise_is_above_the_lowest_smoothed_loss_before():
    """Means of ten: 5, 4, then 4.8, then 3: a rise of 0.8, and not the 1.8 above the later 3."""
    losses = [5.0] * 10 + [4.0] * 10 + [4.8] * 10 + [3.0] * 10
    assert early_rise(losses) == pytest.approx(0.8)
    assert early_rise([None, *losses, math.nan]) == pytest.approx(0.8)


def test_a_loss_that_only_falls_has_no_early_rise_and_a_single_jump_is_smoothed():
    assert early_rise([5.0 - 0.1 * i for i in range(30)]) == 0.0
    assert early_rise([3.0] * 20 + [4.0] + [3.0] * 20) == pytest.approx(0.1)


def test_the_early_rise_needs_ten_finite_losses():
    assert early_rise([1.0] * 9) is None
    assert early_rise([*[1.0] * 9, None]) is None
    assert early_rise([1.0] * 10) == 0.0


def test_the_early_rise_is_that_of_the_first_quarter_of_the_planned_updates():
    losses = [*[5.0] * 90, *[6.0] * 10, *[9.0] * 300]
    assert judge(losses).early_rise == 1.0
    assert judge(losses, planned=400).early_rise == 1.0
    assert judge(losses[:200], planned=800).early_rise == 4.0
    assert judge(losses[:200], planned=396).early_rise == pytest.approx(0.9)


def test_a_run_that_fell_back_is_known_as_such_even_if_it_plateaued():
    assert [judge(risen(rise, 0.05), val=3.4).fell_back for rise in (0.1, 0.5)] == [False, True]


def test_a_plateau_that_never_learned_starts_at_the_first_step():
    """Half of its smoothed losses are below H1 - 0.05, as the training text is a little easier."""
    noise = np.random.default_rng(0).normal(0, 0.15, size=400)
    assert judge((H1 - 0.05 + noise).tolist(), val=H1).step == 1


def test_a_plateau_that_learned_and_fell_back_starts_where_it_fell():
    """A window with j of its 20 losses behind the fall from 2.5 to 3.35 has the mean
    2.5 + 0.0425 j, and the standard error sqrt((0.85^2 j (20 - j) / 400 + 0.05^2) / 19), but for
    an odd loss too many. Five of them reach 3.291 at j = 8.
    """
    losses = [*alternating(4.0, 50), *alternating(2.5, 150), *alternating(3.35, 200)]
    assert judge(losses, val=3.35).step == 208


def test_a_plateau_that_only_validation_shows_starts_at_the_last_step():
    assert judge(alternating(1.0, 400), val=3.4).step == 400


def test_the_layer_of_a_plateau_is_the_lowest_block_at_the_first_snapshot_with_small_gradients():
    ratios = {
        1: [0.1, 50, 40, 30, 0.1],  # the embeddings and the head are not blocks
        100: [0.1, 10, None, 9.9, 0.1],
        200: [0.1, 1, 1, 1, 0.1],
    }
    log = records(alternating(3.35, 400), val=3.35)
    for step, over_eps in ratios.items():
        log += [
            {"step": step, "layer": layer, "grad_over_eps": ratio}
            for layer, ratio in enumerate(over_eps)
        ]
    assert verdict(log, unigram_entropy=H1).layer == 3
    late = [record for record in log if record["step"] != 100]
    assert verdict(late, unigram_entropy=H1).layer == 1
    no_alarm = [record for record in late if record["step"] != 200]
    assert verdict(no_alarm, unigram_entropy=H1).layer is None


# Regressed


def risen(rise: float, noise: float) -> list[float]:
    """A minimum in updates 101 ... 120, and an end that is `rise` above it."""
    return [
        *alternating(2.8, 100, noise),
        *alternating(2.0, 20, noise),
        *alternating(2.0 + rise, 280, noise),
    ]


def test_a_final_loss_more_than_two_tenths_above_its_minimum_is_a_regression():
    assert judge(risen(0.19, 0.05)).status == "trained"
    result = judge(risen(0.21, 0.05))
    assert (result.status, result.failed, result.step) == ("regressed", True, 120)
    assert result.reason == (
        "training loss 2.210 is 0.210 above its minimum of 2.000; at most 0.200 is allowed"
    )


def test_with_much_noise_a_regression_takes_five_standard_errors():
    """5 sqrt(2) 0.3 sqrt(20 / 19) / sqrt(20) = 0.4867."""
    assert judge(risen(0.48, 0.3)).status == "trained"
    assert judge(risen(0.49, 0.3)).status == "regressed"


def test_the_minimum_shares_no_update_with_the_final_window():
    """The lowest window is that of updates 368 ... 387, and the end is 0.52 above it, which is more
    than five standard errors, 0.44; but the lowest one before the end, 361 ... 380, is at 2.28.
    """
    low = [*alternating(2.8, 367), *alternating(2.0, 20), *alternating(2.8, 13)]
    assert judge(low).status == "trained"


# Diverged


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_a_training_loss_that_is_not_finite_is_a_divergence(lost: float | None):
    losses: list[float | None] = [*alternating(2.5, 100)]
    losses[6] = lost
    result = judge(losses)
    assert (result.status, result.failed, result.step) == ("diverged", True, 7)
    assert result.reason == "training loss not finite at step 7"
    assert result.best_val_loss == 2.5


def test_a_diverged_run_has_no_final_loss():
    """Its best loss before is not its final loss."""
    log = [*records(alternating(2.5, 100), val=2.4), {"step": 101, "loss": None, "grad_norm": None}]
    result = verdict(log, unigram_entropy=H1)
    assert result.final_val_loss is None
    assert result.final_train_loss is None
    assert result.best_val_loss == 2.4


def test_a_validation_loss_that_is_not_finite_is_a_divergence():
    result = judge(alternating(2.5, 100), val=None)
    assert (result.status, result.step) == ("diverged", 100)
    assert result.reason == "validation loss not finite at step 100"
    assert result.best_val_loss == 5.3


def test_a_divergence_that_the_caller_reports_is_adopted():
    result = judge(
        alternating(2.5, 100), diverged_at=100, diverged_layer=3, reason="a weight became nan"
    )
    assert (result.status, result.step, result.layer) == ("diverged", 100, 3)
    assert result.reason == "a weight became nan"
    assert judge([2.5], diverged_at=1).reason


def test_a_run_can_diverge_before_its_first_update():
    result = verdict([{"step": 0, "val_loss": None}], unigram_entropy=H1, diverged_at=0, clip=1.0)
    assert (result.status, result.step, result.steps) == ("diverged", 0, 0)
    assert (result.initial_loss, result.best_val_loss) == (None, None)
    assert (result.max_grad_norm, result.clipped) == (None, None)


def test_an_update_that_the_scaler_skipped_is_not_a_divergence():
    log = records(alternating(2.5, 100), norms=[None, *[0.5] * 99])
    assert verdict(log, unigram_entropy=H1).status == "trained"


@pytest.mark.parametrize("skipped", [[40], [1, 100], [98, 99, 100], list(range(2, 100))])
def test_skipped_updates_are_ignored(skipped: list[int]):
    log = records(alternating(2.5, 100))
    for record in log:
        if record["step"] in skipped and "loss" in record:
            record |= {"loss": None, "grad_norm": None, "skipped": True}
    found = verdict(log, unigram_entropy=H1)
    assert (found.status, found.steps) == ("trained", 100 - len(skipped))


def test_a_run_whose_updates_were_all_skipped_diverged():
    log = records([None] * 5, norms=[None] * 5)
    found = verdict([{**r, "skipped": True} if "loss" in r else r for r in log], unigram_entropy=H1)
    assert (found.status, found.step) == ("diverged", 1)


# All rules together


def test_the_worst_finding_is_the_verdict():
    losses = risen(0.5, 0.05)
    losses[299] = 9.0
    findings = [
        judge(alternating(2.5, 400)),
        judge([*alternating(2.5, 299), 9.0, *alternating(2.5, 100)]),
        judge(losses),
        judge(losses, val=H1),
        judge(losses, val=H1, diverged_at=400),
    ]
    statuses = get_args(Status)
    assert tuple(finding.status for finding in findings) == statuses
    assert [finding.failed for finding in findings] == [status in FAILED for status in statuses]
    assert [finding.loss_spikes for finding in findings] == [0, 1, 1, 1, 1]


def test_the_clipped_fraction_counts_norms_above_the_clip():
    log = records([2.5] * 5, norms=[0.5, 1.0, None, 1.5, 2.0])
    assert verdict(log, unigram_entropy=H1, clip=1.0).clipped == 2 / 4
    assert verdict(log, unigram_entropy=H1).clipped is None
    assert verdict(log, unigram_entropy=H1).max_grad_norm == 2.0


def test_layer_records_are_not_updates():
    plain = records(alternating(2.5, 100))
    snapshot = [{"step": 50, "layer": layer, "grad_norm": 1e6, "log_z": None} for layer in range(4)]
    log = [*plain[:51], *snapshot, *plain[51:]]
    with_layers, without = (verdict(each, unigram_entropy=H1, clip=1.0) for each in (log, plain))
    assert with_layers == without


@pytest.mark.parametrize(("count", "window"), [(50, 10), (219, 10), (220, 11), (400, 20)])
def test_the_final_training_loss_is_the_mean_of_5_percent_of_the_updates(count: int, window: int):
    losses = [2.0 + (count - i) / count for i in range(count)]
    assert judge(losses).final_train_loss == pytest.approx(statistics.fmean(losses[-window:]))


@pytest.mark.parametrize("count", range(1, 21))
def test_short_runs_have_verdicts(count: int):
    """K is half of the updates, and a window of one update shows no regression."""
    losses = [5.0 - 0.1 * i for i in range(count)]
    for val, status in ((3.0, "trained"), (5.0, "plateaued")):
        result = judge(losses, val=val)
        assert (result.status, result.steps) == (status, count)
        last = losses[-max(1, count // 2) :]
        assert result.final_train_loss == pytest.approx(statistics.fmean(last))
    assert judge(losses, val=5.0).step == 1
    assert judge([None, *losses[1:]]).step == 1


def test_two_updates_are_not_a_regression():
    assert judge([2.0, 3.0]).status == "trained"
    assert judge([2.0, 2.0, 3.0, 3.0]).status == "regressed"


def test_verdicts_need_no_torch():
    code = "import sys, gpt.compare.analysis.verdicts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
