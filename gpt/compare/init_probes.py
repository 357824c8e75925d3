"""The comparison's networks at initialization, at several depths: probes.json, and reading it back.

Arms that differ only in how they are trained, such as their warm-up, share a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpt.compare.grid import Cell
from gpt.compare.probes import DEPTHS, Batch, Probe, probe_depths
from gpt.data import preparation
from gpt.data.prepared import Dataset
from gpt.data.sequences import TrainingSequences
from gpt.errors import InputError
from gpt.io.console import Console
from gpt.io.files import read_json, write_text
from gpt.model.norm import ACROSS_TOKENS

SEEDS = tuple(range(5))  # each has initial weights and batches of its own
BATCHES, SEQUENCES = 2, 8  # of the training text, for each seed
PRINT_EVERY = 10.0  # seconds, where there is no bar
TOKEN_SEEDS = tuple(range(16))  # for a single token each, as in the theory


@dataclass(frozen=True)
class InitProbe:
    """One network of the comparison before training.

    Attributes:
        arms: the arms that share it.
        regime: of its initial weights.
        text: probes on batches of the training text, by depth.
        token: the same on single tokens, one per seed, with more seeds; empty where norms compute
            their statistics over several tokens.
    """

    arms: tuple[str, ...]
    regime: str
    text: tuple[Probe, ...]
    token: tuple[Probe, ...]


def measure_init_probes(
    cells: Sequence[Cell],
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> list[InitProbe] | None:
    """Probe every network of the comparison, at `probes.DEPTHS`; None if `stop` becomes true.

    Args:
        console: shows how many blocks have been measured.
    """
    console = console or Console(quiet=True)
    networks: dict[str, list[Cell]] = {}
    for cell in cells:
        model = cell.config.model.model_copy(update={"layers": 0})
        data = cell.config.data.model_copy(update={"seed": None, "windows": None})
        networks.setdefault(repr((model, data)), []).append(cell)
    init_probes, done = [], 0
    console.start(sum(DEPTHS) * len(networks), unit="block", every=PRINT_EVERY)

    def on_depth(layers: int) -> None:
        nonlocal done
        done += layers
        console.progress(done)

    for same in networks.values():
        if stop():
            return None
        config = same[0].config
        dataset = preparation.prepare(config.data)
        vocabulary = dataset.encoding.n_vocab
        context = config.model.context
        text = {seed: _batches(dataset, context, SEQUENCES, BATCHES, seed) for seed in SEEDS}
        token_seeds = TOKEN_SEEDS if config.model.norm.type not in ACROSS_TOKENS else ()
        token = {seed: _batches(dataset, 1, 1, 1, seed) for seed in token_seeds}
        of_text = probe_depths(
            config.model, vocabulary, text, with_sharpness=True, on_depth=on_depth
        )
        init_probes.append(
            InitProbe(
                arms=tuple(dict.fromkeys(cell.arm for cell in same)),
                regime=config.model.init.regime,
                text=tuple(of_text),
                token=tuple(probe_depths(config.model, vocabulary, token)) if token else (),
            )
        )
    return init_probes


def _batches(dataset: Dataset, context: int, size: int, count: int, seed: int) -> list[Batch]:
    sequences = TrainingSequences(dataset.train, context, seed, weights=dataset.weights)
    arrays = (sequences.batch(step, size) for step in range(1, count + 1))
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in arrays]


def write_init_probes(directory: Path, init_probes: Sequence[InitProbe]) -> None:
    """Write probes.json."""
    tree = [asdict(each) for each in init_probes]
    write_text(directory / "probes.json", json.dumps(tree, indent=2) + "\n")


def read_init_probes(directory: Path, arms: Collection[str]) -> list[InitProbe]:
    """The contents of probes.json; empty if there is no such file.

    Args:
        arms: the names of the comparison's arms.

    Raises:
        InputError: it is damaged.
    """
    path = directory / "probes.json"
    if not path.is_file():
        return []
    advice = "delete it to measure again"
    init_probes = read_json(path, list[InitProbe], advice)
    if not all(_is_valid(each, arms) for each in init_probes):
        raise InputError(f"{path}: is damaged; {advice}")
    return init_probes


def _is_valid(init_probe: InitProbe, arms: Collection[str]) -> bool:
    """Whether the probe belongs to arms of the comparison, with a value for each block and seed.

    Some placements leave out small depths, see `probe_depths`.
    """
    depths = [probe.layers for probe in init_probe.text]
    return (
        bool(init_probe.arms)
        and set(init_probe.arms) <= set(arms)
        and [probe.layers for probe in init_probe.token] in (depths, [])
        and bool(depths)
        and depths == list(DEPTHS[-len(depths) :])
        and all(
            len(values) == probe.layers
            for probe in (*init_probe.text, *init_probe.token)
            for values in (probe.gradient_norms, probe.stream_rms, probe.betas)
            if values is not None
        )
        and all(_same_seeds(probes) for probes in (init_probe.text, init_probe.token) if probes)
    )


def _same_seeds(probes: Sequence[Probe]) -> bool:
    """Whether every measure has one value per seed at every depth, for the same number of seeds."""
    seeds = len(probes[0].last_gradients)
    return seeds > 0 and all(
        len(values) == seeds
        for probe in probes
        for values in (
            probe.last_gradients,
            probe.amplifications,
            probe.adam_amplifications,
            probe.sharpness,
        )
        if values is not None
    )
