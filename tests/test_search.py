"""Searches for the highest trainable rate: the rule, and the grids that ask for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparing import Make, grid_tree, write
from hypothesis import given
from hypothesis import strategies as st

from gpt.compare import registration
from gpt.compare.analysis.results import SearchResult
from gpt.compare.analysis.wording import conclusions
from gpt.compare.grid import Search, load
from gpt.compare.search import Bound, Ending, Next, bracket, next_step
from gpt.errors import InputError

MOST = 8


def run(
    ending_of: Callable[[int], Ending],
    start: int = 0,
    most_runs: int = MOST,
    longer_of: Callable[[int], Ending] = lambda step: "slow",
) -> tuple[dict[int, Ending], str]:
    """A search from `start` whose run at a step ends as `ending_of(step)`, and why it ended.

    Args:
        longer_of: how a longer run ends.
    """
    endings: dict[int, Ending] = {}
    following, runs = Next(start, ""), 0
    while following.step is not None:
        step, _, longer = following
        assert (step in endings) == longer
        endings[step] = (longer_of if longer else ending_of)(step)
        runs += 1
        following = next_step(endings, most_runs - runs, step, longer=longer)
    assert runs <= most_runs
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


def test_runs_that_are_slow_even_when_longer_send_it_upwards():
    endings, _ = run(monotone(edge=5, slow_below=3))
    assert list(endings) == [0, 2, 4, 6, 5, 7]  # eight runs: those at 0 and 2 were repeated
    assert (bracket(endings).low, bracket(endings).high, bracket(endings).bound) == (5, 6, "")
    never, _ = run(lambda step: "slow" if step < 1 else "failed")
    assert (bracket(never).low, bracket(never).high, bracket(never).bound) == (0, 1, "below")
    always, why = run(lambda step: "slow")
    assert (len(always), bracket(always).bound) == (4, "unclear")
    assert why == "the limit of runs is reached"


@pytest.mark.parametrize(
    ("longer", "tried", "ends"),
    [
        ("trained", [0, 1, 2], (0, 1, "")),
        ("failed", [0, -2, -1], (-2, -1, "")),
        ("lost", [0], (None, None, "unclear")),
    ],
)
def test_a_slow_run_counts_as_its_longer_one_ends(
    longer: Ending, tried: list[int], ends: tuple[int | None, int | None, str]
):
    def ending_of(step: int) -> Ending:
        return "slow" if step == 0 else "trained" if step == -2 else "failed"

    endings, _ = run(ending_of, longer_of=lambda step: longer)
    assert sorted(endings) == sorted(tried)
    found = bracket(endings)
    assert (found.low, found.high, found.bound) == ends


def test_the_last_run_of_a_search_is_not_repeated():
    endings, why = run(lambda step: "slow", most_runs=5)
    assert (list(endings), why) == ([0, 2, 4], "the limit of runs is reached")


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
        (("", ""), "ranges over seeds: 'pre': 0.2 (0.1 to 0.4)."),
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
# Grids


ARMS = ("pre", "post")


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {}}, "search.start: is missing"),
        ({"search": {"start": 0}}, "search.start: 0 is not between 1e-09 and 1000"),
        ({"search": {"start": {"pre": 0.01}}}, "search.start: needs a rate for each of pre; post"),
        ({"search": {"start": 1, "ratio": 1}}, "search.ratio: 1 is not between 1.01 and 4"),
        ({"search": {"start": 1, "option": "seed"}}, "search.option: "),
        ({"grid": {"optimizer.learning_rate": [1]}}, "is on an axis, but a search chooses it"),
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
