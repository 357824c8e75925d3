"""The outcome of each cell, read from its run directory.

Everything comes from files that training wrote, so a report can be made on another machine, and
again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from gpt import metrics
from gpt.compare.analysis.statistics import capped
from gpt.compare.analysis.verdicts import Verdict, verdict
from gpt.compare.execution.cell_runs import CellError, cell_directory, has_result
from gpt.compare.grid import Cell
from gpt.errors import InputError
from gpt.io.files import read_json
from gpt.metrics import LEARNED_MARGIN
from gpt.run.directory import RunDirectory

NO_RESULT = "no cell has a result yet"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        verdict: None for a cell without a result.
        error: why it has no result; None if it has one, or was not run.
        seconds: wall-clock time.
        unigram_entropy: H₁, nats per token.
        environment: environment.json.
        inputs: number of sequences -> digest of the inputs up to the last of them.
        vocabulary: V, tokens.
        extremes: the worst value of each measure in EXTREMES; empty without diagnostics.
        too_slow: see `is_too_slow`.
    """

    cell: Cell
    directory: Path
    verdict: Verdict | None
    error: CellError | None = None
    seconds: float = 0.0
    unigram_entropy: float = 0.0
    environment: dict[str, Any] | None = None
    inputs: dict[int, str] | None = None
    vocabulary: int = 2
    extremes: dict[str, float] = field(default_factory=dict)
    too_slow: bool = False

    @property
    def status(self) -> str:
        """The status of the verdict, or of the error that prevented one."""
        if self.verdict is not None:
            return self.verdict.status
        return self.error.status if self.error is not None else "missing"

    @property
    def reason(self) -> str:
        """The reason for the status, in words."""
        if self.verdict is not None:
            return self.verdict.reason
        return self.error.reason if self.error is not None else "not run"

    @property
    def failed(self) -> bool:
        """Whether training failed; false for a cell without a result."""
        return self.verdict is not None and self.verdict.failed

    def failed_at(self, margin: float) -> bool:
        """Whether it would have failed with `margin` nats below H₁ instead of LEARNED_MARGIN."""
        found = self.verdict
        if found is None or found.final_val_loss is None:
            return self.failed
        return found.fell_back or found.final_val_loss >= self.unigram_entropy - margin

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
        """Final validation loss, at most `uniform_loss`, which a diverged run has."""
        assert self.verdict is not None
        return capped(self.verdict.final_val_loss, self.uniform_loss)

    @property
    def uniform_loss(self) -> float:
        """Ln V, the loss of a uniform guess."""
        return math.log(self.vocabulary)

    @property
    def initial_loss(self) -> float:
        """Validation loss before the first update; ln V if it was not finite."""
        assert self.verdict is not None
        initial = self.verdict.initial_loss
        return self.uniform_loss if initial is None else initial


class Weight(BaseModel):
    """The fingerprint of a parameter in environment.json; see gpt.model.init.fingerprints."""

    shape: list[PositiveInt]
    sha256: str
    signs: str


class Environment(BaseModel):
    """The facts of environment.json that a report needs; all others are shown unchanged."""

    model_config = ConfigDict(extra="allow")
    versions: dict[str, str]
    unigram_entropy: Annotated[float, Field(ge=0, le=1000)]
    initial_weights: dict[str, Weight]


def read_outcome(cell: Cell, directory: Path, error: CellError | None = None) -> Outcome:
    """The outcome of a cell, from its run directory.

    Raises:
        InputError: the directory holds a run of another config, or a file in it is damaged.
    """
    run = RunDirectory(cell_directory(directory, cell))
    result = run.read_result() if has_result(directory, cell) else None
    if result is None:
        return Outcome(cell, run.path, None, error)
    environment = read_json(run.environment, Environment)
    try:
        vocabulary = environment.initial_weights["token_embedding.weight"].shape[0]
    except LookupError:
        raise InputError(f"{run.environment}: is damaged") from None
    records, batch = metrics.read(run.metrics), cell.config.batch_sequences
    updates = [r["step"] for r in records if {"loss", "grad_norm", "batches"} <= r.keys()]
    evaluated = [r["step"] for r in records if "val_loss" in r]
    made = len(updates)
    if updates != list(range(1, made + 1)) or made > result.step:
        raise InputError(f"{run.metrics}: is damaged: its steps are not 1 to {result.step}")
    complete = made == result.step and evaluated[-1:] == [result.step]
    if result.status == "finished" and not complete:
        raise InputError(f"{run.metrics}: is damaged: it does not hold all {result.step} steps")
    events = [result.reason] if result.gave_up else []
    if result.skipped_updates:
        events.append(f"{result.skipped_updates} updates skipped")
    if result.rollbacks:
        events.append(f"rolled back {result.rollbacks} times")
    failure = result.failure
    place = failure.place if failure is not None else None
    found = verdict(
        records,
        unigram_entropy=environment.unigram_entropy,
        planned=cell.config.training.steps,
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
        unigram_entropy=environment.unigram_entropy,
        environment=environment.model_dump(),
        inputs={r["step"] * batch: r["batches"] for r in records if "batches" in r},
        vocabulary=vocabulary,
        extremes=_extremes(records),
        too_slow=is_too_slow(found, environment.unigram_entropy, records),
    )


