"""A grid file: the runs of a comparison, and the question that they should answer.

    base: ../pre-norm.yaml                     # the config that every cell builds on
    options: {training.steps: 300}             # on top of it, for all cells
    arms:                                      # what is compared: factors and their levels
      placement:
        pre: {model.norm.placement: pre}
        post: {model.norm.placement: post}
      warm-up:
        cold: {schedule.warmup: none}
        warm: {schedule.warmup: linear}
    grid:                                      # axes: every combination of their values
      optimizer.learning_rate: [1e-3, 3e-3]
      model.layers, model.width: [[6, 96], [12, 48]]
    seeds: 3

It has 2 x 2 arms, 2 learning rates, 2 settings (the values on all other axes) and 3 seeds, so 48
cells. Cells of one setting, rate and seed differ in their arm alone: a cell's seed is that of its
weights and of its data order. An arm that lists its own values of an axis has those instead of the
grid's: Adafactor's rates are not AdamW's.

`python -m gpt.compare.grid` prints the JSON schema that editors use. This module imports no torch
and runs nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gpt.compare.search import LONGER
from gpt.config import (
    MAX_BYTES,
    Between,
    Config,
    Count,
    Hours,
    Rate,
    Section,
    Seed,
    base_of,
    is_reserved,
    leaves,
    merge,
    nest,
    option_paths,
    read,
    read_yaml,
    spell,
    validate,
)
from gpt.config.shipped import find
from gpt.config.values import Pattern
from gpt.errors import InputError, nearest, printable
from gpt.hardware.size import check_cpu_training
from gpt.io.console import set_encoding

RATE = "optimizer.learning_rate"
MOST_CELLS = 10_000  # also the largest number of arms
SEED_COUNT = Between(1, MOST_CELLS)
LONGEST_VALUE = 100  # characters
NEW_NETWORKS = (
    "a comparison trains new networks, so that each seed has its own initial weights; leave it out"
)
Options = dict[str, Any]  # dotted option -> value
StartRate = Annotated[float, Between(1e-9, 1e3)]  # so that a search stays within `Rate`
Measure = Literal[
    "loss", "failure", "sensitivity", "log_lr50", "log_threshold", "column", "log_column"
]
# The columns of cells.csv that a contrast can compare: those that are 0 in a steady run, those that
# diagnostics measure, and the rest.
SteadyColumn = Literal[
    "spikes", "spike_score", "grad_norm_spikes", "grad_norm_spike_score", "early_rise"
]
DiagnosticsColumn = Literal[
    "max_attention_logit",
    "min_attention_entropy",
    "max_update_ratio",
    "max_grad_over_root_v",
    "min_grad_over_eps",
    "max_stream_rms",
    "max_sharpness",
    "max_preconditioned_sharpness",
]
Column = Literal[
    "best_val_loss", "max_grad_norm", "final_train_loss", SteadyColumn, DiagnosticsColumn
]
Claim = Literal["above", "below", "within"]
Point = tuple[str, float | None]  # setting, learning rate; None if each arm has its own
Runner = Literal["auto", "processes", "batched"]


def _flat(value: object) -> object:
    """Flatten nested options to dotted ones; dotted ones stay."""
    return dict(leaves(value)) if isinstance(value, Mapping) else value


def _seeds(value: object) -> object:
    """A number n means the seeds 0 ... n - 1."""
    number = value if isinstance(value, bool) else SEED_COUNT.check(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return list(range(number))
    if not isinstance(value, list | tuple):
        raise PydanticCustomError(
            "number",
            "is neither a list of seeds nor their number, {range}",
            {"range": str(SEED_COUNT)},
        )
    return value


Level = Annotated[Options, BeforeValidator(lambda v: {} if v is None else _flat(v))]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seeds), Field(min_length=1)]


def _one_line(text: str) -> str:
    """Refuse text that figures, tables and terminals cannot show unchanged."""
    if text != printable(text):
        raise PydanticCustomError("characters", "contains a character that cannot be shown")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    return text


def _portable(name: str) -> str:
    if is_reserved(name):
        raise PydanticCustomError("reserved", "is not a valid file name on Windows")
    return name


Title = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
Question = Annotated[
    str, Field(max_length=1000), AfterValidator(_one_line), AfterValidator(_not_blank)
]
Name = Annotated[
    str,
    Field(max_length=40),
    Pattern(r"^[^\s,]([^,]*[^\s,])?$", "have no comma, and no space at either end"),
    AfterValidator(_one_line),
    AfterValidator(_portable),
]


class Contrast(Section):
    """A question that a comparison should answer, registered before it runs.

    The contrast is (a - b) - (c - d), of the arms `of: [a, b]` and `against: [c, d]`, or a - b
    alone. The claim is that it is above, below or within `margin`.
    """

    question: Question
    """The question in words; the report begins with it."""
    of: tuple[str, str]
    """Two arms, such as post-norm with warm-up and without."""
    against: tuple[str, str] | None = None
    """Two arms whose difference is subtracted, such as pre-norm with warm-up and without."""
    measure: Measure = "loss"
    """Mean loss, failed fraction, rate sensitivity, log of the rate at which half of the runs fail,
    mean log of the highest trainable rate (with `search`), or the mean of a column or of its log.
    """
    column: Column | None = None
    """The column of cells.csv that `measure: column` and `measure: log_column` compare."""
    slope: str = ""
    """An axis option, such as model.layers: compare the measure's slopes over the option's log."""
    at: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Axis option -> the values at which the arms are compared; by default all."""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """Arm -> the one rate at which it is compared, where each of the arms has its own."""
    claim: Claim = "above"
    """The contrast is above the margin, below it (non-inferiority), or within it (equivalence)."""
    margin: Annotated[float, Between(-1e3, 1e3)] = 0.0
    """In nats for loss and sensitivity, a fraction for failure, a natural log for log_lr50,
    log_threshold and log_column; of slopes, per unit of the natural log of the axis's value."""

    @property
    def arms(self) -> list[str]:
        """The two or four arms."""
        return [*self.of, *(self.against or ())]

    @property
    def arm_pairs(self) -> list[tuple[str, str]]:
        """The arms of each difference: one or two."""
        return [self.of, *([self.against] if self.against else [])]

    @property
    def own_rates(self) -> bool:
        """Whether each arm is compared at a rate of its own, so that rates need not agree."""
        return bool(self.rates) or self.measure == "log_threshold"

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.claim == "within" and self.margin <= 0:
            raise ValueError("claim: within needs a margin above 0")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError("of, against: an arm is compared with itself")
        if self.measure in ("column", "log_column") and self.column is None:
            raise ValueError(f"measure: {self.measure} needs the name of a column")
        if self.column is not None and self.measure not in ("column", "log_column"):
            raise ValueError("column: needs measure: column or log_column")
        if self.measure == "log_column" and self.column in get_args(SteadyColumn):
            raise ValueError(f"column: {self.column} is 0 in a steady run, and 0 has no log")
        bound = len(self.arms) // 2
        if self.measure == "failure" and not self.slope and abs(self.margin) >= bound:
            raise ValueError(
                f"margin: {self.margin:g} must be above -{bound} and below {bound}, the limits of "
                "this contrast of failed fractions"
            )
        for key, values in self.at.items():
            if len(set(map(as_text, values))) < len(values):
                raise ValueError(f"at: {key}: duplicate value")
        if self.slope == RATE:
            raise ValueError(f"slope: {RATE} cannot be the axis; use sensitivity or log_lr50")
        if self.measure == "log_threshold" and (self.rates or RATE in self.at):
            raise ValueError("measure: log_threshold has no rates: a search chooses them")
        if self.rates:
            if set(self.rates) != set(self.arms):
                raise ValueError(f"rates: needs a rate for each of {'; '.join(self.arms)}")
            if RATE in self.at:
                raise ValueError(f"at: {RATE}: cannot be given together with rates")
            if self.measure in ("sensitivity", "log_lr50"):
                raise ValueError(f"rates: {self.measure} needs more than one rate of each arm")
        return self

    def values(self, arm: str) -> dict[str, list[Any]]:
        """Option -> the values at which an arm is compared; of other options, all values count."""
        return {**self.at, **({RATE: [self.rates[arm]]} if self.rates else {})}

    def includes(self, cell: Cell) -> bool:
        """Whether a cell belongs to the contrast: its arm, its rate and its setting."""
        return cell.arm in self.arms and all(
            as_text(_value(cell.config, key)) in map(as_text, values)
            for key, values in self.values(cell.arm).items()
        )


