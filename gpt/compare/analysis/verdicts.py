"""How a run ended, from its records: trained, spiked, regressed, plateaued or diverged.

The final loss alone does not distinguish a run that learned only token frequencies from one that
learned and fell back, nor a smooth run from one that a spike nearly ended. So a run gets a status,
the step where it was detected, two spike scores, the early rise of its loss, and whether its loss
was still falling. They come from metrics.jsonl and from one number of the data, the unigram entropy
H1: the cross-entropy of the evaluated tokens under the training text's unigram distribution, which
is the loss of guessing by token frequency.

A verdict is about one run. Whether arms differ takes many runs, and statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import stats

from gpt.metrics import EPS_ALARM, LEARNED_MARGIN, Record

Status = Literal["trained", "spiked", "regressed", "plateaued", "diverged"]  # the worst last
FAILED: frozenset[Status] = frozenset({"regressed", "plateaued", "diverged"})

# Nats by which a run's loss may end above its minimum: smaller rises are ordinary fluctuation.
REGRESSION = 0.2
# With small batches, noise alone can exceed that. Five standard errors rather than two: the lowest
# of hundreds of windows is low by chance, by about three standard errors even if nothing changes.
STANDARD_ERRORS = 5
# A spike is this many standard deviations above the mean of this many values (OLMo 2, OLMo-core).
SIGMAS = 6
WINDOW = 128
# Smallest sigma, as a fraction of the mean. After a constant window, whose sigma is 0, float32's
# rounding error, 1e-7 of a number, would otherwise be a spike.
SIGMA_FLOOR = 1e-6
# The trend of the last quarter of the losses is that of the means of this many parts, tested at
# TREND_LEVEL. With fewer parts they are longer, and so less correlated with each other.
TREND_PARTS = 5
TREND_LEVEL = 0.01
# Nats below H1 at which failures are also counted, to show whether LEARNED_MARGIN matters.
MARGINS = (0.02, LEARNED_MARGIN, 0.1, 0.2)
SMOOTHING = 10  # updates whose mean loss is compared in `early_rise`


@dataclass(frozen=True)
class Verdict:
    """How a run ended. Losses in nats per token.

    Attributes:
        step: diverged: the failing step; plateaued: the step from which on the mean training loss
            of the last K updates was never clearly under H1 - LEARNED_MARGIN (the first step: it
            never was; the last: only the validation loss shows it); regressed: the last update of
            the lowest window; spiked: the first spike; trained: None.
        layer: diverged: where, if the caller knows; plateaued: the lowest block whose gradients
            were under EPS_ALARM * eps at the first snapshot that shows one, None without such a
            snapshot; otherwise None.
        reason: the finding in words; of a plateau whether it is stuck, or slow and still falling.
        still_falling: whether the training loss was; see `still_falling`. A plateau whose loss was
            still falling may be too slow for its number of updates rather than stuck.
        fell_back: whether the training loss ended above its minimum, as in `verdict`'s rule 3. That
            and the final loss tell whether it would have failed by another margin than
            LEARNED_MARGIN.
        initial_loss: validation loss before the first update; None if it is unknown or not finite.
        final_val_loss: of the last evaluation; None for a diverged run.
        best_val_loss: the lowest finite one; None if there is none.
        final_train_loss: mean of the last K updates; None for a diverged run.
        loss_spikes, grad_spikes: numbers of spikes in the training loss and in the gradient norm.
        loss_spike_score, grad_spike_score: fraction of the scored steps that are spikes.
        early_rise: of the training loss in the first quarter of the planned updates, nats; None if
            there are too few of them.
        max_grad_norm: the largest finite one, before clipping; None if there is none.
        clipped: fraction of the finite gradient norms above the clip; None without clipping.
        steps: number of updates that were not skipped.
    """

    status: Status
    step: int | None
    layer: int | None
    reason: str
    still_falling: bool
    fell_back: bool
    initial_loss: float | None
    final_val_loss: float | None
    best_val_loss: float | None
    final_train_loss: float | None
    loss_spikes: int
    grad_spikes: int
    loss_spike_score: float
    grad_spike_score: float
    early_rise: float | None
    max_grad_norm: float | None
    clipped: float | None
    steps: int

    @property
    def failed(self) -> bool:
        """Whether the status is one of FAILED."""
        return self.status in FAILED

    @property
    def slow(self) -> bool:
        """Whether it is a plateau that was still falling; any other plateau is stuck."""
        return self.status == "plateaued" and self.still_falling


def spikes(values: Sequence[float | None]) -> list[int]:
    """Indices of the spikes in a series.

    A spike is a value more than SIGMAS population standard deviations above the mean of the last W
    finite values before it, where W = min(WINDOW, max(50, a tenth of the series)). Nothing is
    scored before W finite values. None, nan and inf are never spikes and in no window: they mean
    divergence.

    A spike stays in the windows that follow it, as in OLMo-core's StabilityMonitorCallback. So it
    hides smaller spikes for W values, and a burst counts as few; in return, a lasting rise counts
    as one spike or a few, rather than as a spike at every later step.
    """
    scored, is_spike = _scored(values)
    return [int(index) for index in scored[is_spike]]


def spike_score(values: Sequence[float | None]) -> float:
    """Fraction of the scored values that are `spikes`; 0 if none could be scored."""
    _, is_spike = _scored(values)
    return float(is_spike.mean()) if len(is_spike) else 0.0


def early_rise(losses: Sequence[float | None]) -> float | None:
    """The largest rise of the smoothed losses above their lowest value before, in nats.

    `spikes` scores nothing before a full window of losses, which is where warm-up acts, and hardly
    finds any spike in a falling loss, whose windows have a large sigma. This measure is defined
    from the first update on, and is 0 for a loss that only falls. Noise alone rises too, which the
    mean of SMOOTHING updates reduces; arms with the same batches share most of it.

    Args:
        losses: from the first update on. Values that are not finite are left out.

    Returns:
        None if there are fewer than SMOOTHING finite losses.
    """
    finite = [loss for loss in losses if _is_finite(loss)]
    if len(finite) < SMOOTHING:
        return None
    smooth = sliding_window_view(np.array(finite), SMOOTHING).mean(axis=1)
    return float((smooth - np.minimum.accumulate(smooth)).max())


def still_falling(losses: Sequence[float | None]) -> bool:
    """Whether the last quarter of the losses falls by more than its noise explains.

    It is cut into TREND_PARTS parts of equal length, give or take one. The line fitted to their
    means by least squares must fall by a one-sided t test at TREND_LEVEL. Losses near each other
    may be correlated; the means of parts hardly are (Schmeiser 1982, on batch means).
    benchmarks/intervals.py shows how often a loss without a trend seems to fall, and how often one
    with a trend does: with small batches, most of whose noise is that of their text, only a fall of
    several standard deviations is certain to be seen. Runs with the same batches share that noise.

    Returns:
        False if the quarter has fewer than TREND_PARTS losses.
    """
    quarter = losses[len(losses) - len(losses) // 4 :]
    if len(quarter) < TREND_PARTS:
        return False
    means = [part.mean() for part in np.array_split(np.array(quarter, np.float64), TREND_PARTS)]
    fit = stats.linregress(range(TREND_PARTS), means, alternative="less")
    return bool(fit.pvalue < TREND_LEVEL)


def verdict(
    records: Sequence[Record],
    *,
    unigram_entropy: float,
    planned: int | None = None,
    diverged_at: int | None = None,
    diverged_layer: int | None = None,
    reason: str = "",
    clip: float | None = None,
) -> Verdict:
    """The verdict on the run that wrote `records`. The first rule that applies decides.

    1. diverged: `diverged_at` is given, or a training or validation loss is not finite. A
       non-finite gradient norm alone is not a divergence, because fp16 skips such updates; nor is
       the loss of an update that training.nonfinite skipped, unless all updates were skipped. The
       other rules ignore skipped updates.
    2. plateaued: the final validation loss is not more than LEARNED_MARGIN under
       `unigram_entropy`. A model that only counts tokens ends within a few hundredths of H1, on
       either side; one that uses a single preceding token gains several tenths. It is slow if its
       training loss was `still_falling`, and stuck otherwise.
    3. regressed: the mean training loss of the last K updates is above the lowest such mean of K
       updates before them by more than max(REGRESSION, STANDARD_ERRORS * e), where
       e = sqrt(s1^2 + s2^2) / sqrt(K), s1 and s2 the standard deviations of the two windows. That
       is Welch's standard error, with batches as independent draws. A trend within a window makes
       it larger, and the rule more lenient.
    4. spiked: there is a spike in the training loss.
    5. trained.

    K = max(10, 5% of the updates), but at most half of the updates, so that there are two windows.

    Args:
        records: of a run that has ended: a run that did not diverge was evaluated after its last
            update.
        unigram_entropy: H1, nats per token.
        planned: updates of the whole run; None: as many as were made.
        diverged_at: the step at which the run ended with a non-finite value.
        diverged_layer: where that was: 0 the embeddings, 1 ... L the blocks, L + 1 the head.
        reason: of the divergence, in words.
        clip: the gradient norm above which gradients were clipped; None: no clipping.
    """
    made = [record for record in records if "loss" in record]
    updates = [record for record in made if not record.get("skipped")]
    steps = [int(record["step"]) for record in updates]
    losses: list[float | None] = [record["loss"] for record in updates]
    norms: list[float | None] = [record["grad_norm"] for record in updates]
    val_losses = {r["step"]: r["val_loss"] for r in records if _is_finite(r.get("val_loss"))}
    finite_norms = [norm for norm in norms if _is_finite(norm)]
    loss_spikes = spikes(losses)

    final_val_loss = final_train_loss = regression = None
    falling = False
    finding = _divergence(records, diverged_at, diverged_layer, reason)
    if finding is None and made and not updates:
        finding = _Finding("diverged", made[0]["step"], None, "all updates were skipped")
    if finding is None:
        assert made, "a finished run has updates"
        assert made[-1]["step"] in val_losses, "it is evaluated after the last"
        final_val_loss = val_losses[made[-1]["step"]]
        windows = _windows(losses)
        final_train_loss = float(windows[-1].mean())
        falling = still_falling(losses)
        regression = _regression(windows, steps)
        below = f"{unigram_entropy - final_val_loss:.3f} below H1 = {unigram_entropy:.3f}"
        finding = (
            _plateau(final_val_loss, unigram_entropy, windows, steps, records, falling=falling)
            or regression
            or _spike(loss_spikes, steps)
            or _Finding("trained", None, None, f"final loss {final_val_loss:.3f} is {below}")
        )
    clipped = None
    if clip is not None and finite_norms:
        clipped = sum(norm > clip for norm in finite_norms) / len(finite_norms)
    return Verdict(
        **finding._asdict(),
        still_falling=falling,
        fell_back=regression is not None,
        initial_loss=val_losses.get(0),
        final_val_loss=final_val_loss,
        best_val_loss=min(val_losses.values(), default=None),
        final_train_loss=final_train_loss,
        loss_spikes=len(loss_spikes),
        grad_spikes=len(spikes(norms)),
        loss_spike_score=spike_score(losses),
        grad_spike_score=spike_score(norms),
        early_rise=early_rise(
            [r["loss"] for r in updates if r["step"] <= (planned or len(made)) // 4]
        ),
        max_grad_norm=max(finite_norms, default=None),
        clipped=clipped,
        steps=len(updates),
    )


class _Finding(NamedTuple):
    status: Status
    step: int | None
    layer: int | None
    reason: str


def _divergence(
    records: Sequence[Record], step: int | None, layer: int | None, reason: str
) -> _Finding | None:
    if step is not None:
        return _Finding("diverged", step, layer, reason or f"not finite at step {step}")
    for record in records:
        for key, quantity in (("loss", "training loss"), ("val_loss", "validation loss")):
            if key in record and not record.get("skipped") and not _is_finite(record[key]):
                words = reason or f"{quantity} not finite at step {record['step']}"
                return _Finding("diverged", record["step"], layer, words)
    return None


def _plateau(
    final_val_loss: float,
    unigram_entropy: float,
    windows: NDArray[np.float64],
    steps: list[int],
    records: Sequence[Record],
    *,
    falling: bool,
) -> _Finding | None:
    bar = unigram_entropy - LEARNED_MARGIN
    if final_val_loss < bar:
        return None
    # Clearly under: a run that never learned fluctuates around the threshold, and noise takes it
    # below, especially since H1 is of the validation text and the training text may be easier.
    onset = steps[0]
    for index in reversed(range(len(windows))):
        window = windows[index]
        mean = window.mean()
        if mean < bar and mean + STANDARD_ERRORS * _standard_error(window) < bar:
            onset = steps[min(index + windows.shape[1], len(steps) - 1)]
            break
    trend = "slow: the loss was still falling" if falling else "stuck: no clear fall of the loss"
    words = (
        f"final loss {final_val_loss:.3f} is not more than {LEARNED_MARGIN} below "
        f"H1 = {unigram_entropy:.3f}; {trend}"
    )
    return _Finding("plateaued", onset, _starved_block(records), words)


def _starved_block(records: Sequence[Record]) -> int | None:
    """The lowest block at the first snapshot with a block's gradients under EPS_ALARM * eps.

    The embeddings (layer 0) and the head (the last) are not blocks: see gpt.diagnostics.layers.
    """
    layers = [record for record in records if "layer" in record]
    head = max((record["layer"] for record in layers), default=0)
    starved = [
        (record["step"], record["layer"])
        for record in layers
        if 0 < record["layer"] < head
        and _is_finite(record.get("grad_over_eps"))
        and record["grad_over_eps"] < EPS_ALARM
    ]
    return min(starved)[1] if starved else None


def _regression(windows: NDArray[np.float64], steps: list[int]) -> _Finding | None:
    count, length = windows.shape
    if count <= length:  # a single update with nothing before it
        return None
    means = windows.mean(axis=1)
    lowest = int(means[: count - length].argmin())  # of those that share no update with the last
    rise = means[-1] - means[lowest]
    error = math.hypot(_standard_error(windows[lowest]), _standard_error(windows[-1]))
    allowed = max(REGRESSION, STANDARD_ERRORS * error)
    if rise <= allowed:
        return None
    words = (
        f"training loss {means[-1]:.3f} is {rise:.3f} above its minimum of {means[lowest]:.3f}; "
        f"at most {allowed:.3f} is allowed"
    )
    return _Finding("regressed", steps[lowest + length - 1], None, words)


def _spike(loss_spikes: list[int], steps: list[int]) -> _Finding | None:
    if not loss_spikes:
        return None
    first = steps[loss_spikes[0]]
    return _Finding("spiked", first, None, f"{len(loss_spikes)} in the loss, first at step {first}")


def _windows(losses: Sequence[float | None]) -> NDArray[np.float64]:
    """Every window of K consecutive losses, (updates - K + 1, K)."""
    length = min(max(10, len(losses) // 20), len(losses) // 2)
    return sliding_window_view(np.array(losses, dtype=np.float64), max(1, length))


def _standard_error(window: NDArray[np.float64]) -> float:
    """Standard error of the window's mean; infinite for a single value."""
    length = len(window)
    return float(window.std(ddof=1)) / math.sqrt(length) if length > 1 else math.inf


def _scored(values: Sequence[float | None]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Indices of the values that can be scored, and which of them are spikes."""
    series = np.array(values, dtype=np.float64)  # None becomes nan
    indices = np.flatnonzero(np.isfinite(series))
    finite = series[indices]
    length = min(WINDOW, max(50, len(series) // 10))
    if len(finite) <= length:
        return indices[:0], np.zeros(0, dtype=np.bool_)
    # Not by cumulative sums: one huge value would ruin the precision of all that follow.
    past = sliding_window_view(finite, length)[:-1]
    mean = past.mean(axis=1)
    sigma = np.maximum(past.std(axis=1), SIGMA_FLOOR * np.abs(mean))
    return indices[length:], finite[length:] > mean + SIGMAS * sigma


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
