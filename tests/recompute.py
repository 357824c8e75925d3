"""Recompute a published report from its cells.csv and grid.yaml: `python tests/recompute.py DIR`.

This script imports nothing from gpt and shares no formula with it: intervals are inverted tests,
permutations are enumerated, and a generic optimizer fits Firth's regression. It prints what differs
from summary.json, and exits with 1 if anything does. It needs a result for every cell of the grid.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import optimize, stats

RATE = "optimizer.learning_rate"
FEWEST = 5  # the fewest seeds that give an interval

Run = dict[str, Any]


def recompute(directory: Path) -> list[str]:
    """The numbers that differ from summary.json, one line each."""
    rows = list(csv.DictReader((directory / "cells.csv").open(encoding="utf-8", newline="")))
    grid = yaml.safe_load((directory / "grid.yaml").read_text("utf-8"))
    summary = json.loads((directory / "summary.json").read_text("utf-8"))
    axes = [key.strip() for axis in grid["grid"] for key in axis.split(",")]
    runs = [_run(row, [key for key in axes if key != RATE]) for row in rows]
    differences = Differences()
    for arm in summary["arms"]:
        own = [r for r in runs if r["arm"] == arm["arm"] and _setting_text(r) == arm["setting"]]
        _check_arm(arm, own, differences)
    for number, (contrast, found) in enumerate(
        zip(grid["contrasts"], summary["contrasts"], strict=True)
    ):
        _check_contrast(f"contrast {number}", contrast, found, runs, differences)
        if contrast["measure"] == "log_threshold" and found is not None:
            thresholds = _thresholds(json.loads((directory / "search.json").read_text("utf-8")))
            _check_thresholds(f"contrast {number}", contrast, found, thresholds, differences)
    _check_pairs(summary["pairs"], runs, differences)
    return differences.lines


class Differences:
    """Numbers that are not equal."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.compared = 0

    def check(self, what: str, mine: Any, theirs: Any, tolerance: float = 1e-6) -> None:
        self.compared += 1
        if isinstance(mine, tuple) and isinstance(theirs, dict):
            self.check(f"{what}, low", mine[0], theirs["low"], tolerance)
            self.check(f"{what}, high", mine[1], theirs["high"], tolerance)
        elif mine is None or theirs is None or isinstance(mine, str | bool):
            if mine != theirs:
                self.lines.append(f"{what}: {mine} here, {theirs} there")
        elif not math.isclose(mine, theirs, rel_tol=tolerance, abs_tol=tolerance):
            self.lines.append(f"{what}: {mine:.9g} here, {theirs:.9g} there")


def _run(row: dict[str, str], axes: list[str]) -> Run:
    return {
        **row,
        "rate": float(row[RATE]),
        "seed": int(row["seed"]),
        "failed": row["failed"] == "True",
        "loss": float(row["capped_loss"]),
        "setting": tuple((key, row[key]) for key in axes),
    }


def _setting_text(run: Run) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in run["setting"])


# -- Statistics ------------------------------------------------------------------------------------


def wilson(failures: int, n: int) -> tuple[float, float]:
    """The fractions p that a score test at 5% does not reject."""
    z = stats.norm.isf(0.025)

    def excess(p: float) -> float:
        return (failures / n - p) ** 2 - z**2 * p * (1 - p) / n

    inside = min(max(failures / n, 1e-9), 1 - 1e-9)  # where the excess is negative
    low = 0.0 if failures == 0 else optimize.brentq(excess, 1e-12, inside, xtol=1e-12)
    high = 1.0 if failures == n else optimize.brentq(excess, inside, 1 - 1e-12, xtol=1e-12)
    return float(low), float(high)


def t_interval(values: list[float]) -> tuple[float, float] | None:
    """Student's interval of a mean, as scipy computes it."""
    if len(values) < FEWEST:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)


