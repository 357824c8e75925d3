"""The statistics of the comparison, against textbooks, other implementations and hands."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from gpt.compare.analysis.statistics import (
    Interval,
    Threshold,
    capped,
    firth,
    fraction_interval,
    highest_stable_rate,
    holm,
    loglog_slope,
    lr50,
    lr50_of_seeds,
    lr_sensitivity,
    mcnemar,
    mean_interval,
    newcombe,
    paired_difference,
    regret,
    sign_flip_p,
    threshold_interval,
    wilson,
)

pytestmark = pytest.mark.filterwarnings("error")

# Twice the heights in Darwin's maize, crossed less selfed (Fisher 1935, The Design of Experiments).
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


@pytest.mark.parametrize(("n", "high"), [(3, 0.5615), (5, 0.4345), (10, 0.2775)])
def test_no_failure_in_n_seeds_only_bounds_the_rate(n: int, high: float):
    interval = wilson(0, n)
    assert (interval.low, interval.high) == pytest.approx((0, high), abs=5e-5)


@pytest.mark.parametrize(
    ("failures", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)]
)
def test_wilsons_interval_is_that_of_newcombes_table(
    failures: int, n: int, low: float, high: float
):
    """Newcombe 1998, Table I, method 3."""
    interval = wilson(failures, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_mean_is_students():
    skewed = [1.0, 2.0, 2.0, 3.0, 5.0, 19.0]
    expected = stats.ttest_1samp(skewed, 0).confidence_interval(0.95)
    interval = mean_interval(skewed)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [0, 1, 4])
def test_under_five_seeds_no_mean_has_an_interval(n: int):
    assert mean_interval([1.0, 2.0, 3.0, 5.0][:n]) is None
    assert fraction_interval([1.0, 0.0, 0.0, -1.0][:n]) is None


def test_the_interval_of_equal_values_is_the_value():
    assert mean_interval([2.5] * 5) == Interval(2.5, 2.5)


def test_the_interval_of_paired_fractions_is_no_narrower_than_agrestis_and_mins():
    """With half a pair added to each of the four cells: 1.5, 7.5, 1.5 and 13.5 of 23."""
    differences = [1.0] * 7 + [-1.0] + [0.0] * 13
    mean, second = 6 / 23, 9 / 23
    half = 1.959964 * math.sqrt((second - mean**2) / 23)
    student, interval = mean_interval(differences), fraction_interval(differences)
    assert student is not None
    assert interval is not None
    assert interval.low == pytest.approx(min(mean - half, student.low))
    assert interval.high == pytest.approx(max(mean + half, student.high))
    assert student.low > mean - half


@pytest.mark.parametrize(("value", "limit"), [(1.0, 1), (-1.0, 1), (0.0, 1), (2.0, 2), (1.0, 2)])
@pytest.mark.parametrize("runs", [1, 4])
def test_seeds_that_agree_still_leave_a_failed_fraction_uncertain(
    value: float, limit: float, runs: int
):
    interval = fraction_interval([value] * 8, runs, limit)
    assert interval is not None
    assert -limit <= interval.low <= value <= interval.high <= limit
    assert interval.high - interval.low > 0.1 / runs


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((1, 1, 7, 12), -0.507, -0.026), ((8, 0, 0, 0), -0.324, 0.324), ((0, 8, 0, 0), 0.542, 1.0)],
)
def test_newcombes_interval_joins_two_of_wilsons(
    cells: tuple[int, int, int, int], low: float, high: float
):
    """The first: Fagerland, Lydersen and Laake 2014, Table 4, airway hyper-responsiveness."""
    interval = newcombe(*cells)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_flip_p_of_darwins_maize_is_fishers(sign: int):
    """1726 of the 2^15 sums are as far from 0 as 314."""
    assert sign_flip_p([sign * difference for difference in DARWIN]) == 1726 / 2**15


def test_sign_flips_are_scipys_permutation_test_where_sums_tie_but_for_rounding():
    values = [0.1, 0.2, 0.3, -0.6, 0.7]
    exact = stats.permutation_test(
        ([1, 2, 3, -6, 7], [-1, -2, -3, 6, -7]),
        lambda x, y: np.sum(x) - np.sum(y),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert sign_flip_p(values) == exact.pvalue


def test_three_seeds_cannot_give_a_p_under_a_quarter():
    assert sign_flip_p([5.0, 6.0, 7.0]) == 0.25


def test_no_difference_at_all_has_a_p_of_1():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1


def test_many_differences_have_their_signs_sampled():
    """Of equal sizes, the test is that of a fair coin."""
    differences = [1.0] * 26 + [-1.0] * 14
    exact = stats.binomtest(26, 40).pvalue
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.01)


def test_a_paired_difference_is_of_the_first_less_the_second():
    difference = paired_difference([5.0, 3.0, 9.0, 4.0], [4.0, 1.0, 1.0, 5.0])  # 1, 2, 8, -1
    assert (difference.mean, difference.median, difference.n) == (2.5, 1.5, 4)
    # Sums as far from 0 as 10: itself, 12 (-1 flipped), 10 (1 and -1 flipped), and their opposites.
    assert difference.p == 6 / 16
    assert difference.least_p == 2 / 16


def test_one_pair_has_a_difference_and_nothing_else():
    difference = paired_difference([2.0], [0.5])
    assert (difference.mean, difference.interval) == (1.5, None)
    assert difference.p == difference.least_p == 1


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_a
    pairs += [(False, True)] * only_b + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_mcnemars_exact_p_is_that_of_the_textbook():
    """Fagerland, Lydersen and Laake 2013: airway hyper-responsiveness, 1 against 7 of 21 pairs."""
    result = mcnemar(*outcomes(1, 1, 7, 12))
    assert (result.both, result.only_a, result.only_b, result.neither) == (1, 1, 7, 12)
    assert result.p == pytest.approx(2 * (1 + 8) / 2**8)


@pytest.mark.parametrize("counts", [(0, 5, 0, 0), (2, 6, 1, 3), (4, 3, 3, 0), (1, 0, 9, 2)])
def test_mcnemars_exact_p_is_that_of_statsmodels(counts: tuple[int, int, int, int]):
    from statsmodels.stats import contingency_tables

    both, only_a, only_b, neither = counts
    table = [[both, only_a], [only_b, neither]]
    expected = contingency_tables.mcnemar(table, exact=True).pvalue
    assert mcnemar(*outcomes(*counts)).p == pytest.approx(expected)


def test_without_discordant_pairs_mcnemars_p_is_1():
    assert mcnemar(*outcomes(2, 0, 0, 3)).p == 1


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625)])
def test_the_least_p_of_n_pairs_is_reached_when_all_are_discordant(n: int, least: float):
    result = mcnemar(*outcomes(0, n, 0, 0))
    assert result.least_p == least
    assert result.p == pytest.approx(least)


def test_holms_adjustment_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("ps", [[], [0.3], [0.5, 0.6, 0.5, 0.04], [0.011, 0.02, 0.011, 0.9, 0.012]])
def test_holms_adjustment_is_that_of_statsmodels(ps: list[float]):
    from statsmodels.stats import multitest

    expected = multitest.multipletests(ps, method="holm")[1].tolist() if ps else []
    assert holm(ps) == pytest.approx(expected)


def test_firths_estimate_of_separated_data_is_finite_where_the_plain_one_is_not():
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationWarning

    x, y = [-7.0, -6.0, -4.0, -3.0], [0, 0, 1, 1]
    intercept, slope = firth(x, y)
    assert -intercept / slope == pytest.approx(-5, abs=1e-9)  # half-way, by symmetry
    assert 0.5 < slope < 2
    with pytest.warns((PerfectSeparationWarning, ConvergenceWarning)):
        plain = sm.Logit(y, sm.add_constant(x)).fit(disp=False)
    assert plain.params[1] > 10


def maximized(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The penalised likelihood's maximum, by a general method."""
    X = np.column_stack([np.ones_like(x), x])

    def loss(beta: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-X @ beta))
        information = sum(q * (1 - q) * np.outer(row, row) for q, row in zip(p, X, strict=True))
        likelihood = np.where(y, np.log(p), np.log(1 - p)).sum()
        return -likelihood - 0.5 * np.log(np.linalg.det(information))

    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 2000}
    return optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options=options).x


