"""The parametric law and the parabolas, on losses whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from benchmarks import scaling_fit
from gpt.scaling import isoflop
from gpt.scaling.law import DELTA, Law, Runs, _Objective, bootstrap, fit, interval

REFIT = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024
BYTES = Law(E=1.0, A=60.0, B=180.0, alpha=0.35, beta=0.33)  # as of small models of bytes


def ladder(law: Law, budgets: list[float], *, seeds: int = 1, noise: float = 0.0) -> Runs:
    """Runs of five sizes around the best one of each budget, with relative noise."""
    random = np.random.default_rng(0)
    n = np.array([law.best_size(c) * r for c in budgets for r in (0.25, 0.5, 1, 2, 4)] * seeds)
    d = np.repeat(np.array(budgets * seeds), 5) / 6 / n
    losses = np.asarray(law.loss(n, d)) * np.exp(noise * random.normal(size=len(n)))
    return Runs(n, d, losses)


def test_the_objective_is_that_of_hoffmann_et_al():
    runs = ladder(BYTES, [1e10, 1e11], noise=0.01)
    law = Law(E=1.1, A=50.0, B=200.0, alpha=0.33, beta=0.35)
    predicted = np.log(1.1 + 50 * runs.n**-0.33 + 200 * runs.d**-0.35)
    expected = special.huber(DELTA, np.log(runs.loss) - predicted).sum()
    objective = _Objective(runs)
    assert objective(objective.argument(law))[0] * DELTA**2 == pytest.approx(expected)


def test_its_gradient_is_that_of_finite_differences():
    objective = _Objective(ladder(BYTES, [1e10, 1e11], noise=0.01))
    for x in (np.array([0.1, -1.0, 0.2, 0.4, 0.3]), np.array([-3.0, 0.5, 0.1, 1.0, 0.1])):
        numeric = optimize.approx_fprime(x, lambda x: objective(x)[0], 1e-7)
        np.testing.assert_allclose(objective(x)[1], numeric, rtol=1e-4, atol=1)


@pytest.mark.parametrize(
    ("law", "budgets"), [(REFIT, [1e18, 1e19, 1e20, 1e21]), (BYTES, [1e10, 3e10, 1e11])]
)
def test_exact_losses_give_back_their_law(law: Law, budgets: list[float]):
    found = fit(ladder(law, budgets))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-5)


def test_the_minimum_is_one_that_another_optimizer_cannot_improve():
    """L-BFGS's tolerances are absolute: with a mean of Huber losses it would end far from it."""
    runs = ladder(REFIT, [1e18, 1e19, 1e20], seeds=2, noise=0.005)
    objective = _Objective(runs)
    x = objective.argument(fit(runs))
    found = optimize.minimize(
        lambda x: objective(x)[0],
        x,
        method="Nelder-Mead",
        options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-9},
    )
    assert objective(x)[0] <= found.fun * (1 + 1e-6)


def test_one_outlier_changes_little():
    runs = ladder(BYTES, [1e10, 3e10, 1e11, 3e11])
    runs.loss[7] *= 1.2
    assert fit(runs).a == pytest.approx(BYTES.a, abs=1e-3)


def test_the_best_size_is_that_of_a_search():
    for law, flops in ((REFIT, 1e21), (BYTES, 1e11)):
        n = np.geomspace(1e-2, 1e2, 200_001) * law.best_size(flops)
        best = n[np.argmin(law.loss(n, flops / 6 / n))]
        assert law.best_size(flops) == pytest.approx(best, rel=1e-3)
        assert law.tokens_per_parameter(flops) == pytest.approx(flops / 6 / best**2, rel=1e-2)
    grown = REFIT.best_size(1e21) / REFIT.best_size(1e19)
    assert math.log(grown, 100) == pytest.approx(REFIT.a)
    assert REFIT.a + REFIT.b == pytest.approx(1)
    assert REFIT.a == pytest.approx(0.5126, abs=1e-4)  # as they report