def sign_flip(values: list[float]) -> float:
    """The fraction of all sign choices whose sum is as far from 0 as the one seen."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    sums = np.abs(signs @ np.array(values))
    seen = abs(sum(values))
    return float(np.mean(sums >= seen - 1e-12 * max(seen, 1.0)))


def mcnemar(only_a: int, only_b: int) -> float:
    """Twice the binomial tail at 1/2, at most 1."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def holm(ps: list[float]) -> list[float]:
    """The largest of p_j (m - rank_j) over all p_j up to each p."""
    ranked = sorted(ps)
    return [
        min(1.0, max((len(ps) - i) * p for i, p in enumerate(ranked) if p <= mine)) for mine in ps
    ]


def lr50(runs: list[Run]) -> float | None:
    """Where Firth's regression crosses 1/2; None where no crossing lies between the rates."""
    x = np.log([run["rate"] for run in runs])
    y = np.array([run["failed"] for run in runs], dtype=float)
    rates = sorted({run["rate"] for run in runs})
    shares = [float(np.mean([r["failed"] for r in runs if r["rate"] == rate])) for rate in rates]
    mostly = [share > 0.5 for share in shares]
    if y.all() or not y.any() or mostly != sorted(mostly):
        return None

    def negative(beta: Any) -> float:
        logits = beta[0] + beta[1] * (x - x.mean())
        p = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        design = np.stack([np.ones_like(x), x - x.mean()])
        fisher = (design * (p * (1 - p))) @ design.T
        sign, logdet = np.linalg.slogdet(fisher)
        likelihood = y @ logits - np.logaddexp(0, logits).sum()
        return -float(likelihood + (logdet / 2 if sign > 0 else -1e9))

    options = {"xatol": 1e-11, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000}
    found = optimize.minimize(negative, [0.0, 1.0], method="Nelder-Mead", options=options)
    crossing = math.exp(x.mean() - found.x[0] / found.x[1])
    inside = rates[0] * (1 - 1e-6) <= crossing <= rates[-1] * (1 + 1e-6)
    return crossing if inside and found.x[1] > 0 else None


# -- The report's numbers --------------------------------------------------------------------------


def _check_arm(arm: dict[str, Any], runs: list[Run], differences: Differences) -> None:
    name = f"{arm['arm']} {arm['setting']}".strip()
    differences.check(f"{name}: runs", len(runs), arm["runs"])
    differences.check(f"{name}: failures", sum(r["failed"] for r in runs), arm["failures"])
    for at in arm["by_rate"]:
        here = [run for run in runs if run["rate"] == at["rate"]]
        where = f"{name} at {at['rate']:g}"
        losses = [run["loss"] for run in here]
        failures = sum(run["failed"] for run in here)
        differences.check(f"{where}: n", len(here), at["n"])
        differences.check(f"{where}: failures", failures, at["failures"])
        differences.check(f"{where}: Wilson", wilson(failures, len(here)), at["interval"])
        differences.check(f"{where}: mean loss", statistics.fmean(losses), at["mean_loss"])
        differences.check(f"{where}: median loss", statistics.median(losses), at["median_loss"])
        differences.check(f"{where}: interval", t_interval(losses), at["loss_interval"])
    if arm["lr50"]["bound"] == "":
        differences.check(f"{name}: LR50", lr50(runs), arm["lr50"]["rate"], 1e-4)
    stable = [
        rate
        for rate in sorted({run["rate"] for run in runs})
        if not any(run["failed"] for run in runs if run["rate"] <= rate)
    ]
    differences.check(
        f"{name}: highest stable rate", stable[-1] if stable else None, arm["highest_stable_rate"]
    )
    curves = [curve for curve in _curves(runs).values() if len(curve) == len(arm["by_rate"])]
    if curves:
        excess = statistics.fmean(_sensitivity(curve) for curve in curves)
        differences.check(f"{name}: sensitivity", excess, arm["lr_sensitivity"])


def _curves(runs: list[Run]) -> dict[tuple[Any, ...], list[float]]:
    curves = defaultdict(list)
    for run in runs:
        curves[run["setting"], run["seed"]].append(run["loss"])
    return curves


def _sensitivity(losses: list[float]) -> float:
    return statistics.fmean(losses) - min(losses)


