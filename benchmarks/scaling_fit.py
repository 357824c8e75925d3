"""How well a small scaling study recovers a known law, and how often its intervals contain it.

    python benchmarks/scaling_fit.py [--repetitions 200] [--resamples 200] [--json FILE]

Each repetition draws the losses of a ladder like configs/scaling/tiny.yaml: those of a law, with a
relative error that the seeds of a pair of N and D share (what the law misses) and one of each run
(its seed). The table shows the spread of the estimates and the coverage of the 95% intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpt.compare.analysis.statistics import Interval
from gpt.scaling import isoflop
from gpt.scaling.law import Law, Runs, bootstrap, fit, interval

LAW = Law(E=1.2, A=12.0, B=50.0, alpha=0.35, beta=0.33)  # of about the losses of small byte models
SIZES = (4_328, 7_644, 11_728, 22_200, 35_744, 72_048, 120_640)
BUDGETS = (5e9, 1.5e10, 5e10, 1.5e11)
RATIOS = (0.7, 200.0)  # tokens per parameter
SEEDS = 1
ERRORS = {"small errors": (0.001, 0.002), "large errors": (0.007, 0.007)}  # shared, of each run
QUANTITIES: dict[str, Callable[[Law], float]] = {
    "E": lambda law: law.E,
    "alpha": lambda law: law.alpha,
    "beta": lambda law: law.beta,
    "a": lambda law: law.a,
    "log best size": lambda law: float(np.log(law.best_size(BUDGETS[-1]))),
}
Rows = dict[str, dict[str, float]]


def ladder(random: np.random.Generator, shared: float, own: float) -> Runs:
    """The runs of a study whose losses follow LAW, with relative errors of these sizes."""
    pairs = [
        (n, c / 6 / n) for c in BUDGETS for n in SIZES if RATIOS[0] <= c / 6 / n**2 <= RATIOS[1]
    ]
    n, d = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    error = np.tile(shared * random.normal(size=len(n)), SEEDS)
    error += own * random.normal(size=SEEDS * len(n))
    n, d = np.tile(n, SEEDS), np.tile(d, SEEDS)
    return Runs(n, d, np.asarray(LAW.loss(n, d)) * np.exp(error))


def recovery(repetitions: int, resamples: int, shared: float, own: float) -> Rows:
    """Truth, mean, spread and coverage of each quantity."""
    estimates: dict[str, list[float]] = {name: [] for name in [*QUANTITIES, "a by parabolas"]}
    covered: dict[str, list[bool]] = {name: [] for name in estimates}

    def record(name: str, estimate: float, found: Interval, truth: float) -> None:
        estimates[name].append(estimate)
        covered[name].append(found.low <= truth <= found.high)

    for seed in range(repetitions):
        runs = ladder(np.random.default_rng(seed), shared, own)
        law = fit(runs)
        laws = bootstrap(runs, law, resamples)
        for name, quantity in QUANTITIES.items():
            record(name, quantity(law), interval(laws, quantity), quantity(LAW))
        exponent = isoflop.exponent(isoflop.curves(runs))
        if exponent is not None:
            record("a by parabolas", exponent.a, exponent.interval, LAW.a)
    truths = {name: quantity(LAW) for name, quantity in QUANTITIES.items()}
    return {
        name: {
            "truth": truths.get(name, LAW.a),
            "mean": float(np.mean(values)),
            "sd": float(np.std(values)),
            "coverage": float(np.mean(covered[name])),
            "studies": len(values),
        }
        for name, values in estimates.items()
        if values
    }


def main() -> None:
    """Print a table for each size of the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tables = {
        name: recovery(options.repetitions, options.resamples, *errors)
        for name, errors in ERRORS.items()
    }
    for name, rows in tables.items():
        print(f"\n{name}: {ERRORS[name][0]:.1%} shared, {ERRORS[name][1]:.1%} of each run\n")
        print("| quantity | truth | mean | sd | coverage | studies |\n|---|---|---|---|---|---|")
        for quantity, row in rows.items():
            numbers = f"{row['truth']:.3f} | {row['mean']:.3f} | {row['sd']:.3f}"
            print(f"| {quantity} | {numbers} | {row['coverage']:.0%} | {row['studies']:.0f} |")
    if options.json:
        options.json.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