def test_losses_that_depend_on_nothing_have_a_law_too():
    runs = ladder(BYTES, [1e10, 3e10, 1e11])
    flat = Runs(runs.n, runs.d, np.full_like(runs.loss, 2.5))
    law = fit(flat)
    for each in (law, *bootstrap(flat, law, resamples=3)):
        assert np.allclose(each.loss(flat.n, flat.d), 2.5, atol=1e-3)
        assert 0 < each.a < 1
        assert 0 <= each.best_size(1e11) <= 1e305
        assert 0 <= each.tokens_per_parameter(1e11) <= 1e305


def test_intervals_contain_the_truth_and_copies_of_runs_do_not_narrow_them():
    runs = ladder(BYTES, [1e10, 3e10, 1e11, 3e11], noise=0.003)
    twice = Runs(*(np.tile(values, 2) for values in (runs.n, runs.d, runs.loss)))
    found = []
    for each in (runs, twice):
        laws = bootstrap(each, fit(each), resamples=15)
        found.append(interval(laws, lambda law: law.a))
    assert found[0].low < BYTES.a < found[0].high
    assert found[0].high - found[0].low > 0.005
    assert found[1].low == pytest.approx(found[0].low, abs=2e-3)
    assert found[1].high == pytest.approx(found[0].high, abs=2e-3)


def parabolas(*, noise: float = 0.0, sizes: int = 6, shift: float = 0.0) -> Runs:
    """Four budgets whose losses are parabolas in log N, with the minimum at sqrt(C) / 100."""
    random = np.random.default_rng(1)
    n, d, loss = [], [], []
    for flops in (1e10, 1e11, 1e12, 1e13):
        best = math.sqrt(flops) / 100
        for size in best * np.geomspace(0.2, 5, sizes) * math.exp(shift):
            rounded = 1 + 0.005 * random.uniform(-1, 1)  # of steps
            n.append(size)
            d.append(flops / 6 / size * rounded)
            loss.append(2 + 0.1 * math.log(size / best) ** 2 + noise * random.normal())
    return Runs(*map(np.array, (n, d, loss)))


def test_the_minima_of_parabolas():
    curves = isoflop.curves(parabolas())
    assert [len(curve.n) for curve in curves] == [6, 6, 6, 6]
    for curve, flops in zip(curves, (1e10, 1e11, 1e12, 1e13), strict=True):
        assert curve.flops == pytest.approx(flops, rel=0.01)
        assert curve.best == pytest.approx(math.sqrt(flops) / 100)
    found = isoflop.exponent(curves)
    assert found is not None
    assert found.a == pytest.approx(0.5, abs=2e-3)  # budgets differ by the rounding
    assert found.interval.low < found.a < found.interval.high


def test_fiellers_interval_ends_where_the_slope_is_t_standard_errors_from_0():
    for curve in isoflop.curves(parabolas(noise=0.01)):
        coefficients, covariance = np.polyfit(np.log(curve.n), curve.loss, 2, cov=True)
        assert curve.best is not None
        assert curve.interval is not None
        assert curve.interval.low < curve.best < curve.interval.high
        for end in (curve.interval.low, curve.interval.high):
            of_slope = np.array([2 * math.log(end), 1, 0])
            error = math.sqrt(of_slope @ covariance @ of_slope)
            assert abs(of_slope @ coefficients) / error == pytest.approx(
                stats.t.ppf(0.975, 3), rel=1e-4
            )


def test_a_budget_without_a_minimum_has_no_best_size():
    assert all(curve.best is None for curve in isoflop.curves(parabolas(shift=3.0)))
    few = isoflop.curves(parabolas(sizes=3))
    assert all(curve.parabola is None and curve.best is None for curve in few)
    assert isoflop.exponent(few) is None
    noisy = isoflop.curves(parabolas(noise=1.0))
    assert any(curve.best is None or curve.interval is None for curve in noisy)


@pytest.mark.slow
def test_intervals_of_a_small_study_contain_the_truth():
    rows = scaling_fit.recovery(20, 40, 0.001, 0.002)
    assert set(rows) == {*scaling_fit.QUANTITIES, "a by parabolas"}
    for name in ("alpha", "beta", "a"):
        assert rows[name]["mean"] == pytest.approx(rows[name]["truth"], abs=0.03)
        assert rows[name]["coverage"] >= 0.8
