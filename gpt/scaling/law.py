"""Chinchilla's parametric law of the loss, fitted to runs: approach 3 of Hoffmann et al. 2022.

    L(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters, D of training tokens, L the final validation loss. The fit minimizes
the sum over runs of Huber's loss of log L, with delta = 1e-3 as theirs, by L-BFGS from many starts.
The predicted log L is the log-sum-exp of e, a - alpha log N and b - beta log D.

Besiroglu et al. 2024 could not reproduce Hoffmann et al.'s numbers, and found two reasons that
matter here. The optimizer had stopped early, since a mean of Huber losses is smaller than L-BFGS's
absolute tolerances; the objective here is a sum in units of delta^2, and log N and log D are
centered. And the published constants were rounded, which biases predictions: a rounded exponent
changes the powers of large N and D. So summary.json has all digits.

This module knows nothing of cells or files, only numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from gpt.compare.analysis.statistics import ALPHA, Interval
from gpt.scaling.ladder import FLOPS

Values = NDArray[np.float64]

DELTA = 1e-3  # of Huber's loss, in nats of log L; Hoffmann et al. 2022, section 3.3
EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)  # alpha and beta of the starts
STARTS = 8  # of all pairs of EXPONENTS, those with the lowest objective
LEAST_EXPONENT, MOST_EXPONENT = 1e-3, 4.0
LEAST_COEFFICIENT = 1e-4  # E, and A and B at mean log N and D, relative to the lowest loss
LEAST_SETTINGS = 8  # of N and D; the law has five constants


@dataclass(frozen=True)
class Law:
    """The constants of L(N, D); losses in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: float | Values, d: float | Values) -> float | Values:
        """The loss of n parameters trained on d tokens."""
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @property
    def a(self) -> float:
        """Exponent of the best number of parameters for C FLOPs, N ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the best number of tokens for C FLOPs, D ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    def best_size(self, flops: float) -> float:
        """The number of parameters with the lowest loss where 6 N D = `flops`.

        It is G (C / 6)^a with G = (alpha A / (beta B))^(1 / (alpha + beta)), their equation 4.
        """
        return _exp(self._log_best_size(flops))

    def tokens_per_parameter(self, flops: float) -> float:
        """D / N at `best_size`."""
        return _exp(math.log(flops / FLOPS) - 2 * self._log_best_size(flops))

    def _log_best_size(self, flops: float) -> float:
        log_ratio = math.log(self.alpha * self.A) - math.log(self.beta * self.B)
        return log_ratio / (self.alpha + self.beta) + self.a * math.log(flops / FLOPS)


def _exp(x: float) -> float:
    """The exponential, at most 1e304: laws of nearly constant losses have extreme best sizes."""
    return math.exp(min(x, 700.0))


@dataclass(frozen=True)
class Runs:
    """The runs that a law is fitted to, all arrays of one length.

    Attributes:
        n: parameters.
        d: training tokens.
        loss: final validation losses, nats per token.
    """

    n: Values
    d: Values
    loss: Values

    def settings(self) -> list[NDArray[np.intp]]:
        """The indices of the runs of each pair of N and D, which differ in their seeds."""
        _, setting = np.unique(np.stack([self.n, self.d]), axis=1, return_inverse=True)
        return [np.flatnonzero(setting == each) for each in range(setting.max() + 1)]

    def at(self, indices: NDArray[np.intp]) -> Runs:
        """Some of the runs, repeated where an index is."""
        return Runs(self.n[indices], self.d[indices], self.loss[indices])


class _Objective:
    """The sum of Huber losses in units of DELTA^2, and its gradient.

    The argument x is (e, a', b', alpha, beta). With log N and log D centered, the exponents are
    nearly uncorrelated with the coefficients: a' = a - alpha mean(log N), and b' likewise.
    """

    def __init__(self, runs: Runs) -> None:
        self.centers = float(np.log(runs.n).mean()), float(np.log(runs.d).mean())
        self.u = np.log(runs.n) - self.centers[0]
        self.v = np.log(runs.d) - self.centers[1]
        self.target = np.log(runs.loss)

    def __call__(self, x: Values) -> tuple[float, Values]:
        e, a, b, alpha, beta = x
        terms = np.stack([np.full_like(self.u, e), a - alpha * self.u, b - beta * self.v])
        log_loss = np.logaddexp.reduce(terms)
        residual = (log_loss - self.target) / DELTA
        clipped = np.clip(residual, -1, 1)
        total = float(np.sum(clipped * (residual - clipped / 2)))
        of_e, of_a, of_b = np.exp(terms - log_loss) * (clipped / DELTA)  # by softmax
        gradient = [of_e.sum(), of_a.sum(), of_b.sum(), -of_a @ self.u, -of_b @ self.v]
        return total, np.array(gradient)

    def start(self, alpha: float, beta: float) -> Values:
        """The constants that, with these exponents, minimize the squared relative errors."""
        loss = np.exp(self.target)
        columns = np.stack([np.ones_like(loss), np.exp(-alpha * self.u), np.exp(-beta * self.v)])
        coefficients, _ = optimize.nnls((columns / loss).T, np.ones_like(loss))
        least = LEAST_COEFFICIENT * loss.min()
        return np.array([*np.log(np.maximum(coefficients, least)), alpha, beta])

    def law(self, x: Values) -> Law:
        """The law of an argument."""
        e, a, b, alpha, beta = map(float, x)
        log_n, log_d = self.centers
        return Law(
            math.exp(e), math.exp(a + alpha * log_n), math.exp(b + beta * log_d), alpha, beta
        )

    def argument(self, law: Law) -> Values:
        """The argument of a law."""
        log_n, log_d = self.centers
        a = math.log(law.A) - law.alpha * log_n
        b = math.log(law.B) - law.beta * log_d
        return np.array([math.log(law.E), a, b, law.alpha, law.beta])


def fit(runs: Runs, starts: int = STARTS, near: Law | None = None) -> Law:
    """The law that fits the runs best.

    Args:
        runs: of at least LEAST_SETTINGS pairs of N and D, with several values of each.
        starts: how many of the best starting points to minimize from.
        near: one more starting point.
    """
    objective = _Objective(runs)
    points = [objective.start(*pair) for pair in itertools.product(EXPONENTS, repeat=2)]
    points.sort(key=lambda x: objective(x)[0])
    points = [*([objective.argument(near)] if near else []), *points[:starts]]
    low = math.log(LEAST_COEFFICIENT * float(runs.loss.min()))
    found = [
        optimize.minimize(
            objective,
            x,
            jac=True,
            method="L-BFGS-B",
            bounds=[*[(low, None)] * 3, *[(LEAST_EXPONENT, MOST_EXPONENT)] * 2],
            options={"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-6, "maxcor": 20},
        )
        for x in points
    ]
    return objective.law(min(found, key=lambda each: float(each.fun)).x)


def bootstrap(runs: Runs, law: Law, resamples: int) -> list[Law]:
    """Laws fitted to resamples of the settings, pairs of N and D, each with all of its seeds.

    A setting's seeds share its distance from the law, which is more than the spread of its seeds
    where the law is only an approximation. So settings are drawn, not runs.

    Args:
        law: the fit to all runs, one of the two starting points of each.
    """
    random, settings = np.random.default_rng(0), runs.settings()
    laws: list[Law] = []
    while len(laws) < resamples:
        drawn = random.integers(len(settings), size=len(settings))
        sample = runs.at(np.concatenate([settings[each] for each in drawn]))
        if len(np.unique(drawn)) >= LEAST_SETTINGS - 2:  # five constants need more than five
            laws.append(fit(sample, starts=1, near=law))
    return laws


def interval(laws: list[Law], quantity: Callable[[Law], float]) -> Interval:
    """The percentile interval at 1 - ALPHA of a quantity over resamples."""
    values = [quantity(law) for law in laws]
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(low), float(high))
