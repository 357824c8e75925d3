from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import records

from gpt import metrics
from gpt.config import Config
from gpt.ensemble import shape, train_together
from gpt.model.placement import PLACEMENTS
from gpt.run.directory import RunResult
from gpt.training import train

Make = Callable[..., Config]
# What cells of one ensemble may differ in.
CELLS: tuple[dict[str, Any], ...] = (
    {"seed": 0, "optimizer": {"learning_rate": 1e-3}, "schedule": {"warmup": "none"}},
    {"seed": 1, "optimizer": {"learning_rate": 3e-3, "clip": 0.5}, "schedule": {"body": "linear"}},
    {"seed": 2, "optimizer": {"weight_decay": 1e-3, "independent_decay": True, "clip": None}},
)


def together(
    configs: Sequence[Config], out: Path, *, updates: int = 10**9, saves: bool = True
) -> list[RunResult]:
    """Train `configs` together, in folders 0, 1, ... of `out`."""
    out.mkdir(exist_ok=True)
    paths = [out / str(i) for i in range(len(configs))]
    made = [0] * len(configs)

    def count(index: int) -> None:
        made[index] += 1

    stop = lambda: max(made) >= updates  # noqa: E731
    ended = train_together(configs, paths, stop=stop, on_update=count, save_checkpoints=saves)
    assert len(set(made)) == 1 or updates > 10**8  # they stop at one step
    for each in ended:
        if isinstance(each, Exception):
            raise each
    return [each for each in ended if isinstance(each, RunResult)]


def losses(out: Path) -> torch.Tensor:
    found = [line for line in metrics.read(out / "metrics.jsonl") if "loss" in line]
    return torch.tensor([math.nan if line["loss"] is None else line["loss"] for line in found])


@pytest.mark.parametrize(
    ("placement", "steps"),
    [
        ("pre", 100),
        *((name, 10) for name in PLACEMENTS if name != "pre"),
        *(pytest.param(name, 100, marks=pytest.mark.slow) for name in PLACEMENTS if name != "pre"),
    ],
)
def test_cells_train_as_they_do_alone(tiny: Make, tmp_path: Path, placement: str, steps: int):
    """Each cell with its own seed, rate, clip, decay and schedule."""
    common = {
        "model": {"layers": 4, "norm": {"placement": placement}},
        "training": {"steps": steps},
        "evaluation": {"every": steps // 2},
        "sampling": {"tokens": 0},
    }
    configs = [tiny(**{**common, **cell}) for cell in CELLS]
    assert len({shape(config) for config in configs}) == 1
    as_one = together(configs, tmp_path / "one")
    for i, config in enumerate(configs):
        alone = train(config, tmp_path / f"alone-{i}", quiet=True)
        assert as_one[i].status == alone.status == "finished"
        assert as_one[i].step == alone.step == steps
        assert as_one[i].val_loss == pytest.approx(alone.val_loss, abs=1e-4)
        one, other = losses(tmp_path / f"one/{i}"), losses(tmp_path / f"alone-{i}")
        assert (one - other).abs().max() < 1e-4
        assert steps == 10 or one[-1] < one[0] - 0.1  # they learn something


def test_looks_and_the_log_are_those_of_a_run_alone(tiny: Make, tmp_path: Path):
    configs = [tiny(diagnostics={"every": 7}, **cell) for cell in CELLS]
    together(configs, tmp_path / "one")
    for i, config in enumerate(configs):
        train(config, tmp_path / f"alone-{i}", quiet=True)
        one, other = records(tmp_path / f"one/{i}"), records(tmp_path / f"alone-{i}")
        assert [line.keys() for line in one] == [line.keys() for line in other]
        for mine, alone in zip(one, other, strict=True):
            for key, value in mine.items():
                assert value == (
                    alone[key] if key == "batches" else pytest.approx(alone[key], rel=2e-3)
                ), (key, mine, alone)
