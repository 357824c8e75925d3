"""Searches for the highest trainable rate: the rule, and comparisons that follow it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from comparing import Make, Trainer, compare, grid_tree, write
from hypothesis import given
from hypothesis import strategies as st

from gpt.compare import comparison, estimate, registration
from gpt.compare.analysis.results import SearchResult
from gpt.compare.analysis.searches import read_outcomes
from gpt.compare.analysis.statistics import mean_interval
from gpt.compare.analysis.wording import conclusions
from gpt.compare.execution import worker
from gpt.compare.figures.base import PlotData
from gpt.compare.figures.thresholds import searched, sensitivity, thresholds
from gpt.compare.grid import Search, load
from gpt.compare.search import Bound, Ending, Next, bracket, next_step
from gpt.errors import InputError, StoppedError

MOST = 8


def run(ending_of, start: int = 0, most_runs: int = MOST) -> tuple[dict[int, Ending], str]:
    """A search from `start` whose run at a step ends as `ending_of(step)`, and why it ended."""
    endings: dict[int, Ending] = {}
    following = Next(start, "")
    while following.step is not None:
        assert following.step not in endings
        endings[following.step] = ending_of(following.step)
        following = next_step(endings, most_runs)
    assert len(endings) <= most_runs
    return endings, following.why


def monotone(edge: int, slow_below: int = -1000):
    """Runs train at steps up to the edge, except that the lowest are slow."""
    return lambda step: "failed" if step > edge else "slow" if step < slow_below else "trained"


@given(edge=st.integers(-100, 100), start=st.integers(-100, 100), most_runs=st.integers(4, 12))
def test_a_monotone_threshold_is_bracketed_or_bounded(edge: int, start: int, most_runs: int):
    endings, _ = run(monotone(edge), start, most_runs)
    found = bracket(endings)
    assert found.monotone in (True, None)
    assert found.low is None or found.low <= edge
    assert found.high is None or found.high > edge
    assert (
        found.bound
        == {(True, True): "", (True, False): "above", (False, True): "below"}[
            found.low is not None, found.high is not None
        ]
    )
    # Galloping by two, r runs reach 2 (r - 1) steps; one more bisects, and one more checks.
    if -2 * (most_runs - 3) < edge - start < 2 * (most_runs - 3):
        assert (found.low, found.high, found.monotone) == (edge, edge + 1, True)
    assert run(monotone(edge), start, most_runs)[0] == endings


@pytest.mark.parametrize(
    ("edge", "tried"),
    [
        (0, [0, 2, 1]),  # the rate above the bracket has been tried
        (1, [0, 2, 1, 3]),
        (4, [0, 2, 4, 6, 5]),
        (-1, [0, -2, -1, 1]),
        (-2, [0, -2, -1]),
        (13, [0, 2, 4, 6, 8, 10, 12, 14]),
        (99, [0, 2, 4, 6, 8, 10, 12, 14]),
        (-99, [0, -2, -4, -6, -8, -10, -12, -14]),
    ],
)
def test_the_runs_of_a_search_in_their_order(edge: int, tried: list[int]):
    assert list(run(monotone(edge))[0]) == tried


def test_slow_runs_send_it_upwards():
    endings, _ = run(monotone(edge=6, slow_below=3))
    assert list(endings) == [0, 2, 4, 6, 8, 7]
    assert bracket(endings).bound == ""
    never, _ = run(lambda step: "slow" if step < 5 else "failed")
    assert (bracket(never).low, bracket(never).high, bracket(never).bound) == (4, 5, "unclear")
    always, why = run(lambda step: "slow")
    assert (len(always), bracket(always).bound, why) == (8, "unclear", "8 runs are the most")


def test_a_run_that_trains_above_the_bracket_is_counted_and_moves_nothing():
    endings, _ = run(lambda step: "failed" if step == 2 else "trained", start=-1)
    assert list(endings) == [-1, 1, 3, 5, 7, 9, 11, 13]  # it never met the failure
    endings, _ = run(lambda step: "failed" if step == 2 else "trained")
    assert list(endings) == [0, 2, 1, 3]
    found = bracket(endings)
    assert (found.low, found.high, found.bound, found.monotone) == (1, 2, "", False)
    slow, _ = run(lambda step: {2: "failed", 3: "slow"}.get(step, "trained"))
    assert bracket(slow).monotone is True


@pytest.mark.parametrize(
    ("lost", "bound", "ends"),
    [
        (0, "unclear", (None, None)),
        (2, "above", (0, None)),
        (4, "above", (2, None)),
        (3, "", (2, 4)),  # the bracket stays wide
    ],
)
def test_a_lost_run_ends_it_with_what_is_known(lost: int, bound: str, ends: tuple[int, int]):
    endings, why = run(lambda step: "lost" if step == lost else monotone(2)(step))
    found = bracket(endings)
    assert list(endings)[-1] == lost
    assert why == "a run has no result"
    assert (found.bound, (found.low, found.high), found.monotone) == (bound, ends, None)


@given(
    anchor=st.floats(1e-9, 1e3),
    ratio=st.floats(1.01, 4),
    start=st.floats(1e-9, 1e3),
    k=st.integers(-24, 24),
)
def test_rates_and_steps_agree_on_the_lattice(anchor: float, ratio: float, start: float, k: int):
    search = Search(start=start, anchor=anchor, ratio=ratio)
    step = search.step(start) + k
    assert search.step(search.rate(step)) == step
    assert 1e-30 <= search.rate(step) <= 1e30
    first = search.start_of("any")
    assert abs(math.log(first / start)) <= math.log(ratio) / 2 + 1e-3


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (("", ""), "seeds and ranges: 'pre': 0.2 (0.1 to 0.4)."),
        (("", "above"), "1 of 2 are only bounds: 'pre': 0.2 (0.1 to 0.4)."),
        (("", "unclear"), "1 of 2 are unclear and left out: 'pre': 0.1 (0.1 to 0.1)."),
        (("unclear", "unclear"), "No search found a threshold"),
    ],
)
def test_unclear_searches_give_no_number(bounds: tuple[Bound, Bound], words: str):
    searches = [
        SearchResult("pre", "", seed, rate, 0.05, 0.8, bound, None, 3, "")
        for seed, (rate, bound) in enumerate(zip((0.1, 0.4), bounds, strict=True))
    ]
    assert words in conclusions((), (), None, searches)[0]


# ---------------------------------------------------------------------------------------------
# Comparisons


ARMS = ("pre", "post")
# Arm -> seed -> the highest rate at which its runs train.
EDGES = {"pre": (0.011, 0.014, 0.02, 0.02, 0.03), "post": (2e-3, 2.5e-3, 4e-3, 3e-3, 5e-3)}


def tree(tiny: Make, **changes: Any) -> dict[str, Any]:
    base = tiny(sampling={"tokens": 0}, training={"steps": 20}, evaluation={"every": 20})
    question = {"question": "Is it higher?", "of": ["pre", "post"], "measure": "log_threshold"}
    return grid_tree(
        base,
        arms={"placement": {arm: {"model.norm.placement": arm} for arm in ARMS}},
        grid={},
        search={"start": {"pre": 0.01, "post": 0.003}},
        seeds=5,
        probes=False,
        contrasts=[question],
        pairs=[],
        **changes,
    )


@pytest.fixture
def trainer(
    tiny_run: Path, in_this_process: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    stub = Trainer(tiny_run, EDGES)
    monkeypatch.setattr(worker, "_train", stub)
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    return stub


def contents(directory: Path) -> dict[str, str]:
    names = ("search.json", "summary.json", "cells.csv", "report.md", "registration.json")
    texts = {name: (directory / name).read_text() for name in names}
    del texts["registration.json"]
    texts["report.md"] = re.sub("(Run with|Registered).*", "", texts["report.md"], flags=re.DOTALL)
    texts["summary.json"] = re.sub('"registered": .*', "", texts["summary.json"])
    return texts


def test_each_arm_and_seed_has_its_own_threshold(tiny: Make, tmp_path: Path, trainer: Trainer):
    found = compare(write(tmp_path / "grid.yaml", tree(tiny)), tmp_path / "run")
    assert len(found.searches) == 10
    for each in found.searches:
        edge = EDGES[each.arm][each.seed]
        assert each.low is not None
        assert each.high is not None
        assert each.rate is not None
        assert each.low <= edge < each.high == pytest.approx(1.25 * each.low, rel=1e-3)
        assert each.rate == pytest.approx(math.sqrt(each.low * each.high))
        assert (each.bound, each.monotone) == ("", True)
    assert len(trainer.seen) == len(set(trainer.seen)) == found.with_result
    logs = [math.log(e.rate) for e in found.searches if e.rate]
    of = [a - b for a, b in zip(logs[::2], logs[1::2], strict=True)]
    (contrast,) = found.contrasts
    assert contrast is not None
    assert contrast.value == pytest.approx(fmean(of))
    assert contrast.interval == mean_interval(of)
    assert (contrast.p, contrast.reach, contrast.bounds) == (0.0625, ("",), ())
    assert "the highest trainable rate rises" in found.conclusions[0]
    assert found.conclusions[1].startswith("Highest trainable rates, geometric means")
    text = (tmp_path / "run/report.md").read_text()
    assert f"{found.searches[0].low:g} to {found.searches[0].high:g})" in text
    grid, cells = load(tmp_path / "grid.yaml")
    data = PlotData(grid, found, read_outcomes(grid, cells, tmp_path / "run"))
    plot = searched(data)
    assert plot is not None
    assert len(plot.figure.axes[0].lines) == 10
    assert thresholds(data) is sensitivity(data) is None
    logged = json.loads((tmp_path / "run/search.json").read_text())
    assert sum(len(search["runs"]) for search in logged) == len(trainer.seen)
    assert [run["next"] for search in logged for run in search["runs"][-1:]] == [None] * 10


def test_a_stopped_search_ends_like_an_uninterrupted_one(
    tiny: Make, tmp_path: Path, trainer: Trainer
):
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 2})
    compare(path, tmp_path / "whole")
    order, trainer.seen = trainer.seen, []
    for cells in (1, 4, 6, 11):  # at the first, between rounds, and within them
        with pytest.raises(StoppedError):
            compare(path, tmp_path / "run", stop=lambda cells=cells: len(trainer.seen) >= cells)
        assert len(trainer.seen) == cells
    compare(path, tmp_path / "run")
    assert sorted(trainer.seen) == sorted(order)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    comparison.report(*load(path), tmp_path / "run")
    assert len(trainer.seen) == len(order)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_lost_run_leaves_a_bound_and_is_tried_again(tiny: Make, tmp_path: Path, trainer: Trainer):
    path = write(tmp_path / "grid.yaml", tree(tiny))
    trainer.lost = {"pre_learning-rate-0.01431_seed-0"}  # the second run of this search
    found = compare(path, tmp_path / "run")
    bounded = [each for each in found.searches if each.bound]
    assert len(bounded) == 1
    assert (bounded[0].arm, bounded[0].bound, bounded[0].rate) == (
        "pre",
        "above",
        pytest.approx(0.009155),
    )
    assert list(found.lost.values()) == ["out of memory"]
    (contrast,) = found.contrasts
    assert contrast is not None
    assert contrast.reach == ("at least",)
    assert contrast.interval is not None
    assert contrast.interval.high == math.inf
    assert contrast.bounds == ("pre, seed 0: above 0.009155, because a run has no result",)
    assert "becomes at least" in found.conclusions[0]
    assert trainer.seen.count(*trainer.lost) == 1
    again = comparison.report(*load(path), tmp_path / "run")
    assert again == found
    trainer.lost = set()
    retried = compare(path, tmp_path / "run").searches[0]
    assert (retried.low, retried.high, retried.monotone) == (0.009155, 0.01144, True)


def test_bounds_open_the_interval_on_their_side(tiny: Make, tmp_path: Path, trainer: Trainer):
    """Post-norm never fails, so the difference may be lower than 0: the question stays open."""
    trainer.edges = {"pre": (0.01,) * 5, "post": (1e9,) * 5}
    rules = {"start": {"pre": 0.01, "post": 0.003}, "most_runs": 4}
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "search": rules})
    found = compare(path, tmp_path / "run")
    assert {each.bound for each in found.searches if each.arm == "post"} == {"above"}
    assert max(each.runs for each in found.searches) == 4
    (contrast,) = found.contrasts
    assert contrast is not None
    assert (contrast.reach, contrast.answer) == (("at most",), "open")
    assert contrast.interval is not None
    assert contrast.interval.low == -math.inf


def test_a_start_that_is_too_slow_sends_it_upwards(tiny: Make, tmp_path: Path, trainer: Trainer):
    """Post-norm's first rate, 0.003, is too slow; seed 0 has no rate that trains."""
    trainer.slow_below = 0.0045
    trainer.edges = {**EDGES, "post": (0.001, 0.006)}
    found = compare(write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 2}), tmp_path / "run")
    never, later = (each for each in found.searches if each.arm == "post")
    assert never.bound == "unclear"
    assert (later.bound, later.low, later.high) == ("", 0.005859, 0.007324)
    assert found.contrasts[0].reach == ("unknown",)  # type: ignore[union-attr]
    assert "changes by an unknown factor" in found.conclusions[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {}}, "search.start: is missing"),
        ({"search": {"start": 0}}, "search.start: 0 is not between 1e-09 and 1000"),
        ({"search": {"start": {"pre": 0.01}}}, "search.start: needs a rate for each of pre; post"),
        ({"search": {"start": 1, "ratio": 1}}, "search.ratio: 1 is not between 1.01 and 4"),
        ({"search": {"start": 1, "option": "seed"}}, "search.option: "),
        ({"grid": {"optimizer.learning_rate": [1]}}, "is on an axis, and is to be searched"),
        ({"pairs": [["pre", "post"]]}, "pairs: cannot be compared at the rates that searches"),
        ({"search": None}, "contrasts.0.measure: log_threshold: log_threshold needs a search"),
        ({"contrasts": [{"question": "?", "of": ARMS}]}, "contrasts.0.measure: loss: log_thr"),
        ({"arms": {"x": {"pre": {}, "post": {"optimizer.learning_rate": 1}}}}, "and by the grid"),
    ],
)  # fmt: skip
def test_a_wrong_search_is_refused(tiny: Make, tmp_path: Path, changes: Any, words: str):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path / "grid.yaml", {**tree(tiny), **changes}))
    assert words in str(caught.value)