class Search(Section):
    """A search for the highest trainable rate of each arm, with each seed, in each setting.

    Its rates are anchor * ratio^k for whole numbers k, its steps. See gpt/compare/search.py.
    """

    option: Literal["optimizer.learning_rate"] = "optimizer.learning_rate"
    """What is searched."""
    start: StartRate | dict[str, StartRate]
    """The first rate of every search, or arm -> its first rate; chosen from runs of other seeds."""
    ratio: Annotated[float, Between(1.01, 4.0)] = 1.25
    """Between neighboring rates: the resolution of a threshold."""
    anchor: StartRate = 0.003
    """Every rate is this one times a power of the ratio."""
    most_runs: Annotated[int, Between(4, 12)] = 8
    """A search that has had this many runs ends, if need be with a bound."""

    def rate(self, step: float) -> float:
        """The rate at a step, rounded to four digits so that names of cells are short."""
        return float(f"{self.anchor * self.ratio**step:.4g}")

    def step(self, rate: float) -> int:
        """The step whose rate is nearest to `rate`, in ratio."""
        return round(math.log(rate / self.anchor) / math.log(self.ratio))

    def start_of(self, arm: str) -> float:
        """The first rate of an arm's searches, on the lattice."""
        start = self.start[arm] if isinstance(self.start, dict) else self.start
        return self.rate(self.step(start))