@pytest.mark.parametrize("seed", range(6))
def test_firths_estimate_maximizes_the_penalised_likelihood(seed: int):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, size=15)
    y = rng.random(15) < 1 / (1 + np.exp(1 - x))
    assert 0 < y.sum() < 15
    assert firth(x.tolist(), y.tolist()) == pytest.approx(maximized(x, y), abs=1e-5)


@pytest.mark.parametrize(
    ("failures_0", "n_0", "failures_1", "n_1"), [(2, 9, 5, 7), (0, 4, 6, 6), (1, 1, 0, 1)]
)
def test_firths_estimate_of_a_saturated_table_adds_a_half_to_each_cell(
    failures_0: int, n_0: int, failures_1: int, n_1: int
):
    x = [0.0] * n_0 + [1.0] * n_1
    y = [i < failures_0 for i in range(n_0)] + [i < failures_1 for i in range(n_1)]
    logit_0 = math.log((failures_0 + 0.5) / (n_0 - failures_0 + 0.5))
    logit_1 = math.log((failures_1 + 0.5) / (n_1 - failures_1 + 0.5))
    assert firth(x, y) == pytest.approx((logit_0, logit_1 - logit_0), abs=1e-6)


def test_firths_estimate_does_not_depend_on_the_unit_of_x():
    x, y = [1.0, 2.0, 3.0, 4.0, 6.0], [0, 1, 0, 1, 1]
    intercept, slope = firth(x, y)
    moved = firth([1e6 + 1e-3 * z for z in x], y)
    assert moved[1] == pytest.approx(1e3 * slope, rel=1e-6)
    assert moved[0] + 1e6 * moved[1] == pytest.approx(intercept, abs=1e-4)