def test_contrasts_of_searches_have_no_rates(tiny: Make, tmp_path: Path):
    for where in ({"at": {"optimizer.learning_rate": [0.01]}}, {"rates": {"pre": 1, "post": 1}}):
        question = {"question": "?", "of": ARMS, "measure": "log_threshold", **where}
        with pytest.raises(InputError, match="log_threshold has no rates"):
            load(write(tmp_path / "grid.yaml", {**tree(tiny), "contrasts": [question]}))


def test_the_search_is_registered_and_others_keep_their_hashes(tiny: Make, tmp_path: Path):
    def sha256(**changes: Any) -> str:
        grid, _ = load(write(tmp_path / "grid.yaml", {**tree(tiny), **changes}))
        return registration.fingerprint(grid.contrasts, grid.seeds, grid.search)

    start = {"pre": 0.01, "post": 0.003}
    assert sha256() == sha256(search={"start": {**start, "post": 0.0031}})  # on the lattice, equal
    assert sha256() != sha256(search={"start": {**start, "post": 0.004}})
    assert sha256() != sha256(search={"start": start, "most_runs": 9})
    more = {arm: {"model.norm.placement": arm} for arm in (*ARMS, "peri")}
    grown = sha256(arms={"placement": more}, search={"start": {**start, "peri": 0.01}})
    assert grown == sha256()


