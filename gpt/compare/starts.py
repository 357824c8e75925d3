"""The arms' networks at their start, at several depths: probes.json, and reading it back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.compare.grid import Cell
from gpt.compare.probes import DEPTHS, Batch, Probe, probe_depths
from gpt.data import preparation
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences
from gpt.errors import InputError
from gpt.io.files import read_json

SEEDS = (0, 1)
BATCHES, SEQUENCES = 2, 8  # of the training text
TOKEN_SEEDS = tuple(range(16))  # with one token each: the theory's setting


@dataclass(frozen=True)
class Start:
    """One network of the comparison before training.

    Attributes:
        arms: the arms that start from it; they differ in what is no matter of the model.
        regime: of its initial weights.
        text: probes on batches of the training text, by depth.
        token: the same on single tokens, one a seed.
    """

    arms: tuple[str, ...]
    regime: str
    text: tuple[Probe, ...]
    token: tuple[Probe, ...]


def measure_starts(
    cells: Sequence[Cell], stop: Callable[[], bool] = lambda: False
) -> list[Start] | None:
    """Probe every network of the comparison, at `probes.DEPTHS`; None once `stop` comes true."""
    models: dict[str, list[Cell]] = {}
    for cell in cells:
        alike = cell.config.model.model_copy(update={"layers": 0})
        models.setdefault(repr((alike, cell.config.data)), []).append(cell)
    starts = []
    for alike_cells in models.values():
        if stop():
            return None
        config = alike_cells[0].config
        dataset = preparation.prepare(config.data)
        vocabulary = dataset.encoding.n_vocab
        text = _batches(dataset, config.model.context, SEQUENCES, BATCHES)
        token = _batches(dataset, 1, 1, 1)
        starts.append(
            Start(
                arms=tuple(dict.fromkeys(cell.arm for cell in alike_cells)),
                regime=config.model.init.regime,
                text=tuple(probe_depths(config.model, vocabulary, text, SEEDS)),
                token=tuple(probe_depths(config.model, vocabulary, token, TOKEN_SEEDS)),
            )
        )
    return starts


def _batches(dataset: Dataset, context: int, size: int, count: int) -> list[Batch]:
    sequences = TrainingSequences(dataset.train, context, seed=0, weights=dataset.weights)
    arrays = (sequences.batch(step, size) for step in range(1, count + 1))
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in arrays]


def read_starts(directory: Path, arms: Collection[str]) -> list[Start]:
    """What probes.json says; nothing if it is not there.

    Args:
        arms: the comparison's, by name.

    Raises:
        InputError: it is damaged.
    """
    path = directory / "probes.json"
    if not path.is_file():
        return []
    advice = "delete it to measure again"
    starts = read_json(path, list[Start], advice)
    if not all(_is_measured(start, arms) for start in starts):
        raise InputError(f"{path}: is damaged; {advice}")
    return starts


def _is_measured(start: Start, arms: Collection[str]) -> bool:
    """Whether it is of arms of the comparison, at several depths, with a value for each block."""
    depths = [probe.layers for probe in start.text]
    return (
        bool(start.arms)
        and set(start.arms) <= set(arms)
        and depths == [probe.layers for probe in start.token] == list(DEPTHS)
        and all(
            len(values) == probe.layers
            for probe in (*start.text, *start.token)
            for values in (probe.gradient_norms, probe.stream_rms, probe.betas)
            if values is not None
        )
    )
