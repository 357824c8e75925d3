"""What the cells' directories say: each cell's verdict, and whether the arms were matched.

Everything is read from files that training wrote, so a report can be made anywhere, and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from gpt import metrics
from gpt.compare.grid import Cell
from gpt.compare.runner import Lost, cell_directory, has_ended
from gpt.compare.statistics import capped
from gpt.compare.verdicts import Verdict, verdict
from gpt.errors import InputError
from gpt.io.files import read_json
from gpt.run.directory import RunDirectory


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        verdict: None of a cell without a result, which is left out of all statistics.
        lost: why it has none; None if it was not tried, or has one.
        seconds: wall-clock time.
        unigram_entropy: H₁, nats per token.
        environment: environment.json.
        batches: step -> digest of all inputs up to it.
        vocabulary: V, tokens.
        extremes: what the looks into the layers saw at their worst; empty without diagnostics.
    """

    cell: Cell
    directory: Path
    verdict: Verdict | None
    lost: Lost | None = None
    seconds: float = 0.0
    unigram_entropy: float = 0.0
    environment: dict[str, Any] | None = None
    batches: dict[int, str] | None = None
    vocabulary: int = 2
    extremes: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The verdict's, or why there is none."""
        if self.verdict is not None:
            return self.verdict.status
        return self.lost.status if self.lost is not None else "missing"

    @property
    def rate(self) -> float:
        """The full learning rate."""
        return float(self.cell.config.optimizer.learning_rate)

    @property
    def seed(self) -> int:
        """The cell's seed."""
        return self.cell.config.seed

    @property
    def loss(self) -> float:
        """Final validation loss; of a failed run at most the loss at the start, never left out."""
        assert self.verdict is not None
        return capped(self.verdict.final_val_loss, self.initial_loss)

    @property
    def initial_loss(self) -> float:
        """Validation loss before the first update; ln V, that of no knowledge, if not finite."""
        assert self.verdict is not None
        initial = self.verdict.initial_loss
        return math.log(self.vocabulary) if initial is None else initial


class Weight(BaseModel):
    """What environment.json says of a parameter's first numbers; see gpt.init.fingerprints."""

    shape: list[PositiveInt]
    sha256: str
    signs: str


class Environment(BaseModel):
    """What a report needs of environment.json; the rest is shown as it is."""

    model_config = ConfigDict(extra="allow")
    versions: dict[str, str]
    unigram_entropy: Annotated[float, Field(ge=0, le=1000)]
    initial_weights: dict[str, Weight]


def read_outcome(cell: Cell, directory: Path, lost: Lost | None = None) -> Outcome:
    """The outcome of a cell, from its run directory.

    Raises:
        InputError: it holds a run of another config, or a file in it is damaged.
    """
    run = RunDirectory(cell_directory(directory, cell))
    result = run.read_result() if has_ended(directory, cell) else None
    if result is None:
        return Outcome(cell, run.path, None, lost)
    environment = read_json(run.environment, Environment)
    try:
        vocabulary = environment.initial_weights["token_embedding.weight"].shape[0]
    except LookupError:
        raise InputError(f"{run.environment}: is damaged") from None
    entropy = environment.unigram_entropy
    records = metrics.read(run.metrics)
    updates = [r["step"] for r in records if {"loss", "grad_norm", "batches"} <= r.keys()]
    evaluated = [r["step"] for r in records if "val_loss" in r]
    made = len(updates)
    if updates != list(range(1, made + 1)) or made > result.step:
        raise InputError(f"{run.metrics}: is damaged: its steps are not 1 to {result.step}")
    whole = made == result.step and evaluated[-1:] == [result.step]
    if result.status == "finished" and not whole:
        raise InputError(f"{run.metrics}: is damaged: it does not hold all {result.step} steps")
    events = [result.reason] if result.reason.startswith("given up") else []
    if result.skipped_updates:
        events.append(f"{result.skipped_updates} updates skipped")
    if result.rollbacks:
        events.append(f"rolled back {result.rollbacks} times")
    failure = result.failure
    place = failure.place if failure is not None else None
    found = verdict(
        records,
        unigram_entropy=entropy,
        diverged_at=result.step if result.status == "diverged" else None,
        diverged_layer=place.layer if place is not None else None,
        reason=result.reason if result.status == "diverged" else "",
        clip=cell.config.optimizer.clip,
    )
    return Outcome(
        cell,
        run.path,
        replace(found, reason="; ".join([found.reason, *events])),
        seconds=result.seconds,
        unigram_entropy=entropy,
        environment=environment.model_dump(),
        batches={r["step"]: r["batches"] for r in records if "batches" in r},
        vocabulary=vocabulary,
        extremes=_extremes(records),
    )