def _value(measure: str, column: str | None, runs: list[Run]) -> float:
    """The measure of one arm's runs with one seed in one setting."""
    if measure == "loss":
        return statistics.fmean(run["loss"] for run in runs)
    if measure == "failure":
        return statistics.fmean(run["failed"] for run in runs)
    if measure == "sensitivity":
        return _sensitivity([run["loss"] for run in runs])
    values = [float(run[column or ""]) for run in runs]
    return statistics.fmean(map(math.log, values) if measure == "log_column" else values)


def _check_contrast(
    name: str,
    contrast: dict[str, Any],
    found: dict[str, Any] | None,
    runs: list[Run],
    differences: Differences,
) -> None:
    measure = contrast["measure"]
    if found is None or measure not in ("loss", "failure", "sensitivity", "column", "log_column"):
        return
    arms = [*contrast["of"], *(contrast["against"] or [])]
    own_rates = contrast.get("rates") or {}
    chosen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run["arm"] not in arms or (own_rates and run["rate"] != own_rates[run["arm"]]):
            continue
        if all(_same(run[key], values) for key, values in contrast["at"].items()):
            point = (run["setting"], None if own_rates else run["rate"])
            chosen[run["arm"], run["seed"], point] = run
    seeds = sorted(set.intersection(*({s for arm, s, _ in chosen if arm == name} for name in arms)))
    points = {p for _, _, p in chosen if all((arm, s, p) in chosen for arm in arms for s in seeds)}
    settings = sorted({setting for setting, _ in points})
    weights = dict.fromkeys(settings, 1 / len(settings))
    if contrast.get("slope"):
        x = np.log([float(dict(setting)[contrast["slope"]]) for setting in settings])
        fits = [np.polyfit(x, unit, 1)[0] for unit in np.eye(len(settings))]
        weights = dict(zip(settings, map(float, fits), strict=True))
    by_arm = {
        arm: [
            sum(
                weight
                * _value(
                    measure,
                    contrast.get("column"),
                    [chosen[arm, seed, p] for p in points if p[0] == setting],
                )
                for setting, weight in weights.items()
            )
            for seed in seeds
        ]
        for arm in arms
    }
    parts = [
        [a - b for a, b in zip(by_arm[one], by_arm[other], strict=True)]
        for one, other in zip(arms[::2], arms[1::2], strict=True)
    ]
    values = parts[0] if len(parts) == 1 else [a - b for a, b in zip(*parts, strict=True)]
    differences.check(f"{name}: seeds", len(seeds), found["seeds"])
    for number, part in enumerate(parts):
        differences.check(f"{name}: part", statistics.fmean(part), found["parts"][number])
    differences.check(f"{name}: value", statistics.fmean(values), found["value"])
    margins = [contrast["margin"]] + [-contrast["margin"]] * (contrast["claim"] == "within")
    p = max(sign_flip([value - margin for value in values]) for margin in margins)
    differences.check(f"{name}: p", p, found["p"])
    if measure != "failure" or contrast.get("slope"):  # an interval of failures is widened
        differences.check(f"{name}: interval", t_interval(values), found["interval"])


