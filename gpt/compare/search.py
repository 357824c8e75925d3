"""A search for the highest trainable learning rate of one arm, with one seed, in one setting.

Its rates are on a lattice (`gpt.compare.grid.Search`) and named by their step on it. A search
gallops by two steps, upwards after a run that trained and downwards after one that failed, until it
has seen both; bisects until the highest rate that trained and the lowest that failed are neighbors;
and then tries the rate above those two. A run that trains there is counted, but does not move the
threshold.

A run that may be merely slow has not learned enough either, but perhaps because its rate is too
low. So it is repeated with LONGER times as many updates, and the end of the repetition counts; one
that is slow even then sends the search upwards. Every decision is a pure function of the runs so
far, so that a search can be replayed from their results alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

GALLOP = 2  # steps
LONGER = 3  # times as many updates, when a slow run is repeated

Ending = Literal["trained", "slow", "failed", "lost"]  # lost: without a result
Bound = Literal["", "above", "below", "unclear"]


@dataclass(frozen=True)
class Bracket:
    """Where the highest trainable rate is, as far as the runs of a search show.

    Attributes:
        low: the highest step under `high` whose run trained or was slow; None if there is none.
        high: the lowest step whose run failed; None if there is none.
        bound: "below" if there is a `high`, and no run below it trained; "unclear" if no run failed
            or trained; "above" if there is no `high`; and "" if the threshold is between the two,
            or would be if failures rose steadily with the rate.
        monotone: whether the run at the step above `high` did not train; None: it has no result.
    """

    low: int | None
    high: int | None
    bound: Bound
    monotone: bool | None


def bracket(endings: Mapping[int, Ending]) -> Bracket:
    """The bracket that runs give, by their steps."""
    failed = [step for step, ending in endings.items() if ending == "failed"]
    high = min(failed, default=None)
    below = {s: e for s, e in endings.items() if e != "failed" and (high is None or s < high)}
    learning = [step for step, ending in below.items() if ending != "lost"]
    low = max(learning, default=None)
    bound: Bound = ""
    if "trained" not in below.values():
        bound = "unclear" if high is None else "below"
    elif high is None:
        bound = "above"
    above = "lost" if high is None else endings.get(high + 1, "lost")
    return Bracket(low, high, bound, None if above == "lost" else above != "trained")


class Next(NamedTuple):
    """What a search does next, and why.

    Attributes:
        step: to try; None if the search has ended.
        longer: whether it runs LONGER times as many updates as other runs.
    """

    step: int | None
    why: str
    longer: bool = False


def next_step(endings: Mapping[int, Ending], left: int, last: int, *, longer: bool = False) -> Next:
    """What a search does after its runs so far.

    Args:
        endings: of the runs, by their steps; at least one.
        left: how many more runs it may have.
        last: the step of the last run.
        longer: whether that was a longer one.
    """
    found = bracket(endings)
    low, high = found.low, found.high
    if "lost" in endings.values():
        return Next(None, "a run has no result")
    if endings[last] == "slow" and not longer and left > 0:
        return Next(last, "slow: the same rate with more updates", longer=True)
    closed = low is not None and high is not None and high - low == 1
    if closed and found.monotone is not None:
        return Next(None, "the rates next to the threshold and the one above them are known")
    if left <= 0:
        return Next(None, "the limit of runs is reached")
    if high is None:
        assert low is not None
        return Next(low + GALLOP, "no rate failed: gallop upwards")
    if low is None:
        return Next(high - GALLOP, "no rate trained: gallop downwards")
    if not closed:
        return Next((low + high) // 2, "bisect")
    return Next(high + 1, "check that the rate above fails too")