class Grid(Section):
    """A grid file."""

    title: Title = ""
    """Heading of the report; by default the file's name."""
    base: str | dict[str, Any]
    """The config that cells build on: a YAML file, relative to this one, or the options."""
    options: Level = Field(default_factory=dict)
    """Options of all cells, on top of the base's; dotted or nested."""
    arms: Annotated[
        dict[Name, Annotated[dict[Name, Level], Field(min_length=1)]],
        Field(min_length=1, max_length=50),
    ]
    """Factor -> level -> its options. An arm is one level of each factor."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Axis -> values. An axis is one dotted option, or several with commas and tuples of values."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of weights and data order, or their number."""
    first_stage: Annotated[int, Between(6, 16)] | None = None
    """Number of seeds in the first stage, after which the comparison stops if they answer the first
    contrast. Each stage has its own significance level."""
    context_seeds: Count | None = None
    """How many of the seeds to run for cells outside all contrasts; by default all."""
    search: Search | None = None
    """Search the highest trainable learning rate instead of running an axis of rates."""
    exclude: Annotated[tuple[dict[str, Any], ...], Field(max_length=200)] = ()
    """Cells to leave out: those that match all of an entry's `arm`, factors, options and `seed`."""
    contrasts: Annotated[tuple[Contrast, ...], Field(max_length=20)] = ()
    """Contrasts, registered before the runs; the rest are exploratory once one is not supported."""
    pairs: Annotated[tuple[tuple[str, str], ...], Field(max_length=1000)] = ()
    """Further pairs of arms to compare, corrected together by Holm's method."""
    probes: bool = True
    """Measure each arm's network at initialization, at several depths."""
    runner: Runner = "auto"
    """Train cells of one shape together (batched), in processes, or whichever suits the device."""
    hours: Hours = 24.0
    """A comparison that is estimated to take longer is refused."""
    keep_checkpoints: bool = False
    """Keep the cells' checkpoints: they are large, and sampling from a cell needs them."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        count = math.prod(map(len, self.arms.values()))
        if count > MOST_CELLS:  # before they are built
            raise ValueError(
                f"arms: {count:,} combinations of levels; at most {MOST_CELLS:,} are allowed"
            )
        arms = self.all_arms()
        self._check_search([arm.name for arm in arms])
        self._check_options(arms)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: duplicate seed")
        for factor in self.arms:
            if factor in ("arm", "seed"):
                raise ValueError(f"arms: {factor!r} cannot name a factor")
        for arm in arms:
            for axis, values in arm.axes.items():
                if not values:
                    raise ValueError(f"arms: {arm.name!r} has no value for {axis}")
                _check_values(f"arms: {arm.name!r}: {axis}", values)
        for axis, values in self.grid.items():
            _check_values(f"grid: {axis}", values)
        self._check_questions([arm.name for arm in arms])
        return self

    def _check_search(self, arms: Sequence[str]) -> None:
        """A search has a first rate for every arm, and all contrasts compare its thresholds."""
        for number, contrast in enumerate(self.contrasts):
            if (contrast.measure == "log_threshold") != (self.search is not None):
                raise ValueError(
                    f"contrasts.{number}.measure: {contrast.measure}: log_threshold needs a "
                    "search, and a search has no other measure"
                )
            step = math.log(self.search.ratio) if self.search else 0.0
            if contrast.claim == "within" and not contrast.slope and contrast.margin < step:
                raise ValueError(
                    f"contrasts.{number}.margin: {contrast.margin:g} is below the log of "
                    f"search.ratio, {step:.6g}, which is the resolution of a threshold"
                )
        if self.search is None:
            return
        if any(self.search.option in split(axis) for axis in self.grid):
            raise ValueError(f"grid: {self.search.option} is on an axis, but a search chooses it")
        if self.pairs:
            raise ValueError("pairs: cannot be compared at the rates that searches choose")
        start = self.search.start
        if isinstance(start, dict) and set(start) != set(arms):
            raise ValueError(f"search.start: needs a rate for each of {'; '.join(arms)}")

    def _check_options(self, arms: Sequence[Arm]) -> None:
        """Every option exists and is set in one place."""
        known = set(option_paths(Config)) - {"name", "seed"}
        on_axes = [key for axis in self.grid for key in split(axis)]
        on_axes += [self.search.option] if self.search else []
        used = [("options", key) for key in self.options] + [("grid", key) for key in on_axes]
        for factor, levels in self.arms.items():
            for name, level in levels.items():
                used += [(f"arms.{factor}.{name}", key) for key in level if key not in self.grid]
        for where, key in used:
            if key == "init_from":
                raise ValueError(f"{where}: {key}: {NEW_NETWORKS}")
            if key not in known:
                raise ValueError(f"{where}: {key}: no such option of a cell{nearest(key, known)}")
        for arm in arms:
            for key in sorted(set(on_axes) & arm.options.keys()):
                raise ValueError(f"{key}: is set by arm {arm.name!r} and by the grid")
        for key, count in Counter(on_axes).items():
            if count > 1:
                raise ValueError(f"grid: {key} is on two axes")

    def _check_questions(self, arms: Sequence[str]) -> None:
        """The contrasts and the pairs compare different arms of this grid, at values on axes."""
        for a, b in self.pairs:
            if a == b:
                raise ValueError(f"{a!r} is compared with itself")
        if len(set(map(frozenset, self.pairs))) < len(self.pairs):
            raise ValueError("pairs: duplicate pair")
        contrasted = [contrast.arms for contrast in self.contrasts]
        for name in itertools.chain(*self.pairs, *contrasted):
            if name not in arms:
                hint = nearest(name, arms)
                raise ValueError(f"{name!r} is not one of the arms: {'; '.join(arms)}{hint}")
        axes = [key for axis in self.grid for key in split(axis)]
        for number, contrast in enumerate(self.contrasts):
            for where, key in [*(("at", key) for key in contrast.at), ("slope", contrast.slope)]:
                if key and key not in axes:
                    raise ValueError(
                        f"contrasts.{number}.{where}: {key}: is not on an axis{nearest(key, axes)}"
                    )
        if self.context_seeds is not None and not self.contrasts:
            raise ValueError("context_seeds: needs contrasts; without any, change seeds")

    def all_arms(self) -> list[Arm]:
        """Every combination of levels, the last factor changing fastest.

        Raises:
            ValueError: two levels of one arm set the same option.
        """
        arms = []
        for chosen in itertools.product(*(levels.items() for levels in self.arms.values())):
            levels = dict(zip(self.arms, (name for name, _ in chosen), strict=True))
            options: Options = {}
            for name, level in chosen:
                both = sorted(options.keys() & level.keys())
                if both:
                    raise ValueError(f"arms: {both[0]} is set by {name!r} and by another factor")
                options |= level
            own = {key: v for key, v in options.items() if key in self.grid and isinstance(v, list)}
            options = {key: value for key, value in options.items() if key not in own}
            arms.append(Arm(", ".join(levels.values()), levels, options, own))
        return arms

    def axes(self, arm: Arm) -> dict[str, list[Any]]:
        """The axes of an arm's cells; if a search chooses rates, with only the first of them."""
        axes = {**self.grid, **arm.axes}
        if self.search is not None:
            axes[self.search.option] = [self.search.start_of(arm.name)]
        return axes

    @property
    def rounds(self) -> int:
        """How often cells are chosen: once, once per stage, or at most once per run of a search."""
        return self.search.most_runs if self.search else 2 if self.first_stage else 1

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """The seeds of the first stage; all without stages."""
        return self.seeds[: self.first_stage]

    def at_rate(self, cell: Cell, rate: float, *, longer: bool = False) -> Cell:
        """The cell that differs from `cell` only in its learning rate.

        Args:
            longer: whether it also has LONGER times as many updates (gpt/compare/search.py).
        """
        arm = next(arm for arm in self.all_arms() if arm.name == cell.arm)
        options = {**cell.setting, RATE: rate}
        found = _cell(self, arm, options, cell.config.seed, list(cell.varied), cell.id)
        if not longer:
            return found
        steps = LONGER * found.config.training.steps
        name = f"{found.id}_steps-{steps}"
        tree = merge(found.config.model_dump(), {"name": name, "training": {"steps": steps}})
        config = validate(Config, tree, lambda key: f"{name}: {key}".rstrip(": "))
        return replace(found, id=name, config=config, longer=True)

    def to_yaml(self) -> str:
        """The grid as YAML that `load` reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Arm:
    """What is compared: one level of each factor.

    Attributes:
        name: its levels, joined by commas.
        levels: factor -> level.
        options: the options that define it.
        axes: its own values, for axes on which they replace the grid's.
    """

    name: str
    levels: dict[str, str]
    options: Options
    axes: dict[str, list[Any]]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        id: the name of its directory.
        varied: every option in which cells differ, by its dotted name, and its value here.
        setting: the part of `varied` on the grid's axes, except the learning rate.
        longer: whether it repeats a run of a search with more updates: it decides how that run
            counts, and is in no other result.
    """

    id: str
    arm: str
    varied: Options
    setting: Options
    config: Config
    longer: bool = False

    @property
    def setting_text(self) -> str:
        """`layers 12, width 64`; empty if the learning rate is the only axis."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.setting.items())


def _check_values(origin: str, values: Sequence[Any]) -> None:
    """Refuse axis values that names, figures and tables cannot show.

    Raises:
        ValueError: such a value.
    """
    for text in map(str, values):
        if text != printable(text) or len(text) > LONGEST_VALUE:
            raise ValueError(
                f"{origin}: {text[:LONGEST_VALUE]!r} does not fit into a figure; a value on an "
                f"axis is one line of at most {LONGEST_VALUE} characters (other options of an arm "
                "may be longer)"
            )


def split(axis: str) -> list[str]:
    """The options of an axis: one, or several with commas between."""
    return [key.strip() for key in axis.split(",")]


def load(
    path: str | Path, overrides: Mapping[str, Any] | None = None, seeds: str | None = None
) -> tuple[Grid, list[Cell]]:
    """The grid in a YAML file, and its cells; see `resolve`.

    Args:
        path: a file, or the name of a grid that comes with steadygpt, such as `quick`.

    Raises:
        InputError: the file, its base or a cell's config is wrong; the message says where.
    """
    path = find(path, "grid")
    tree = read_yaml(path)
    if "arms" not in tree and set(tree) & set(Config.model_fields):
        raise InputError(f"{path}: is a config for train.py; a grid has arms, see configs/compare/")
    return resolve(tree, path, overrides, seeds)


def resolve(
    tree: Mapping[str, Any],
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    seeds: str | None = None,
) -> tuple[Grid, list[Cell]]:
    """The grid that a nested mapping describes, and its cells.

    Args:
        path: the file that the mapping comes from.
        overrides: options for all cells, a nested mapping, on top of the file's.
        seeds: replace the file's, see `parse_seeds`. An entry of `exclude` that names seeds, but
            none of these, is then ignored, and `context_seeds` is at most their number.

    Returns:
        The grid with base and options merged, so that it needs no other file; and the cells, seed
        by seed.

    Raises:
        InputError: as `load`.
    """
    grid = validate(
        Grid,
        {"title": printable(path.stem)[:200], **tree},
        lambda key: f"{path}: {key}".rstrip(": "),
    )
    if seeds is not None:
        given_seeds = parse_seeds(seeds)
        context = grid.context_seeds and min(grid.context_seeds, len(given_seeds))
        grid = grid.model_copy(update={"seeds": given_seeds, "context_seeds": context})
        matched = [entry for entry in grid.exclude if not _is_of_other_seeds(entry, grid.seeds)]
        grid = grid.model_copy(update={"exclude": tuple(matched)})
    given, varied = dict(leaves(overrides or {})), _varied(grid)
    for key in given:
        if key in {*varied, "seed", "name"}:
            raise InputError(f"--{key}: the cells of {path} differ in this option; edit that file")
    base = grid.base
    if isinstance(base, str):
        base = read(base_of(path, base))
    base = {key: value for key, value in base.items() if key not in ("name", "seed")}
    count = (
        (grid.search.most_runs if grid.search else 1)
        * len(grid.seeds)
        * sum(math.prod(map(len, grid.axes(arm).values())) for arm in grid.all_arms())
    )
    if count > MOST_CELLS:
        raise InputError(f"{path}: describes {count:,} cells; at most {MOST_CELLS:,} are allowed")
    base = merge(merge(base, nest(grid.options)), overrides or {})
    if base.get("init_from") is not None:
        raise InputError(f"{path}: init_from: {base['init_from']}: {NEW_NETWORKS}")
    grid = grid.model_copy(update={"base": base, "options": {}})
    cells = _cells(grid, str(path))
    if grid.first_stage is not None:
        _check_stages(grid.first_stage, grid, f"{path}: first_stage")
    if grid.context_seeds is not None:
        _check_context(grid.context_seeds, grid, cells, f"{path}: context_seeds")
    for number, contrast in enumerate(grid.contrasts):
        _check_contrast(contrast, cells, f"{path}: contrasts.{number}")
    runs = _by_arm(cells)
    for number, pair in enumerate(grid.pairs):
        _shared({arm: runs.get(arm, {}) for arm in pair}, f"{path}: pairs.{number}")
    if len(grid.to_yaml().encode()) > MAX_BYTES:  # its comparison could not be read back
        raise InputError(f"{path}: is longer than {MAX_BYTES:,} bytes including its base")
    return grid, cells


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds that a text such as `8` (0 to 7), `16:24` (16 to 23) or `1,5,7` describes.

    Raises:
        InputError: it is something else, or a seed is duplicate or out of range.
    """
    first, colon, end = text.partition(":")
    numbers = [first or "0", end] if colon else text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,10} *", number) for number in numbers):
        raise InputError(f"--seeds: {text!r} is neither a number, nor like 16:24 or 1,5,7")
    values = [int(number) for number in numbers]
    if colon or len(values) == 1:
        values = values if colon else [0, *values]
        if not 0 < values[1] - values[0] <= MOST_CELLS:
            raise InputError(f"--seeds: {text!r} does not give 1 to {MOST_CELLS:,} seeds")
        values = list(range(*values))
    if len(set(values)) < len(values):
        raise InputError(f"--seeds: {text!r} has a duplicate seed")
    return tuple(values)


