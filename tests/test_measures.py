"""The measures of contrasts where runs are missing, lost or equal, and slopes and thresholds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from test_summary import CAP, LOSS, grid, outcome, outcomes

from gpt.compare.analysis.measures import Measured, _reach, common_runs, measured
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import ContrastResult, SearchResult, Unmeasured
from gpt.compare.analysis.statistics import (
    ALPHA,
    Interval,
    at_least,
    least_p,
    mean_interval,
    sign_flip_p,
    threshold_interval,
)
from gpt.compare.analysis.summary import summarize
from gpt.compare.execution.cell_runs import CellError
from gpt.compare.grid import Contrast
from gpt.config import validate

ARMS = ("post, cold", "post, warm")
LOST = CellError("killed", "by SIGKILL")


def runs_of(seeds: int, *rates: float, cost: float = 0.5, layers: int = 0) -> list[Outcome]:
    """The first arm costs `cost`, and ten times as much for each further rate."""
    return [
        outcome(arm, rate, s, 2.5 + 0.01 * s + cost * 10**n * (arm == ARMS[0]), layers=layers)
        for arm in ARMS
        for n, rate in enumerate(rates)
        for s in range(seeds)
    ]


def without(runs: list[Outcome], arm: str, rate: float, *seeds: int) -> list[Outcome]:
    return [r for r in runs if (r.cell.arm, r.rate) != (arm, rate) or r.seed not in seeds]


def lose(runs: list[Outcome], *seeds: int) -> list[Outcome]:
    """The runs of the first arm with these seeds are lost."""
    gone = {"verdict": None, "error": LOST, "vocabulary": 2}
    return [
        replace(r, **gone) if r.cell.arm == ARMS[0] and r.seed in seeds else r  # type: ignore[arg-type]
        for r in runs
    ]


def result(runs: list[Outcome], **changes: Any) -> ContrastResult:
    (found,) = summarize(grid(contrasts=[{**LOSS, **changes}], pairs=[]), runs).contrasts
    assert found is not None
    return found


def unmeasured(runs: list[Outcome], **changes: Any) -> str:
    contrast = validate(Contrast, {**LOSS, **changes})
    found = measured(contrast, runs, (), ALPHA)
    assert isinstance(found, Unmeasured)
    summary = summarize(grid(contrasts=[{**LOSS, **changes}], pairs=[]), runs)
    assert summary.contrasts == (None,)
    assert found.why in summary.conclusions[0]
    return found.why


# ---------------------------------------------------------------------------------------------
# Runs in common


@pytest.mark.parametrize(
    ("missing", "seeds", "points"),
    [
        ([], 8, 2),
        ([(0, 1e-3)], 7, 2),  # 14 runs of an arm instead of 8
        ([(0, 1e-3), (0, 1e-2)], 7, 2),
        ([(s, 1e-2) for s in range(3)], 5, 2),
        ([(s, 1e-2) for s in range(4)], 8, 1),  # as many runs: all seeds
        ([(s, 1e-2) for s in range(8)], 8, 1),
        ([(0, 1e-3), *((s, 1e-2) for s in range(8))], 7, 1),
    ],
)
def test_what_lacks_most_of_its_runs_is_left_out(
    missing: list[tuple[int, float]], seeds: int, points: int
):
    runs = runs_of(8, 1e-3, 1e-2)
    for seed, rate in missing:
        runs = without(runs, ARMS[0], rate, seed)
    found = common_runs(ARMS, runs)
    assert found is not None
    assert (len(found.seeds), len(found.points)) == (seeds, points)
    in_both = 8 - (missing[1:2] == [(0, 1e-2)])
    assert (found.dropped_seeds, found.dropped) == (in_both - seeds, 2 - points)
    assert len(found.compared(ARMS)) == 2 * seeds * points


def test_a_seed_that_has_begun_does_not_change_what_the_others_answer():
    """With eight seeds at two rates, the ninth has so far run at the first."""
    whole = result(runs_of(8, 1e-3, 1e-2, cost=0.2))
    assert whole.value == pytest.approx((0.2 + 2) / 2)
    ninth = [run for run in runs_of(9, 1e-3) if run.seed == 8]
    begun = runs_of(8, 1e-3, 1e-2, cost=0.2) + ninth
    found = result(begun)
    assert (found.value, found.interval, found.seeds) == (whole.value, whole.interval, 8)
    assert (found.dropped, found.dropped_seeds) == (0, 1)


def test_arms_that_share_no_seed_or_rate_have_nothing_in_common():
    apart = [r for r in runs_of(8, 1e-3) if (r.cell.arm == ARMS[0]) == (r.seed < 4)]
    assert common_runs(ARMS, apart) is None
    rates = [r for r in runs_of(8, 1e-3, 1e-2) if (r.cell.arm == ARMS[0]) == (r.rate == 1e-3)]
    assert common_runs(ARMS, rates) is None
    assert "no runs in common" in unmeasured(rates)


# ---------------------------------------------------------------------------------------------
# Columns and ties


def test_only_the_runs_that_are_compared_need_a_value_of_the_column():
    runs = [replace(r, extremes={"stream_rms": 1.0 + r.seed}) for r in runs_of(8, 1e-3)]
    other = [replace(r, extremes={}) for r in runs_of(9, 1e-3) if r.seed == 8]
    asked = {"measure": "column", "column": "max_stream_rms"}
    assert result([*runs, other[0]], **asked).seeds == 8
    assert "-8-0 has no value in column max_stream_rms" in unmeasured([*runs, *other], **asked)


def test_a_value_without_a_logarithm_is_named():
    runs = [replace(r, extremes={"stream_rms": 0.0}) for r in runs_of(8, 1e-3)]
    why = unmeasured(runs, measure="log_column", column="max_stream_rms")
    assert why.endswith("has the value 0, which has no logarithm, in column max_stream_rms")


def test_a_difference_that_is_only_rounding_is_none():
    losses = {"post, cold": 2.7, "post, warm": 2.5, "pre, cold": 2.9, "pre, warm": 2.7}
    runs = [outcome(arm, 0.1, seed, loss) for arm, loss in losses.items() for seed in range(8)]
    assert (2.7 - 2.5) - (2.9 - 2.7) != 0
    found = result(runs, against=["pre, cold", "pre, warm"])
    assert (found.answer, found.p, found.interval) == ("open", 1.0, Interval(0, 0))


@pytest.mark.parametrize("n", [1, 4, 17, 20])
def test_equal_signs_have_the_smallest_p(n: int):
    values = [0.1 + 0.01 * i for i in range(n)]
    assert sign_flip_p(values) == sign_flip_p([-v for v in values]) == least_p(n)
    assert sign_flip_p([*values, 0.0]) > least_p(n + 1)


# ---------------------------------------------------------------------------------------------
# Lost runs


def test_the_interval_holds_for_every_result_of_two_lost_runs():
    runs = runs_of(6, 0.1, cost=0.2)
    found = result(lose(runs, 0, 1))
    lowest = min(r.loss for r in runs if r.cell.arm == ARMS[0] and r.seed > 1)
    possible = []
    for ends in itertools.product((lowest, CAP), repeat=2):
        differences = [end - (2.5 + 0.01 * s) for s, end in enumerate(ends)] + [0.2] * 4
        possible.append((mean_interval(differences), sign_flip_p(differences), differences))
    intervals = [interval for interval, _, _ in possible if interval]
    assert found.interval is not None
    assert found.interval.low == pytest.approx(min(i.low for i in intervals))
    assert found.interval.high == pytest.approx(max(i.high for i in intervals))
    assert found.interval.low < min(intervals[0].low, intervals[-1].low)  # one at each end
    assert found.p == max(p for _, p, _ in possible)
    middle = [(a + b) / 2 for a, b in zip(possible[0][2], possible[-1][2], strict=True)]
    assert list(found.differences.values()) == pytest.approx(middle)
    assert found.outlook in ("", "Run the same command again: it repeats the lost runs.")


def test_with_many_lost_runs_anything_is_possible():
    found = result(lose(runs_of(10, 0.1), *range(7)))
    assert (found.interval, found.answer) == (Interval(-math.inf, math.inf), "open")
    assert found.p == 1.0
    assert found.outlook == "Run the same command again: it repeats the lost runs."


# ---------------------------------------------------------------------------------------------
# Slopes

SLOPE = {"slope": "model.layers"}


def deep(seeds: int = 8, **changes: Any) -> list[Outcome]:
    """The first arm costs 0 at the lower rate and 1 at the higher one, at every depth."""
    return [
        outcome(arm, rate, s, 2.5 + 0.01 * s + (rate > 1e-3) * (arm == ARMS[0]), layers=layers)
        for layers in (3, 6, 12)
        for arm in ARMS
        for rate in (1e-3, 1e-2)
        for s in range(seeds)
    ]


def test_a_rate_that_some_depth_lacks_does_not_tilt_a_slope():
    assert result(deep(), **SLOPE).value == pytest.approx(0)
    lacking = [
        r
        for r in deep()
        if not (r.cell.setting["model.layers"] == 12 and r.rate == 1e-2 and r.seed < 5)
    ]
    found = result(lacking, **SLOPE)
    assert found.value == pytest.approx(0)
    assert (found.dropped, found.dropped_seeds) == (3, 0)


def test_a_slope_needs_two_values():
    one = [r for r in deep() if r.cell.setting["model.layers"] == 6]
    why = "its arms have runs in common at only one value of model.layers"
    assert unmeasured(one, **SLOPE) == why
    assert unmeasured(one, **SLOPE, measure="log_lr50") == why


def test_the_slope_of_failures_is_uncertain_where_all_seeds_agree():
    runs = [
        replace(r, verdict=replace(r.verdict, status="plateaued"))
        if r.cell.arm == ARMS[0] and r.cell.setting["model.layers"] == 12
        else r
        for r in deep()
        if r.verdict is not None
    ]
    found = result(runs, **SLOPE, measure="failure")
    logs = [math.log(layers) for layers in (3, 6, 12)]
    mean = sum(logs) / 3
    slope = (logs[2] - mean) / sum((x - mean) ** 2 for x in logs)
    assert found.value == pytest.approx(slope)
    assert found.interval is not None
    assert found.interval.low < slope - 0.1
    assert found.interval.high >= slope


def test_the_middle_of_an_axis_has_no_weight_and_may_be_open():
    """Weight 0 times an infinite end is not a number."""
    shut = [[(r, r > 0.1) for r in (1e-2, 0.1, 1.0)]] * 6
    never = [[(r, False) for r in (1e-2, 0.1, 1.0)]] * 6
    found = threshold_interval([shut, never, shut], [1.0, 0.0, -1.0])
    assert found is not None
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)
    runs = [
        outcome(arm, rate, s, 2.5, status="plateaued" if bad else "trained", layers=n)
        for n in (3, 6, 12)  # the weight of 6 is 0 up to rounding
        for arm in ARMS
        for rate in (1e-2, 0.1, 1.0)
        for s in range(6)
        for bad in [rate > 0.05 and n != 6]
    ]
    slope = result(runs, **SLOPE, measure="log_lr50")
    assert slope.interval is not None
    assert math.isfinite(slope.interval.high - slope.interval.low)


# ---------------------------------------------------------------------------------------------
# Thresholds by search

STEP = math.log(1.25)


def searches(edges: dict[str, list[float]]) -> tuple[list[Outcome], list[SearchResult]]:
    """Searches that end in brackets of one step about the logs of `edges`, and a run of each."""
    runs = [outcome(arm, 0.1, s, 2.5) for arm, logs in edges.items() for s in range(len(logs))]
    found = [
        SearchResult(
            arm, "", seed, math.exp(log), math.exp(log - STEP / 2), math.exp(log + STEP / 2), "",
            True, 4, "ended",
        )
        for arm, logs in edges.items()
        for seed, log in enumerate(logs)
    ]  # fmt: skip
    return runs, found


def of_searches(edges: dict[str, list[float]], *changes: SearchResult) -> Measured:
    runs, found = searches(edges)
    contrast = validate(Contrast, {**LOSS, "measure": "log_threshold"})
    changed = {(c.arm, c.seed): c for c in changes}
    final = [each for each in found if (each.arm, each.seed) not in changed] + [*changes]
    known = measured(contrast, runs, final, ALPHA)
    assert not isinstance(known, Unmeasured)
    return known[1]


def test_thresholds_are_known_only_to_within_their_brackets():
    """One step apart in all seeds: the true thresholds may be almost equal."""
    found = of_searches({ARMS[0]: [STEP] * 8, ARMS[1]: [0.0] * 8})
    assert found.interval is not None
    assert found.interval.low == pytest.approx(STEP - STEP, abs=1e-9)
    assert found.interval.high == pytest.approx(2 * STEP)
    spread = [0.5 * (-1) ** s for s in range(8)]
    wide = of_searches({ARMS[0]: spread, ARMS[1]: [0.0] * 8})
    student = mean_interval(spread)
    assert student is not None
    assert wide.interval is not None
    assert wide.interval.low == pytest.approx(student.low)


@pytest.mark.parametrize(
    ("of", "less", "expected"),
    [
        ([("", 1.0)], [("", 1.0)], ""),
        ([("above", 1.0)], [("", 1.0)], "at least"),
        ([("", 1.0)], [("above", 1.0)], "at most"),
        ([("", 1.0)], [("below", 0.5)], "at least"),
        ([("above", -0.5)], [("", 1.0)], "at most"),  # a small value of the axis, in a slope
        ([("above", -0.5), ("below", 0.5)], [], "at most"),
        ([("above", 0.5), ("below", 0.5)], [], "unknown"),
        ([("unclear", 0.5)], [], "unknown"),
        ([("unclear", 0.0)], [("below", 1.0)], "at least"),  # in the middle of the axis
    ],
)
def test_bounds_of_thresholds_bound_their_weighted_sum(
    of: list[tuple[str, float]], less: list[tuple[str, float]], expected: str
):
    assert _reach(of, less) == expected


def test_a_slope_with_a_bound_at_its_end_is_bounded():
    """Post-norm's threshold in the deepest network is below all rates tried with one seed."""
    runs, found = [], []
    for layers, (high, low) in {3: (0.0, 0.0), 12: (0.0, -2.0)}.items():
        for arm, log in ((ARMS[0], high), (ARMS[1], low)):
            for s in range(8):
                runs.append(outcome(arm, 0.1, s, 2.5, layers=layers))
                ends = math.exp(log - STEP / 2), math.exp(log + STEP / 2)
                bounded = (arm, layers, s) == (ARMS[1], 12, 0)
                found.append(
                    SearchResult(
                        arm, f"layers {layers}", s, ends[1] if bounded else math.exp(log),
                        None if bounded else ends[0], ends[1], "below" if bounded else "", True, 4,
                        "ended",
                    )
                )  # fmt: skip
    contrast = validate(Contrast, {**LOSS, **SLOPE, "measure": "log_threshold"})
    known = measured(contrast, runs, found, ALPHA)
    assert not isinstance(known, Unmeasured)
    assert known[1].reach == ("at least",)
    assert known[1].interval is not None
    assert known[1].interval.high == math.inf
    assert 0.9 < known[1].interval.low < 2 / math.log(4)