RATES = [1e-4, 1e-3, 1e-2, 1e-1]


def grid(*failures: int, seeds: int = 4) -> tuple[list[float], list[bool]]:
    """So many of the seeds failed at each of `RATES`."""
    runs = [(r, i < n) for i in range(seeds) for r, n in zip(RATES, failures, strict=True)]
    return [r for r, _ in runs], [fails for _, fails in runs]


def test_lr50_of_a_symmetric_grid_is_its_geometric_middle():
    threshold = lr50(*grid(0, 0, 4, 4))
    assert threshold.rate == pytest.approx(10**-2.5)
    assert (threshold.bound, threshold.low, threshold.high) == ("", 1e-3, 1e-2)


def test_lr50_is_interpolated_in_log_rate_between_two_rates():
    """1 of 10 and 7 of 10 fail: the logits are log(1.5 / 9.5) and log(7.5 / 3.5)."""
    rates = [1e-3] * 10 + [1e-1] * 10
    failed = [i < 1 for i in range(10)] + [i < 7 for i in range(10)]
    lower, upper = math.log(1.5 / 9.5), math.log(7.5 / 3.5)
    threshold = lr50(rates, failed)
    assert threshold.rate == pytest.approx(1e-3 * 100 ** (-lower / (upper - lower)), rel=1e-6)
    assert threshold.bound == ""


def test_lr50_does_not_depend_on_the_order_of_the_runs():
    rates, failed = grid(0, 1, 3, 4)
    shuffled = np.random.default_rng(0).permutation(16)
    other = lr50([rates[i] for i in shuffled], [failed[i] for i in shuffled])
    assert other.rate == pytest.approx(lr50(rates, failed).rate)
    assert other.low == 1e-3


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ((0, 0, 0, 0), Threshold(1e-1, "above", 1e-1, None)),
        ((4, 4, 4, 4), Threshold(1e-4, "below", None, 1e-4)),
        ((0, 0, 0, 1), Threshold(1e-1, "above", 1e-1, None)),
        ((3, 4, 4, 4), Threshold(1e-4, "below", None, 1e-4)),
        ((4, 4, 0, 0), Threshold(math.sqrt(1e-5), "unclear", None, None)),
        ((1, 1, 1, 1), Threshold(math.sqrt(1e-5), "unclear", 1e-1, None)),
    ],
)
def test_lr50_beyond_the_rates_tried_is_marked(failures: tuple[int, ...], expected: Threshold):
    assert lr50(*grid(*failures)) == expected