def _is_of_other_seeds(entry: Options, seeds: Sequence[int]) -> bool:
    """Whether an entry of `exclude` names seeds, none of which are among `seeds`."""
    named = _texts_of({"seed": entry.get("seed", [])})["seed"]
    return bool(named) and named.isdisjoint(map(as_text, seeds))


def _check_stages(first_stage: int, grid: Grid, origin: str) -> None:
    """Refuse a first stage without a contrast that can decide whether to stop, or with all seeds.

    Raises:
        InputError: the grid cannot have such a stage.
    """
    if grid.search is not None:
        raise InputError(f"{origin}: cannot be combined with a search")
    if not grid.contrasts:
        raise InputError(f"{origin}: needs a contrast, whose differences decide whether to stop")
    if grid.contrasts[0].claim == "within" or grid.contrasts[0].measure == "log_lr50":
        raise InputError(
            f"{origin}: needs a first contrast with a value for each seed (not log_lr50), "
            "and the claim above or below"
        )
    if first_stage >= len(grid.seeds):
        raise InputError(
            f"{origin}: {first_stage} is not below the number of seeds, {len(grid.seeds)}"
        )


def _check_context(context_seeds: int, grid: Grid, cells: Sequence[Cell], origin: str) -> None:
    """Refuse a value of `context_seeds` that has no effect.

    Raises:
        InputError: it is above the number of seeds, or every cell is in a contrast.
    """
    if context_seeds > len(grid.seeds):
        raise InputError(
            f"{origin}: {context_seeds} is above the number of seeds, {len(grid.seeds)}"
        )
    if all(any(contrast.includes(cell) for contrast in grid.contrasts) for cell in cells):
        raise InputError(f"{origin}: has no effect, as every cell is in a contrast")


