"""The learning rate schedule: warm-up, then body, as pure functions of the step number.

Update n (counted from 1) of N, with a warm-up of w updates, has the learning rate
`optimizer.learning_rate` times

    warmup(n / w)                                  if n <= w
    body(x, n / max(w, 1))                         otherwise, with x = (n - w - 1) / (N - w)

Every update has a positive learning rate: the first one has warmup(1 / w), not warmup(0), and x
runs from 0 at the first update after the warm-up towards 1 without reaching it. Without warm-up
(w = 0) the first update has the full learning rate.

These are not torch's schedulers: there is no state to save, and any step can be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gpt.config import ScheduleConfig

# The multiplier, given the fraction x of the warm-up, 0 < x <= 1.
WARMUPS: dict[str, Callable[[float], float]] = {
    "none": lambda x: 1.0,  # only its name is used
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
}


def constant(config: ScheduleConfig, x: float, n: float) -> float:
    """The full learning rate to the end."""
    return 1.0


def linear(config: ScheduleConfig, x: float, n: float) -> float:
    """A straight line from 1 to `final_ratio`."""
    return _interpolate(1.0, config.final_ratio, x)


def cosine(config: ScheduleConfig, x: float, n: float) -> float:
    """Half a cosine from 1 to `final_ratio` (Loshchilov and Hutter 2017, without restarts)."""
    return _interpolate(1.0, config.final_ratio, 0.5 * (1 - math.cos(math.pi * x)))


def inverse_sqrt(config: ScheduleConfig, x: float, n: float) -> float:
    """1 / sqrt(n), where n counts updates in units of the warm-up (Vaswani et al. 2017).

    With linear warm-up and learning_rate = lambda (d w)^-0.5 the whole schedule is their
    lambda d^-0.5 min(n^-0.5, n w^-1.5), n in updates. Without warm-up it is 1 / sqrt(updates).
    """
    return 1.0 / math.sqrt(n)


def wsd(config: ScheduleConfig, x: float, n: float) -> float:
    """Warm-up, stable, decay: 1, then a line to `final_ratio` over the last `decay_fraction`.

    Also called the trapezoid (Zhai et al. 2022; Hu et al. 2024).
    """
    start = 1.0 - config.decay_fraction
    return _interpolate(1.0, config.final_ratio, max(0.0, (x - start) / config.decay_fraction))


# The multiplier, given the fraction x of the updates after the warm-up, 0 <= x < 1, and the number
# n of updates from the start, in warm-up lengths.
BODIES: dict[str, Callable[[ScheduleConfig, float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def lr_multiplier(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the full learning rate at update `step` (1 ... `steps`), in (0, `config.scale`]."""
    assert 1 <= step <= steps, f"update {step} of {steps}"
    warmup_steps = config.effective_warmup_steps
    if step <= warmup_steps:
        return config.scale * WARMUPS[config.warmup](step / warmup_steps)
    x = (step - warmup_steps - 1) / (steps - warmup_steps)
    return config.scale * BODIES[config.body](config, x, step / max(warmup_steps, 1))


def _interpolate(start: float, end: float, x: float) -> float:
    return start + (end - start) * x
