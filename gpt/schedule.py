"""The learning rate at a step: warm-up, then body; pure functions of the step number.

Update n (counted from 1) of N, with a warm-up of w updates, is made at `learning_rate` times

    warmup(n / w)                                  while n <= w
    body(x, n / max(w, 1))                         after, with x = (n - w - 1) / (N - w)

so the first update is never at rate 0, w = 0 means the full rate at once, and x runs from 0 at the
first update after warm-up towards 1, which no update reaches: a decay to 0 wastes none either.

This module is not a torch scheduler: there is no state to save, and `rate` answers for any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gpt.config import Config, ScheduleConfig

# Height at the share x of the warm-up, 0 < x <= 1.
WARMUPS: dict[str, Callable[[float], float]] = {
    "none": lambda x: 1.0,
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
}


def constant(config: ScheduleConfig, x: float, n: float) -> float:
    """The full rate to the end."""
    return 1.0


def linear(config: ScheduleConfig, x: float, n: float) -> float:
    """A straight line from 1 to `final_ratio`."""
    return _between(1.0, config.final_ratio, x)


def cosine(config: ScheduleConfig, x: float, n: float) -> float:
    """Half a cosine from 1 to `final_ratio` (Loshchilov and Hutter 2017, without restarts)."""
    return _between(1.0, config.final_ratio, 0.5 * (1 - math.cos(math.pi * x)))


def inverse_sqrt(config: ScheduleConfig, x: float, n: float) -> float:
    """1 / sqrt(n), n in warm-up lengths (Vaswani et al. 2017).

    With linear warm-up and learning_rate = lambda (d w)^-0.5 the whole schedule is their
    lambda d^-0.5 min(n^-0.5, n w^-1.5), n in updates. Without warm-up it is 1 / sqrt(updates).
    """
    return 1.0 / math.sqrt(n)


def wsd(config: ScheduleConfig, x: float, n: float) -> float:
    """Warm-up, stable, decay: 1, then a line to `final_ratio` over the last `decay_fraction`.

    Also called the trapezoid (Zhai et al. 2022; Hu et al. 2024).
    """
    start = 1.0 - config.decay_fraction
    return _between(1.0, config.final_ratio, max(0.0, (x - start) / config.decay_fraction))


# Height at the share x of the updates after the warm-up, and n updates in units of its length.
BODIES: dict[str, Callable[[ScheduleConfig, float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (1 ... `steps`) as a share of the full rate."""
    assert 1 <= step <= steps, f"update {step} of {steps}"
    warm = 0 if config.warmup == "none" else config.warmup_steps
    if step <= warm:
        return WARMUPS[config.warmup](step / warm)
    return BODIES[config.body](config, (step - warm - 1) / (steps - warm), step / max(warm, 1))


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def rate_change(before: Config, now: Config, step: int) -> str | None:
    """How another length changes the learning rate of a run after `step` updates, in words.

    Returns:
        None if it does not, as with a constant body.
    """
    if step == 0 or math.isclose(
        rate(before.schedule, step, before.training.steps),
        rate(now.schedule, step, now.training.steps),
        rel_tol=1e-6,
    ):
        return None
    full = now.optimizer.learning_rate
    last = full * rate(before.schedule, step, before.training.steps)
    following = full * rate(now.schedule, step + 1, now.training.steps)
    return (
        f"the {now.schedule.body} schedule now spans {now.training.steps} steps: the learning rate "
        f"was {last:.2e} at step {step} and is {following:.2e} at step {step + 1}"
    )