def _check_contrast(contrast: Contrast, cells: Sequence[Cell], origin: str) -> None:
    """Refuse a contrast that cannot have an answer, whatever its cells' results are.

    Raises:
        InputError: an arm has no cell with a value, or the arms do not share the cells that the
            measure, the slope or the column needs.
    """
    for arm in contrast.arms:
        own = [cell for cell in cells if cell.arm == arm]
        for key, values in contrast.values(arm).items():
            known = {as_text(_value(cell.config, key)) for cell in own}
            for text in map(as_text, values):
                if text not in known:
                    raise InputError(f"{origin}: arm {arm!r} has no cell with {key} {text}")
    included = [cell for cell in cells if contrast.includes(cell)]
    of_arms = _by_arm(included, own_rates=contrast.own_rates)
    runs = {arm: of_arms.get(arm, {}) for arm in contrast.arms}
    seeds, points = _shared(runs, f"{origin}.of", own_rates=contrast.own_rates)
    if contrast.measure in ("sensitivity", "log_lr50"):
        for setting, count in Counter(setting for setting, _ in points).items():
            if count < 2:
                raise InputError(
                    f"{origin}.measure: {contrast.measure} needs two or more learning rates that "
                    f"all of its arms have{setting and f' at {setting}'}"
                )
    if contrast.slope:
        at_points = [runs[contrast.of[0]][seeds[0], point] for point in points]
        _check_slope(
            [cell.varied[contrast.slope] for cell in at_points], f"{origin}.slope: {contrast.slope}"
        )
    if contrast.column is not None:
        _check_column(contrast.column, included, f"{origin}.column: {contrast.column}")


