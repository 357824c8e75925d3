"""The results of a comparison as data: what summary.json holds.

summary.py computes them, wording.py puts them into words, and the figures and the report show them.
Losses are in nats per token, and at most ln V, that of a uniform guess. Cells without a result are
left out of all numbers except the count of lost cells, and contrasts of losses and failures, in
which lost cells count at their best and at their worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpt.compare.analysis.matching import Match
from gpt.compare.analysis.statistics import Interval, McNemar, PairedDifference, Threshold
from gpt.compare.search import Bound

VERSION = 6  # of summary.json; raised when its keys change

SIGNS = (1, -1, -1, 1)  # of the arms in (a - b) - (c - d)

Answer = Literal["supported", "contradicted", "open"]

# Whether a comparison stops after its first stage ("answered"), or why it runs the second.
Decision = Literal["undecided", "answered", "open", "a run was lost", "the second has results"]


def signed_sum(values: Sequence[float]) -> float:
    """(a - b) - (c - d), or a - b, of the values of a contrast's arms."""
    return sum(sign * value for sign, value in zip(SIGNS, values, strict=False))


@dataclass(frozen=True)
class AtRate:
    """One arm at one learning rate, over seeds.

    Attributes:
        stuck, slow: the failures that are plateaus; a slow one's loss was still falling.
        interval: of the failure rate.
        loss_interval: of the mean loss.
    """

    rate: float
    n: int
    failures: int
    stuck: int
    slow: int
    interval: Interval
    losses: tuple[float, ...]
    mean_loss: float
    median_loss: float
    loss_interval: Interval | None
    statuses: tuple[str, ...]


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one setting, over learning rates and seeds.

    Attributes:
        setting: values on the axes other than the learning rate, as text; empty if there are none.
        runs, failures: cells with a result, and those of them that failed.
        stuck, slow: as in `AtRate`.
        failures_at: how many would have failed by another margin below H₁, in nats.
        lost: cells without a result.
        lr50, lr50_interval: the rate at which half of the runs fail, and its interval over seeds.
        highest_stable_rate: the largest rate up to which no seed failed; None if the lowest failed.
        lr_sensitivity, lr_sensitivity_interval: mean over seeds.
        regret, regret_interval: mean over seeds; against the best of all arms in the setting.
        best_at_edge: seeds whose best rate is the lowest or highest rate tried.
        best_rate, best_loss: where the median loss is lowest, chosen on these same seeds.
        initial_loss: mean validation loss before the first update.
        summed_rate: sum over all updates of the schedule's multiplier of the learning rate.
        spiked: runs with a spike in the loss.
        early_rise: mean of the runs' early rises of the loss; None if no run has one.
        clipped: mean fraction of updates whose gradients were clipped; None without clipping.
    """

    arm: str
    setting: str
    runs: int
    failures: int
    stuck: int
    slow: int
    failures_at: dict[float, int]
    lost: int
    seeds: int
    by_rate: tuple[AtRate, ...]
    lr50: Threshold
    lr50_interval: Interval | None
    highest_stable_rate: float | None
    median_loss: float
    lr_sensitivity: float
    lr_sensitivity_interval: Interval | None
    regret: float
    regret_interval: Interval | None
    best_at_edge: int
    best_rate: float
    best_loss: float
    initial_loss: float
    summed_rate: float
    spiked: int
    early_rise: float | None
    clipped: float | None

    @property
    def label(self) -> str:
        """`post (layers 12)`, or the arm alone where there is one setting."""
        return f"{self.arm} ({self.setting})" if self.setting else self.arm


@dataclass(frozen=True)
class SearchResult:
    """The highest trainable learning rate of one arm, with one seed, in one setting.

    Attributes:
        setting: as in `ArmSummary`.
        rate: the geometric mean of `low` and `high`, or the one that is known; None if neither.
        low: the highest rate tried under `high` whose run trained, or would in more steps.
        high: the lowest rate tried whose run failed.
        bound, monotone: as in `gpt.compare.search.Bracket`.
        runs: how many have ended.
        ended: why it has ended; empty if it has not.
    """

    arm: str
    setting: str
    seed: int
    rate: float | None
    low: float | None
    high: float | None
    bound: Bound
    monotone: bool | None
    runs: int
    ended: str

    @property
    def is_clear(self) -> bool:
        """Whether it found a threshold or a bound."""
        return self.rate is not None and self.bound != "unclear"

    @property
    def is_lost(self) -> bool:
        """Whether its first run was tried and has no result."""
        return self.rate is None and self.runs > 0

    @property
    def label(self) -> str:
        """As `ArmSummary.label`."""
        return f"{self.arm} ({self.setting})" if self.setting else self.arm


@dataclass(frozen=True)
class ContrastResult:
    """A registered contrast: (a - b) - (c - d), or a - b.

    Attributes:
        parts: a - b, and c - d.
        bounds: which thresholds and lost runs are only bounded or in doubt, in words. With lost
            runs, `parts`, `value` and `by_seed` are halfway between their lowest and highest
            possible values, `interval` covers all possible intervals, and `p` is the largest.
        reach: for each part, "at least", "at most" or "unknown" if only bounds are known; else "".
        value, interval: in the unit of `Contrast.margin`. The interval is at 1 - alpha.
        alpha: the level of the test, 0.05 unless the comparison has two stages.
        p: of a paired test that the value equals the margin; None for log_lr50, which has none.
        least_p: the smallest p that this many seeds can give.
        answer, why: whether the runs support the claim, and the reason in words.
        confirmatory: whether it was registered before any result, and all contrasts before it are
            confirmatory and supported; otherwise it is exploratory.
        learned: whether any of its runs is not plateaued; if all are, the answer is open.
        late: what was not registered before any result, in words; empty if everything was.
        dropped: combinations of setting and rate left out because an arm or a seed has no run.
        dropped_seeds: seeds left out because they lack a run.
        by_seed: seed -> the measure of each of its arms; empty for log_lr50.
        outlook: if the answer is open, how many seeds would settle it, in words; else empty.
    """

    question: str
    measure: str
    parts: tuple[float, ...]
    bounds: tuple[str, ...]
    reach: tuple[str, ...]
    value: float
    interval: Interval | None
    alpha: float
    p: float | None
    least_p: float
    answer: Answer
    why: str
    confirmatory: bool
    late: str
    learned: bool
    seeds: int
    dropped: int
    dropped_seeds: int
    by_seed: dict[int, tuple[float, ...]]
    outlook: str

    @property
    def differences(self) -> dict[int, float]:
        """Seed -> its value of the contrast."""
        return {seed: signed_sum(values) for seed, values in self.by_seed.items()}


@dataclass(frozen=True)
class Unmeasured:
    """A contrast that cannot be computed.

    Attributes:
        why: a clause.
    """

    why: str


@dataclass(frozen=True)
class PairAtRate:
    """Paired failures of two arms at one learning rate; a description, not a corrected test."""

    rate: float
    setting: str
    failures: McNemar


@dataclass(frozen=True)
class PairResult:
    """Two arms, paired by seed: mean loss over their common rates, and failures at each.

    Attributes:
        holm_p: the loss's p, corrected for the number of pairs.
        dropped, dropped_seeds: as in `ContrastResult`.
    """

    a: str
    b: str
    loss: PairedDifference
    holm_p: float
    dropped: int
    dropped_seeds: int
    by_rate: tuple[PairAtRate, ...]


@dataclass(frozen=True)
class Summary:
    """All results of a comparison.

    Attributes:
        lost: the status of each cell without a result, by its id.
        unigram_entropy: H₁, the loss of guessing by token frequency.
        searches: what each search found; empty without searches.
        contrasts: in the grid's order; None where a contrast cannot be computed.
        registered: when the contrasts were registered, and what was added later, in words.
        stages: whether it stopped after its first stage, in words; empty without stages.
        conclusions: a sentence for each contrast, and one about failures or searches; "verdict" in
            the file.
    """

    title: str
    planned: int
    with_result: int
    lost: dict[str, str]
    unigram_entropy: float
    arms: tuple[ArmSummary, ...]
    searches: tuple[SearchResult, ...]
    contrasts: tuple[ContrastResult | None, ...]
    pairs: tuple[PairResult, ...]
    match: Match
    registered: str
    stages: str
    conclusions: tuple[str, ...]