def _thresholds(searches: list[dict[str, Any]]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """(arm, setting, seed) -> the logs of the highest rate that trained and the lowest that failed.

    Only of searches that found both, with none slow.
    """
    found = {}
    for search in searches:
        failed = [run["rate"] for run in search["runs"] if run["counts_as"] == "failed"]
        good = [run["rate"] for run in search["runs"] if run["counts_as"] == "trained"]
        under = [rate for rate in good if rate < min(failed, default=0.0)]
        if under and len(failed) + len(good) == len(search["runs"]):
            key = search["arm"], search["setting"], search["seed"]
            found[key] = math.log(max(under)), math.log(min(failed))
    return found


def _check_thresholds(
    name: str,
    contrast: dict[str, Any],
    found: dict[str, Any],
    thresholds: dict[tuple[str, str, int], tuple[float, float]],
    differences: Differences,
) -> None:
    """A contrast of thresholds, if all its searches found theirs."""
    arms = [*contrast["of"], *(contrast["against"] or [])]
    axis = (contrast.get("slope") or "").rpartition(".")[2]
    wanted = [
        f"{key.rpartition('.')[2]} {value}" for key, of in contrast["at"].items() for value in of
    ]
    settings = sorted({s for _, s, _ in thresholds if not wanted or s in wanted})
    seeds = sorted({seed for _, _, seed in thresholds})
    keys = [(arm, setting, seed) for arm in arms for setting in settings for seed in seeds]
    if len(seeds) != found["seeds"] or not all(key in thresholds for key in keys):
        return
    weights = np.full(len(settings), 1 / len(settings))
    if axis:
        logs = np.log([float(setting.rpartition(" ")[2]) for setting in settings])
        weights = np.linalg.lstsq(np.vander(logs, 2), np.eye(len(settings)), rcond=None)[0][0]
    ends = np.array([thresholds[key] for key in keys])
    ends = ends.reshape(len(arms), len(settings), len(seeds), 2)
    signs = np.array([1, -1, -1, 1][: len(arms)])
    values = np.einsum("a,s,asn->n", signs, weights, ends.mean(-1))
    width = np.einsum("s,asn->", abs(weights), ends[..., 1] - ends[..., 0]) / len(seeds)
    interval = t_interval(values.tolist())
    if interval is not None:
        middle = sum(interval) / 2
        interval = min(interval[0], middle - width / 2), max(interval[1], middle + width / 2)
    differences.check(f"{name}: value", float(values.mean()), found["value"], 1e-3)
    differences.check(f"{name}: interval", interval, found["interval"], 1e-3)
    margin = contrast["margin"]
    differences.check(f"{name}: p", sign_flip([v - margin for v in values.tolist()]), found["p"])


def _check_pairs(pairs: list[dict[str, Any]], runs: list[Run], differences: Differences) -> None:
    ps = []
    for pair in pairs:
        name = f"{pair['a']} - {pair['b']}"
        index = {(r["arm"], r["seed"], r["setting"], r["rate"]): r for r in runs}
        both = [[key[1:] for key in index if key[0] == pair[side]] for side in ("a", "b")]
        seeds = sorted(set.intersection(*({seed for seed, _, _ in keys} for keys in both)))
        points = sorted({key[1:] for key in both[0]} & {key[1:] for key in both[1]})
        points = [p for p in points if all((s, *p) in keys for s in seeds for keys in both)]
        values = [
            statistics.fmean(
                index[pair["a"], seed, *p]["loss"] - index[pair["b"], seed, *p]["loss"]
                for p in points
            )
            for seed in seeds
        ]
        differences.check(f"{name}: mean", statistics.fmean(values), pair["loss"]["mean"])
        differences.check(f"{name}: median", statistics.median(values), pair["loss"]["median"])
        differences.check(f"{name}: interval", t_interval(values), pair["loss"]["interval"])
        ps.append(sign_flip(values))
        differences.check(f"{name}: p", ps[-1], pair["loss"]["p"])
        for at, point in zip(pair["by_rate"], points, strict=False):
            here = [p for p in points if p[1] == at["rate"] and _text(p[0]) == at["setting"]]
            counts = [
                (index[pair["a"], s, *p]["failed"], index[pair["b"], s, *p]["failed"])
                for s in seeds
                for p in here
            ]
            only_a, only_b = counts.count((True, False)), counts.count((False, True))
            differences.check(f"{name} {point}: only a", only_a, at["failures"]["only_a"])
            differences.check(f"{name} {point}: only b", only_b, at["failures"]["only_b"])
            differences.check(f"{name} {point}: p", mcnemar(only_a, only_b), at["failures"]["p"])
    for pair, adjusted in zip(pairs, holm(ps), strict=True):
        differences.check(f"{pair['a']} - {pair['b']}: Holm", adjusted, pair["holm_p"])


def _same(field: str, values: list[Any]) -> bool:
    """Whether a field of cells.csv is one of the values, as a number if it is one."""
    try:
        return float(field) in [float(value) for value in values]
    except ValueError:
        return field in map(str, values)


def _text(setting: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting)


if __name__ == "__main__":
    found = recompute(Path(sys.argv[1]))
    sys.stdout.write("".join(f"{line}\n" for line in found) or "everything agrees\n")
    sys.exit(bool(found))
