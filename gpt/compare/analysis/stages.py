"""Two stages: a comparison that stops after its first seeds if they agree.

With `first_stage: n` in its grid, a comparison runs its first n seeds and looks at its first
contrast. If that is answered at the level 2 * 0.5^n, it stops, and this is the level of all its
tests. A paired test reaches that level only if all n differences lie on one side of the margin.
Otherwise it runs all seeds, with tests at the rest of ALPHA.

Whatever decides between the two looks, and however they depend on each other, a true null
hypothesis is rejected at one of them with a probability of at most ALPHA, the sum of their levels:
Bonferroni's correction, which is valid but conservative for group-sequential tests (Pocock 1977;
Wassmer and Brannath 2016). So later contrasts, tested in their order, have the same two levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpt.compare.analysis.contrasts import contrast_result
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import Decision, Unmeasured
from gpt.compare.analysis.statistics import ALPHA, least_p
from gpt.compare.grid import Grid


def decide(grid: Grid, outcomes: Sequence[Outcome]) -> Decision:
    """Whether a comparison with stages stops after the first.

    Once a later seed has a result, it does not: a run that was lost in the first stage and repeated
    in the second does not reverse the decision.
    """
    assert grid.first_stage is not None
    later = any(o.verdict is not None and o.seed not in grid.first_seeds for o in outcomes)
    contrast = grid.contrasts[0]
    first = [o for o in outcomes if o.seed in grid.first_seeds and contrast.includes(o.cell)]
    if any(outcome.status == "missing" for outcome in first):
        return "the second has results" if later else "undecided"
    if any(outcome.verdict is None for outcome in first):
        return "a run was lost"
    result = contrast_result(contrast, first, (), least_p(grid.first_stage))
    if isinstance(result, Unmeasured) or result.answer == "open":
        return "open"
    return "the second has results" if later else "answered"


def begun(grid: Grid, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of the stages that have begun; all without stages."""
    if grid.first_stage is None or decide(grid, outcomes) not in ("undecided", "answered"):
        return [*outcomes]
    return [outcome for outcome in outcomes if outcome.seed in grid.first_seeds]


def level(first_stage: int | None, decision: Decision | None) -> float:
    """The level of all tests; their intervals are at 1 minus it.

    Args:
        first_stage: number of its seeds; None without stages.
        decision: see `decide`.
    """
    if first_stage is None:
        return ALPHA
    return least_p(first_stage) if decision == "answered" else ALPHA - least_p(first_stage)