def shared_points(
    runs: Mapping[str, Mapping[tuple[int, Point], object]], *, slope: bool = False
) -> tuple[list[int], list[Point]]:
    """Seeds and points such that every arm has every seed at every point.

    Starting with the seeds that all arms have, the seed or the point that lacks the largest part of
    its runs is left out, until no arm lacks a run. So one incomplete seed does not remove the
    points that all others have.

    Args:
        runs: arm -> its runs, by seed and point.
        slope: whether to keep a rate in all settings or in none: one that only some of them have
            would change a slope over the settings.
    """
    every = dict.fromkeys(point for own in runs.values() for _, point in own)
    units: dict[Hashable, list[Point]] = {point: [point] for point in every}
    if slope:
        settings = list(dict.fromkeys(setting for setting, _ in every))
        units = {rate: [(setting, rate) for setting in settings] for _, rate in every}
    seeds = dict.fromkeys(sorted(_common_seeds(runs)))
    lacking = {
        (seed, unit)
        for unit, points in units.items()
        for seed in seeds
        if not all((seed, point) in own for own in runs.values() for point in points)
    }
    while lacking:
        (seed, of_seed), *_ = Counter(seed for seed, _ in lacking).most_common(1)
        (unit, of_unit), *_ = Counter(unit for _, unit in lacking).most_common(1)
        if of_seed / len(units) > of_unit / len(seeds):
            del seeds[seed]
        else:
            del units[unit]
        lacking = {(s, u) for s, u in lacking if s in seeds and u in units}
    points = [point for unit in units.values() for point in unit]
    return ([*seeds], points) if seeds and points else ([], [])