def test_lr50_of_one_rate_is_unclear_unless_all_agree():
    assert lr50([1e-3] * 3, [True, False, True]) == Threshold(1e-3, "unclear", None, 1e-3)
    assert lr50([1e-3] * 3, [False] * 3).bound == "above"


def test_a_fraction_that_crosses_one_half_twice_has_no_clear_lr50():
    """Most fail at the second rate but not at the third: the bracket spans both."""
    threshold = lr50(*grid(0, 3, 1, 4))
    assert threshold.bound == "unclear"
    assert (threshold.low, threshold.high) == (1e-4, 1e-1)


def test_half_of_the_runs_failed_is_still_the_lower_side():
    threshold = lr50(*grid(0, 2, 3, 4))
    assert (threshold.low, threshold.high) == (1e-3, 1e-2)


@pytest.mark.parametrize(
    ("failures", "rate"),
    [((0, 0, 0, 0), 1e-1), ((0, 0, 1, 4), 1e-3), ((0, 1, 0, 0), 1e-4), ((1, 0, 0, 0), None)],
)
def test_the_highest_stable_rate_has_no_failure_at_or_below_it(
    failures: tuple[int, ...], rate: float | None
):
    assert highest_stable_rate(*grid(*failures)) == rate


def test_of_equally_good_rates_the_lowest_is_the_best():
    assert not lr_sensitivity([1.0, 2.0, 3.0], [4.0, 2.0, 2.0]).at_edge
    assert lr_sensitivity([1.0, 2.0, 3.0], [2.0, 2.0, 4.0]).at_edge


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf, 5.0])
def test_a_failure_counts_as_the_cap(loss: float | None):
    assert capped(loss, 4.0) == 4


def test_a_loss_under_the_cap_is_kept():
    assert capped(3.0, 4.0) == 3


def test_the_sensitivity_is_the_mean_excess_over_the_best_rate():
    """Excesses 1, 0, 2, 2."""
    sensitivity = lr_sensitivity(RATES, [3.0, 2.0, 4.0, 4.0])
    assert sensitivity.value == 1.25
    assert not sensitivity.at_edge


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
def test_a_best_rate_at_either_edge_of_the_grid_is_marked(losses: list[float]):
    assert lr_sensitivity(RATES, losses).at_edge


def test_the_edges_of_a_grid_are_its_extremes_in_any_order():
    sensitivity = lr_sensitivity([1e-2, 1e-4, 1e-3], [2.0, 3.0, 3.0])
    assert sensitivity.at_edge
    assert not lr_sensitivity([1e-3, 1e-4, 1e-2], [2.0, 3.0, 3.0]).at_edge


def test_a_seed_that_learns_nowhere_has_sensitivity_0():
    sensitivity = lr_sensitivity(RATES, [4.0] * 4)
    assert sensitivity.value == 0
    assert sensitivity.at_edge  # the lowest rate, among equals


def test_the_regret_is_the_mean_excess_over_the_best_of_all_arms():
    assert regret([3.0, 2.0, 4.0, 4.0], 1.5) == 1.75


def test_an_lr50_needs_seeds_with_the_same_rates():
    seed = [(rate, rate > 1e-2) for rate in RATES]
    assert lr50_of_seeds([seed] * 2) == lr50(*zip(*seed * 2, strict=True))
    assert lr50_of_seeds([seed, seed[::-1]]).bound == ""
    found = lr50_of_seeds([seed, seed[1:]])
    assert (found.bound, found.unequal) == ("unclear", True)
    assert found.rate == pytest.approx(10**-2.5)