def is_too_slow(found: Verdict, unigram_entropy: float, records: Sequence[metrics.Record]) -> bool:
    """Whether a run plateaued only because its rate was too low for its number of steps.

    One that is stuck has learned token frequencies, and stays at H₁. One that is too slow has not
    come down to H₁ yet, and its training loss falls throughout: the mean of the last quarter is
    below that of the second by more than a standard error, with batches as independent draws. This
    test is weaker than that of `Verdict.slow`, which does not require a loss above H₁.
    """
    losses = np.array([r["loss"] for r in records if "loss" in r and not r.get("skipped")])
    quarter = len(losses) // 4
    if found.status != "plateaued" or found.final_val_loss is None or quarter < 2:
        return False
    before, last = losses[quarter : 2 * quarter], losses[-quarter:]
    error = math.sqrt((before.var(ddof=1) + last.var(ddof=1)) / quarter)
    falls = bool(before.mean() - last.mean() > error)
    return falls and found.final_val_loss > unigram_entropy + LEARNED_MARGIN


# Measure of the layers -> which of its values is the worst.
EXTREMES: dict[str, Callable[[list[float]], float]] = {
    "attention_logit": max,
    "attention_entropy": min,
    "update_ratio": max,
    "grad_over_root_v": max,
    "grad_over_eps": min,
    "stream_rms": max,
    "sharpness": max,
    "preconditioned_sharpness": max,
}


def _extremes(records: Sequence[metrics.Record]) -> dict[str, float]:
    found = {}
    for key, worst in EXTREMES.items():
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            found[key] = worst(values)
    return found


# Columns of cells.csv of a cell with a result, in order.
RESULT_COLUMNS: dict[str, Callable[[Outcome, Verdict], Any]] = {
    "diverged_at": lambda _, v: v.step if v.status == "diverged" else None,
    "final_val_loss": lambda _, v: v.final_val_loss,
    "best_val_loss": lambda _, v: v.best_val_loss,
    "spikes": lambda _, v: v.loss_spikes,
    "max_grad_norm": lambda _, v: v.max_grad_norm,
    "seconds": lambda o, _: round(o.seconds, 2),
    "failed": lambda _, v: v.failed,
    "seen_at": lambda _, v: v.step,
    "layer": lambda _, v: v.layer,
    "initial_val_loss": lambda _, v: v.initial_loss,
    "capped_loss": lambda o, _: o.loss,
    "final_train_loss": lambda _, v: v.final_train_loss,
    "spike_score": lambda _, v: v.loss_spike_score,
    "grad_norm_spikes": lambda _, v: v.grad_spikes,
    "grad_norm_spike_score": lambda _, v: v.grad_spike_score,
    "clipped": lambda _, v: v.clipped,
    "steps": lambda _, v: v.steps,
    "still_falling": lambda _, v: v.still_falling,
    "early_rise": lambda _, v: v.early_rise,
}
# Column -> measure of the layers; a column is left out if no cell has it.
WORST_COLUMNS = {f"{worst.__name__}_{measure}": measure for measure, worst in EXTREMES.items()}


def column_value(outcome: Outcome, column: str) -> float | None:
    """A number in a column of cells.csv; None where the field is empty."""
    if column in WORST_COLUMNS:
        return outcome.extremes.get(WORST_COLUMNS[column])
    assert outcome.verdict is not None
    value = RESULT_COLUMNS[column](outcome, outcome.verdict)
    return None if value is None else float(value)