# The worst of each measure of the layers: column of cells.csv -> (key of a record, which of all).
EXTREMES: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "max_attention_logit": ("attention_logit", max),
    "min_attention_entropy": ("attention_entropy", min),
    "max_update_ratio": ("update_ratio", max),
    "max_grad_over_root_v": ("grad_over_root_v", max),
    "min_grad_over_eps": ("grad_over_eps", min),
    "max_stream_rms": ("stream_rms", max),
}


def _extremes(records: Sequence[metrics.Record]) -> dict[str, float]:
    found = {}
    for column, (key, worst) in EXTREMES.items():
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            found[column] = worst(values)
    return found


# ---------------------------------------------------------------------------------------------
# Whether the arms were matched


@dataclass(frozen=True)
class Match:
    """What cells of one seed and place had in common, counted over all pairs with the first arm's.

    Attributes:
        cells: cells whose inputs were held against another's.
        same_batches: those that saw the same inputs, as far as both went.
        parameters: parameters that both have, by name and shape.
        equal: those that started with the same numbers.
        rescaled: those that started from the same draw at another scale.
        exceptions: what did not match, in words.
    """

    cells: int
    same_batches: int
    parameters: int
    equal: int
    rescaled: int
    exceptions: tuple[str, ...]


def match(outcomes: Sequence[Outcome]) -> Match:
    """Hold every cell against the first one of its seed and place."""
    first: dict[str, Outcome] = {}
    cells = same = parameters = equal = rescaled = 0
    exceptions = []
    for outcome in outcomes:
        if outcome.verdict is None or not outcome.batches:  # diverged before its first update
            continue
        key = repr((outcome.seed, outcome.cell.place))
        other = first.setdefault(key, outcome)
        if other is outcome:
            continue
        names = f"{outcome.cell.id} and {other.cell.id}"
        mine, theirs = outcome.batches, other.batches or {}
        cells += 1
        step = max(mine.keys() & theirs.keys())
        same += mine[step] == theirs[step]
        if mine[step] != theirs[step]:
            exceptions.append(f"{names} saw other batches")
        for fact in SAME_FACTS:
            one, two = (_fact(each, fact) for each in (outcome, other))
            if one != two:
                exceptions.append(f"{names} differ in {fact}: {one} and {two}")
        ours, others = (_fact(each, "initial_weights") for each in (outcome, other))
        for name in ours.keys() & others.keys():
            a, b = ours[name], others[name]
            if a["shape"] != b["shape"]:
                continue
            parameters += 1
            equal += a["sha256"] == b["sha256"]
            rescaled += a["sha256"] != b["sha256"] and a["signs"] == b["signs"]
            if a["signs"] != b["signs"]:
                exceptions.append(f"{names} start with other numbers in {name}")
    return Match(cells, same, parameters, equal, rescaled, tuple(exceptions))


SAME_FACTS = ("data_fingerprint", "device", "torch", "git_commit")


def _fact(outcome: Outcome, name: str) -> Any:
    environment = outcome.environment or {}
    return {**environment, **environment.get("versions", {})}.get(name)


# ---------------------------------------------------------------------------------------------
# cells.csv


def csv_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row a cell: its id, arm, factors and seed, and what became of it."""
    rows = []
    for outcome in outcomes:
        found, cell = outcome.verdict, outcome.cell
        row: dict[str, Any] = {"id": cell.id, **cell.factors, "seed": outcome.seed}
        row |= {"arm": cell.arm, "status": outcome.status}
        if found is None:
            rows.append(row | {"reason": outcome.lost.reason if outcome.lost else "not run"})
            continue
        rows.append(
            row
            | {
                "diverged_at": found.step if found.status == "diverged" else None,
                "final_val_loss": found.final_val_loss,
                "best_val_loss": found.best_val_loss,
                "spikes": found.loss_spikes,
                "max_grad_norm": found.max_grad_norm,
                "seconds": round(outcome.seconds, 2),
                "failed": found.failed,
                "seen_at": found.step,
                "layer": found.layer,
                "initial_val_loss": found.initial_loss,
                "capped_loss": outcome.loss,
                "final_train_loss": found.final_train_loss,
                "spike_score": found.loss_spike_score,
                "grad_norm_spikes": found.grad_spikes,
                "grad_norm_spike_score": found.grad_spike_score,
                "clipped": found.clipped,
                "steps": found.steps,
                "reason": found.reason,
                **outcome.extremes,
            }
        )
    return rows
