"""A ladder file: model sizes and compute budgets, whose combinations are the runs of a study.

    base: ../pre-norm.yaml                  # the config that every run builds on
    options: {optimizer.learning_rate: 0.01}
    sizes:                                  # name -> its options
      width 16: {model.width: 16}
      width 32: {model.width: 32}
    flops: [1e10, 3e10, 1e11]               # budgets: C = 6 N D
    tokens_per_parameter: [2, 200]          # combinations outside this range of D / N are left out
    seeds: 2

N counts all parameters, embeddings included, as Hoffmann et al. 2022 do; counting without them is
what biased Kaplan et al.'s exponents at small sizes (Pearce and Song 2024). A size N with a budget
C is trained on D = C / (6 N) tokens.

Every combination is a run of its own, whose schedule ends with its budget. A loss taken before a
longer schedule's end is too high, and biases the exponents (Hoffmann et al. 2022, section 3.1).
Decays that branch off one run (Hägele et al. 2024) would save about a quarter of the updates where
budgets grow by a factor of three, but runs would depend on each other. The warm-up is a fraction of
the steps: one of a fixed length is too long for the smallest budgets (Porian et al. 2024).

The learning rate of each size is stated: by `model.parametrization: mup`, with which the rate found
at the smallest width is that of all others (Yang et al. 2022), or by the options of the sizes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from gpt.compare import grid as grids
from gpt.compare.grid import Cell, Grid, Level, Name, Seeds, Title
from gpt.config import (
    Between,
    Config,
    Hours,
    Section,
    base_of,
    leaves,
    merge,
    nest,
    read,
    read_yaml,
    validate,
)
from gpt.config.shipped import find
from gpt.config.values import Fraction, From, Ratio, Unit
from gpt.errors import InputError, printable
from gpt.io.console import set_encoding

FLOPS = 6  # per parameter and token, forward and backward: C = 6 N D
FACTOR = "size"  # the factor of the grid whose levels are the sizes
AXIS = "training.steps, schedule.warmup_steps"  # the axis of the grid on which budgets differ
LEAST_STEPS = 50  # so that rounding the steps changes a budget by at most 1%
LEAST_RATIO = 1.1  # between budgets
Flops = Annotated[float, Between(1e3, 1e30), Unit("FLOPs")]


class Ladder(Section):
    """A ladder file."""

    title: Title = ""
    """Heading of the report; by default the file's name."""
    base: str | dict[str, Any]
    """The config that runs build on: a YAML file, relative to this one, or the options."""
    options: Level = Field(default_factory=dict)
    """Options of all runs, on top of the base's; dotted or nested."""
    sizes: Annotated[dict[Name, Level], Field(min_length=1, max_length=50)]
    """Name -> the options of a model size, such as its width and its learning rate."""
    flops: Annotated[
        tuple[Flops, ...], Field(min_length=1, max_length=50), From("Hoffmann et al. 2022")
    ]
    """Compute budgets, C = 6 N D, from small to large."""
    tokens_per_parameter: tuple[Ratio, Ratio] = (1.0, 1000.0)
    """The range of D / N; combinations of size and budget outside it are left out."""
    warmup_fraction: Fraction = 0.1
    """Length of the warm-up, as a fraction of a run's steps."""
    seeds: Seeds = (0, 1)
    """Seeds of weights and data order, or their number."""
    hours: Hours = 24.0
    """A study that is estimated to take longer is refused."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for before, after in zip(self.flops, self.flops[1:], strict=False):
            if after < LEAST_RATIO * before:
                raise ValueError(
                    f"flops: {after:g} comes after {before:g}; each budget must be at least "
                    f"{LEAST_RATIO:g} times the one before"
                )
        low, high = self.tokens_per_parameter
        if low >= high:
            raise ValueError(f"tokens_per_parameter: {low:g} is not below {high:g}")
        for name, size in self.sizes.items():
            for key in size:
                if key in (*grids.split(AXIS), "name", "seed") or key.startswith("data."):
                    raise ValueError(f"sizes: {name}: {key}: must be the same for all sizes")
        return self


def is_study(grid: Mapping[str, Any]) -> bool:
    """Whether a grid, as read from its file, was made by `make_grid`."""
    arms, axes = grid.get("arms"), grid.get("grid")
    return isinstance(arms, dict) and isinstance(axes, dict) and [*arms, *axes] == [FACTOR, AXIS]


def load(
    path: str | Path, overrides: Mapping[str, Any] | None = None, seeds: str | None = None
) -> tuple[Ladder, dict[str, Config]]:
    """The ladder in a YAML file, and the config of each size.

    Args:
        path: a file, or the name of a ladder that comes with steadygpt, such as `tiny`.
        overrides: options of all runs, a nested mapping, on top of the file's.
        seeds: replace the file's, see `grids.parse_seeds`.

    Returns:
        The ladder with base and options merged; and by size a config, whose steps and warm-up are
        not those of its runs.

    Raises:
        InputError: the file, its base or a size's config is wrong; the message says where.
    """
    path = find(path, "ladder")
    tree = read_yaml(path)
    ladder = validate(
        Ladder,
        {"title": printable(path.stem)[:200], **tree},
        lambda key: f"{path}: {key}".rstrip(": "),
    )
    own = {key for size in ladder.sizes.values() for key in size}
    for key in dict(leaves(overrides or {})):
        if key in {*own, *grids.split(AXIS), "name", "seed"}:
            raise InputError(f"--{key}: the runs of {path} differ in this option; edit that file")
    base = ladder.base
    if isinstance(base, str):
        base = read(base_of(path, base))
    base = {key: value for key, value in base.items() if key not in ("name", "seed")}
    base = merge(merge(base, nest(ladder.options)), overrides or {})
    update: dict[str, Any] = {"base": base, "options": {}}
    if seeds is not None:
        update["seeds"] = grids.parse_seeds(seeds)
    configs = {
        name: _config(merge(base, nest(size)), f"{path}: sizes: {name}")
        for name, size in ladder.sizes.items()
    }
    return ladder.model_copy(update=update), configs


def _config(tree: Mapping[str, Any], origin: str) -> Config:
    return validate(Config, tree, lambda key: f"{origin}: {key}".rstrip(": "))


def _steps(ladder: Ladder, config: Config, parameters: int) -> list[int]:
    """The number of steps with each budget that is within `tokens_per_parameter`.

    Raises:
        InputError: a budget has fewer than LEAST_STEPS, or none is within the range.
    """
    batch = config.batch_sequences * config.model.context
    low, high = ladder.tokens_per_parameter
    counts = []
    for flops in ladder.flops:
        tokens = flops / (FLOPS * parameters)
        if low <= tokens / parameters <= high:
            counts.append(round(tokens / batch))
            if counts[-1] < LEAST_STEPS:
                raise InputError(
                    f"{flops:g} FLOPs are {counts[-1]} steps of {batch:,} tokens, but at least "
                    f"{LEAST_STEPS} are needed; use smaller batches,\nor raise flops or the lower "
                    "end of tokens_per_parameter"
                )
    if not counts:
        raise InputError(
            f"with {parameters:,} parameters, no budget gives between {low:g} and {high:g} tokens "
            "per parameter;\nchange flops or tokens_per_parameter, or leave this size out"
        )
    return counts


def make_grid(
    ladder: Ladder, configs: Mapping[str, Config], parameters: Mapping[str, int], path: Path
) -> tuple[Grid, list[Cell]]:
    """The grid of a ladder's runs, and its cells.

    Args:
        configs: of each size, from `load`.
        parameters: N of each size.
        path: the ladder's file, for messages.

    Raises:
        InputError: a size has no budget, or one of too few steps.
    """
    sizes: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        try:
            counts = _steps(ladder, config, parameters[name])
        except InputError as error:
            raise InputError(f"{path}: sizes: {name}: {error}") from None
        pairs = [[count, round(ladder.warmup_fraction * count)] for count in counts]
        sizes[name] = {**ladder.sizes[name], AXIS: pairs}
    tree = {
        "title": ladder.title,
        "base": ladder.base,
        "arms": {FACTOR: sizes},
        "grid": {AXIS: next(iter(sizes.values()))[AXIS]},
        "seeds": list(ladder.seeds),
        "probes": False,
        "hours": ladder.hours,
    }
    return grids.resolve(tree, path)


def schema() -> str:
    """The JSON schema of a ladder file, for editors."""
    return json.dumps(Ladder.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(schema())