def _common_seeds(runs: Mapping[str, Mapping[tuple[int, Point], object]]) -> set[int]:
    return set.intersection(*({seed for seed, _ in own} for own in runs.values()))


OfArm = dict[tuple[int, Point], Cell]  # by seed and point


def _by_arm(cells: Sequence[Cell], *, own_rates: bool = False) -> dict[str, OfArm]:
    """The cells of each arm."""
    found: dict[str, OfArm] = {}
    for cell in cells:
        rate = None if own_rates else cell.config.optimizer.learning_rate
        found.setdefault(cell.arm, {})[cell.config.seed, (cell.setting_text, rate)] = cell
    return found


def _shared(
    runs: Mapping[str, OfArm], origin: str, *, own_rates: bool = False
) -> tuple[list[int], list[Point]]:
    """The `shared_points` of arms, at least one.

    Raises:
        InputError: there is none.
    """
    for arm, own in runs.items():
        if not own:
            raise InputError(f"{origin}: arm {arm!r} has no cell to compare")
    seeds, points = shared_points(runs)
    names = "; ".join(runs)
    if not _common_seeds(runs):
        raise InputError(f"{origin}: no seed is common to {names}")
    if not points:
        what = "setting" if own_rates else "setting and learning rate"
        hint = "" if own_rates else " (`rates` of a contrast gives each arm its own)"
        raise InputError(f"{origin}: no {what} has every common seed of {names}{hint}")
    return seeds, points


def _check_slope(values: Sequence[Any], origin: str) -> None:
    """Refuse a slope over values other than two or more positive numbers.

    Raises:
        InputError: they are not such numbers.
    """
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(set(numbers)) < 2 or min(numbers) <= 0:
        raise InputError(f"{origin}: needs two or more positive numbers that all arms have")


def _check_column(column: Column, cells: Sequence[Cell], origin: str) -> None:
    """Refuse a column that is empty whatever the results are.

    Raises:
        InputError: it would be empty in some cell.
    """
    needs: dict[str, Callable[[Config], bool]] = {}
    if column in get_args(DiagnosticsColumn):
        needs["diagnostics.every"] = lambda config: config.diagnostics.every is not None
    if column.endswith("sharpness"):
        needs["diagnostics.sharpness"] = lambda config: config.diagnostics.sharpness > 0
    if column == "early_rise":  # of the first quarter of the steps
        from gpt.compare.analysis.verdicts import SMOOTHING  # imports scipy, which takes long

        least = 4 * SMOOTHING
        needs[f"training.steps of {least} or more"] = lambda config: config.training.steps >= least
    for (need, has), cell in itertools.product(needs.items(), cells):
        if not has(cell.config):
            raise InputError(f"{origin}: needs {need}, which arm {cell.arm!r} does not have")


def _varied(grid: Grid) -> list[str]:
    """Every option in which cells may differ."""
    of_arms = [key for arm in grid.all_arms() for key in arm.options]
    on_axes = [key for arm in grid.all_arms() for axis in grid.axes(arm) for key in split(axis)]
    return list(dict.fromkeys([*of_arms, *on_axes]))


