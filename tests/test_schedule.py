"""Learning rate schedules against tables computed by hand."""

from __future__ import annotations

import math

import pytest

from gpt.config import ScheduleConfig
from gpt.schedule import BODIES, WARMUPS, lr_multiplier


def multipliers(steps: int, **options: object) -> list[float]:
    config = ScheduleConfig.model_validate(options)
    return [lr_multiplier(config, step, steps) for step in range(1, steps + 1)]


BY_HAND: list[tuple[dict[str, object], list[float]]] = [
    ({"warmup": "none", "body": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
    (
        {"warmup": "linear", "warmup_steps": 4, "body": "constant"},
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    ),
    (
        {"warmup": "cosine", "warmup_steps": 4, "body": "constant"},
        [0.1464466, 0.5, 0.8535534, 1, 1, 1, 1, 1],
    ),
    (
        {"warmup": "linear", "warmup_steps": 4, "body": "linear", "final_ratio": 0},
        [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25],
    ),
    (
        {"warmup": "none", "body": "linear", "final_ratio": 0.2},
        [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    ),
    (
        {"warmup": "linear", "warmup_steps": 4, "body": "cosine", "final_ratio": 0.1},
        [0.25, 0.5, 0.75, 1, 1, 0.8681981, 0.55, 0.2318019],
    ),
    (
        {"warmup": "linear", "warmup_steps": 4, "body": "inverse_sqrt"},
        [0.25, 0.5, 0.75, 1, 0.8944272, 0.8164966, 0.7559289, 0.7071068],
    ),
    (
        {"warmup": "none", "body": "inverse_sqrt"},
        [1, 0.7071068, 0.5773503, 0.5, 0.4472136, 0.4082483, 0.3779645, 0.3535534],
    ),
    (
        {"warmup": "none", "body": "wsd", "decay_fraction": 0.5, "final_ratio": 0},
        [1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ),
    (
        {
            "warmup": "linear",
            "warmup_steps": 4,
            "body": "wsd",
            "decay_fraction": 0.5,
            "final_ratio": 0.5,
        },
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75],
    ),
]


@pytest.mark.parametrize(("options", "expected"), BY_HAND)
def test_multipliers_are_those_of_a_table(options: dict[str, object], expected: list[float]):
    assert multipliers(8, **options) == pytest.approx(expected, abs=1e-6)


def test_every_schedule_has_a_table():
    for option, names in (("warmup", WARMUPS), ("body", BODIES)):
        assert {options[option] for options, _ in BY_HAND} == set(names), "add it to BY_HAND"


def test_inverse_sqrt_is_noams_formula():
    width, warm, factor = 512, 40, 2.0
    peak = factor / math.sqrt(width * warm)
    ours = [
        peak * r for r in multipliers(200, warmup="linear", warmup_steps=warm, body="inverse_sqrt")
    ]
    noam = [factor * width**-0.5 * min(n**-0.5, n * warm**-1.5) for n in range(1, 201)]
    assert ours == pytest.approx(noam)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (1, 5), (7, 7), (10, 3), (10, 0)])
def test_no_learning_rate_is_zero_or_above_the_full_one(
    warmup: str, body: str, steps: int, warm: int
):
    found = multipliers(steps, warmup=warmup, warmup_steps=warm, body=body, final_ratio=0)
    assert all(0 < r <= 1 for r in found)


def test_warmup_none_ignores_its_length():
    assert multipliers(9, warmup="none", warmup_steps=5) == multipliers(
        9, warmup="linear", warmup_steps=0
    )


def test_a_warmup_none_has_no_steps():
    assert ScheduleConfig(warmup="none", warmup_steps=100).effective_warmup_steps == 0
    assert ScheduleConfig(warmup="cosine", warmup_steps=100).effective_warmup_steps == 100


def test_the_scale_multiplies_every_rate():
    options = {"warmup": "linear", "warmup_steps": 4, "body": "cosine"}
    plain = multipliers(9, **options)
    assert multipliers(9, **options, scale=1.5) == [1.5 * each for each in plain]
