"""Two stages: a comparison that stops after its first seeds if they agree.

With `first_stage: n` in its grid, a comparison runs its first n seeds and looks at its first
contrast. If all n differences lie on one side of the margin, it stops: p is then 2 * 0.5^n, the
smallest possible, which is the level of all its tests. Otherwise it runs all seeds, with tests at
the rest of ALPHA.

Whatever decides between the two looks, and however they depend on each other, a true null
hypothesis is rejected at one of them with a probability of at most ALPHA, the sum of their levels:
Bonferroni's correction, which is valid but conservative for group-sequential tests (Pocock 1977;
Wassmer and Brannath 2016). So later contrasts, tested in their order, have the same two levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpt.compare.analysis.measures import measured
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import signed_sum
from gpt.compare.analysis.statistics import ALPHA, least_p
from gpt.compare.grid import Grid


def agree(differences: Sequence[float], margin: float) -> bool:
    """Whether all differences lie on one side of the margin; one equal to it lies on neither."""
    return all(each > margin for each in differences) or all(each < margin for each in differences)


def stopped(grid: Grid, outcomes: Sequence[Outcome]) -> bool | None:
    """Whether a comparison stops after its first stage; None while that is unknown.

    Without stages it does not, nor does one that has a result of a later seed: a run that was lost
    in the first stage and repeated in the second does not reverse the decision.
    """
    if grid.first_stage is None:
        return False
    if any(o.verdict is not None and o.seed not in grid.first_seeds for o in outcomes):
        return False
    contrast = grid.contrasts[0]
    first = [o for o in outcomes if o.seed in grid.first_seeds and contrast.includes(o.cell)]
    if any(outcome.status == "missing" for outcome in first):
        return None
    found = measured(contrast, first, (), ALPHA)
    if found is None or any(outcome.verdict is None for outcome in first):
        return False
    differences = [signed_sum(values) for values in found[1].by_seed.values()]
    return len(differences) == grid.first_stage and agree(differences, contrast.margin)


def begun(grid: Grid, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of the stages that have begun; all without stages."""
    if stopped(grid, outcomes) is False:
        return [*outcomes]
    return [outcome for outcome in outcomes if outcome.seed in grid.first_seeds]


def level(first_stage: int | None, stop: bool | None) -> float:
    """The level of all tests; their intervals are at 1 minus it.

    Args:
        first_stage: number of its seeds; None without stages.
        stop: see `stopped`.
    """
    if first_stage is None:
        return ALPHA
    return least_p(first_stage) if stop else ALPHA - least_p(first_stage)