def _cells(grid: Grid, origin: str) -> list[Cell]:
    combinations = [
        (seed, arm, dict(zip(grid.axes(arm), values, strict=True)))
        for seed, arm in itertools.product(grid.seeds, grid.all_arms())
        for values in itertools.product(*grid.axes(arm).values())
    ]
    cells: dict[str, Cell] = {}
    varied, excluded = _varied(grid), [_texts_of(entry) for entry in grid.exclude]
    matched = set()
    assert isinstance(grid.base, dict)
    base = {**dict(leaves(Config().model_dump())), **dict(leaves(grid.base))}
    for seed, arm, values in combinations:
        placed: Options = {}
        for axis, value in values.items():
            placed |= _assign(axis, value, origin)
        options = {**base, **arm.options, **placed}  # not validated: what is excluded may be wrong
        own = {key: options[key] for key in varied}
        known = _texts_of({"arm": arm.name, "seed": seed, **arm.levels, **own})
        entries = {
            number
            for number, entry in enumerate(excluded)
            if _matches(entry, known, f"{origin}: exclude.{number}")
        }
        matched |= entries
        if entries:
            continue
        cell = _cell(grid, arm, placed, seed, varied, origin)
        if seed not in grid.seeds[: grid.context_seeds] and not any(
            contrast.includes(cell) for contrast in grid.contrasts
        ):
            continue
        fixed = {key: v for key, v in placed.items() if not (grid.search and key == RATE)}
        name = _id(arm, fixed, seed).lower()  # some file systems ignore case
        twin = cells.setdefault(name, cell)
        if twin is not cell:
            why = f"rename {twin.arm!r} or {arm.name!r}, which give the same directory"
            if twin.arm == arm.name:
                why = "duplicate value or name"
            raise InputError(f"{origin}: two cells are called {cell.id}: {why}")
    for number, entry in enumerate(grid.exclude):
        if number not in matched:
            raise InputError(f"{origin}: exclude.{number}: {spell(entry)} matches no cell")
    if not cells:
        raise InputError(f"{origin}: exclude leaves no cells")
    return list(cells.values())


def _cell(grid: Grid, arm: Arm, placed: Options, seed: int, varied: list[str], origin: str) -> Cell:
    assert isinstance(grid.base, dict)
    name = _id(arm, placed, seed)
    tree = merge(grid.base, nest({**arm.options, **placed, "seed": seed, "name": name}))
    where = f"{origin}: arm {arm.name!r}"
    config = validate(Config, tree, lambda key: f"{where}: {key}".rstrip(": "))
    if config.tracking:
        raise InputError(
            f"{where}: tracking: the cells of a comparison are not tracked, as its report compares "
            "them;\nset tracking to []"
        )
    if config.evaluation.patience is not None:
        raise InputError(
            f"{where}: evaluation.patience: runs that stop early see different numbers of batches, "
            "so they cannot be compared; leave it out"
        )
    if config.training.processes != 1:
        raise InputError(
            f"{where}: training.processes: {config.training.processes}, but each cell is trained "
            "in one process, and several cells at a time;\nset it to 1, or leave it out"
        )
    own = {key: _value(config, key) for key in varied}
    setting = {key: own[key] for key in placed if key != RATE}
    return Cell(name, arm.name, own, setting, config)


def _assign(axis: str, value: Any, origin: str) -> Options:
    """The options that a value on an axis sets."""
    keys = split(axis)
    if len(keys) == 1:
        return {axis: value}
    if not isinstance(value, list) or len(value) != len(keys):
        raise InputError(f"{origin}: grid: {axis}: needs {len(keys)} values, found {spell(value)}")
    return dict(zip(keys, value, strict=True))


def _texts_of(options: Options) -> dict[str, set[str]]:
    """The texts of each option's value or values; a switch matches both of its spellings."""
    switch = {"on": {"on", "True"}, "off": {"off", "False"}}
    return {
        key: set().union(*(switch.get(as_text(v), {as_text(v)}) for v in values))
        for key, value in options.items()
        for values in [value if isinstance(value, list) else [value]]
    }


def _matches(entry: dict[str, set[str]], known: dict[str, set[str]], origin: str) -> bool:
    """Whether an entry of `exclude` describes a cell."""
    for key, wanted in entry.items():
        if key not in known:
            raise InputError(f"{origin}: {key}: cells do not differ in it{nearest(key, known)}")
        if wanted.isdisjoint(known[key]):
            return False
    return True


def as_text(value: Any) -> str:
    """A value as written in names: `1e-3`, `0.001` and 0.001 are the same."""
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _id(arm: Arm, options: Options, seed: int) -> str:
    """`post_cold_learning-rate-0.003_seed-0`; with a hash if characters are replaced or cut."""
    options_text = [f"{key.rpartition('.')[2]}-{as_text(value)}" for key, value in options.items()]
    parts = [*arm.levels.values(), *options_text]
    slugs = [re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-.") for part in parts]
    name = "_".join(slugs)
    is_exact = all(re.fullmatch(r"[\w .,+-]+", part, re.ASCII) for part in parts) and all(slugs)
    if not is_exact or len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}".lstrip("_-.")
    return f"{name}_seed-{seed}"


def check_sizes(cells: list[Cell]) -> None:
    """Refuse cells that are clearly too large for this machine, without importing torch.

    Raises:
        InputError: as `gpt.hardware.size.check_training`, naming the arm.
    """
    for cell in cells:
        try:
            check_cpu_training(cell.config)
        except InputError as error:
            raise InputError(f"arm {cell.arm!r}: {error}") from None


def _value(config: Config, key: str) -> Any:
    """The value of a dotted option."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def schema() -> str:
    """The JSON schema of a grid file, for editors."""
    return json.dumps(Grid.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(schema())