def test_the_slope_of_a_power_law_is_its_exponent():
    depths = [2.0, 4.0, 6.0, 12.0, 24.0]
    assert loglog_slope(depths, [3 * n**-0.45 for n in depths]) == pytest.approx(-0.45)


def test_the_loglog_slope_is_by_least_squares_of_log_y():
    """The logs (0, 0), (1, 1), (2, 1) have slope 1/2; regressed the other way it would be 2/3."""
    assert loglog_slope([1, math.e, math.e**2], [1, math.e, math.e]) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------
# Intervals of thresholds


def runs_of(threshold: float) -> list[tuple[float, bool]]:
    return [(rate, rate >= threshold) for rate in (0.01, 0.1, 1.0, 10.0)]


def test_seeds_that_agree_leave_the_grids_spacing():
    """The 95% of one uniform draw as wide as the bracket, around the fitted threshold."""
    interval = threshold_interval([[runs_of(1.0)] * 6])
    fitted = math.log(lr50(*zip(*runs_of(1.0) * 6, strict=True)).rate)
    assert interval is not None
    assert interval.low == pytest.approx(fitted - 0.475 * math.log(10), abs=0.05)
    assert interval.high == pytest.approx(fitted + 0.475 * math.log(10), abs=0.05)


def test_a_difference_of_thresholds_has_the_spread_of_two():
    """The sum of two uniform draws is triangular: its central 95% is 2 (1 - sqrt(0.05)) w / 2."""
    arms = [[runs_of(1.0)] * 6, [runs_of(0.1)] * 6]
    interval = threshold_interval(arms, (1, -1))
    assert interval is not None
    half = (1 - math.sqrt(0.05)) * math.log(10)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, abs=0.06)
    assert (interval.high + interval.low) / 2 == pytest.approx(math.log(10), abs=0.06)


def test_seeds_that_differ_widen_the_interval_and_are_resampled_together():
    seeds = [runs_of(0.1), runs_of(1.0), runs_of(10.0)] * 2
    alone = threshold_interval([seeds])
    agreed = threshold_interval([[runs_of(1.0)] * 6])
    assert alone is not None
    assert agreed is not None
    assert alone.high - alone.low > 1.2 * (agreed.high - agreed.low)
    paired = threshold_interval([seeds, seeds], (1, -1))  # the seeds' part cancels
    assert paired is not None
    assert (paired.low + paired.high) / 2 == pytest.approx(0, abs=0.1)


def test_a_bound_leaves_its_end_open():
    never = [(rate, False) for rate in (0.01, 0.1)]
    interval = threshold_interval([[never] * 6])
    assert interval is not None
    assert interval.low == pytest.approx(math.log(0.1))
    assert interval.high == math.inf
    difference = threshold_interval([[runs_of(1.0)] * 6, [never] * 6], (1, -1))
    assert difference is not None
    assert difference.low == -math.inf
    fitted = math.log(lr50(*zip(*runs_of(1.0) * 6, strict=True)).rate)
    most = fitted + 0.475 * math.log(10) - math.log(0.1)
    assert difference.high == pytest.approx(most, abs=0.05)


def test_seeds_of_which_some_never_fail_leave_the_interval_open():
    never = [(rate, False) for rate in (0.01, 0.1, 1.0, 10.0)]
    interval = threshold_interval([[runs_of(10.0), never, never] * 2])
    assert interval is not None
    assert interval.high == math.inf
    assert 0 < interval.low < math.log(11)


def test_failures_that_do_not_rise_leave_both_ends_open():
    falling = [(rate, rate < 1) for rate in (0.01, 0.1, 1.0, 10.0)]
    interval = threshold_interval([[falling] * 6])
    assert interval is not None
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_under_five_seeds_no_threshold_has_an_interval():
    never = [(0.01, False), (0.1, False)]
    assert threshold_interval([[never] * 4]) is None
    assert threshold_interval([[never] * 5]) is not None