def test_an_interval_of_at_least():
    assert at_least(Interval(1, 2), 0.25) == Interval(1, 2)
    assert at_least(Interval(1, 2), 1.0) == Interval(0.5, 2.5)


def test_a_search_whose_first_run_was_lost_opens_the_interval():
    why = "a run has no result"
    lost = SearchResult(ARMS[0], "", 7, None, None, None, "unclear", None, 1, why)
    found = of_searches({ARMS[0]: [1.0] * 7, ARMS[1]: [0.0] * 8}, lost)
    assert found.reach == ("unknown",)
    assert found.interval == Interval(-math.inf, math.inf)
    assert "post, cold, seed 7: unclear, because a run has no result" in found.bounds


# ---------------------------------------------------------------------------------------------
# Where arms fail


def failures(runs: list[Outcome], *contrasts: dict[str, Any]) -> str:
    return summarize(grid(contrasts=list(contrasts), pairs=[]), runs).conclusions[-1]


def test_arms_at_different_rates_are_not_said_to_fail_alike():
    runs = [outcome(ARMS[1], 0.01, s, 2.5) for s in range(8)]
    runs += [outcome(ARMS[0], 0.02, s, 3.4, status="plateaued") for s in range(8)]
    assert failures(runs).startswith("No two arms ran at the same rate")


def test_failures_are_those_of_runs_that_some_contrast_includes():
    runs = [
        outcome(arm, rate, s, 2.5, status="plateaued" if bad else "trained", layers=n)
        for n in (3, 12)
        for arm in ARMS
        for rate in (1e-3, 1e-2)
        for s in range(8)
        for bad in [arm == ARMS[0] and n == 12]
    ]
    shallow = {**LOSS, "at": {"model.layers": [3]}}
    assert failures(runs, shallow).startswith("No run failed")
    registered = {**LOSS, "at": {"optimizer.learning_rate": [1e-3]}}
    own = {**LOSS, "rates": {ARMS[0]: 1e-3, ARMS[1]: 1e-3}}
    words = failures(runs, registered, own)
    assert words.startswith("At rate 0.001 (layers 12), where failures differ most among the reg")
    words = failures(runs, registered, {**LOSS, "of": [ARMS[1], ARMS[0]]})
    assert words.startswith("At rate 0.001 (layers 12), chosen after the runs")


def test_all_runs_count_without_contrasts():
    runs = outcomes(lambda arm, seed: 0.0 if arm == ARMS[0] else math.inf)
    assert "'post, cold': failure in all 6 seeds" in failures(runs)