def test_a_search_grows_by_arms_and_seeds_only(tiny: Make, tmp_path: Path, trainer: Trainer):
    path = write(tmp_path / "grid.yaml", {**tree(tiny), "seeds": 1})
    compare(path, tmp_path / "run")
    before = list(trainer.seen)
    more = load(write(tmp_path / "more.yaml", {**tree(tiny), "seeds": 2}))
    rules = {"start": {"pre": 0.01, "post": 0.003}, "most_runs": 9}
    other = load(write(tmp_path / "other.yaml", {**tree(tiny), "seeds": 2, "search": rules}))
    with pytest.raises(InputError, match="only the first rates of new arms can be added"):
        comparison.check_directory(*other, tmp_path / "run", extend=True)
    added = comparison.check_directory(*more, tmp_path / "run", extend=True)
    assert {cell.config.seed for cell in added} == {1}
    assert trainer.seen == before
    with pytest.raises(InputError, match="--reuse: a search chooses its cells"):
        comparison.dry_run(*more, tmp_path / "new", 1, reuse=[tmp_path / "run"])
    described = comparison.dry_run(*load(path), tmp_path / "run", 1)
    assert f"{len(before)} have a result already" in described
    fresh = comparison.dry_run(*load(path), tmp_path / "new", 1)
    assert "up to 16: 2 arms, 1 seed, up to 8 rates of each" in fresh
    assert "and up to 14 more, which searches choose" in fresh
