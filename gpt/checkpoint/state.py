"""What state.json of a checkpoint holds: all that a run knows of itself beside its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gpt.checkpoint import Checkpoint
from gpt.errors import InputError

FORMAT = 4


Natural = Annotated[int, Field(ge=0, le=2**53)]
Time = Annotated[float, Field(ge=0, le=1e100)]
Loss = Annotated[float, Field(ge=-1e100, le=1e100)] | None


@dataclass
class Progress:
    """How far a run is, and what it has seen and met."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: Natural = 0
    seconds: Time = 0.0  # wall clock
    update_seconds: Time = 0.0  # of it, in updates
    train_loss: Loss = None
    val_loss: Loss = None
    val_bits_per_byte: Loss = None
    best_val_loss: Loss = None  # of all evaluations
    best_saved_val_loss: Loss = None  # of those whose step was saved: `best`
    batches: str = ""  # SHA-256 of this field one batch ago, and of the batch: all that was seen
    idle: Natural = 0  # evaluations in a row at which it knew no more than token frequencies
    skipped: Natural = 0  # updates, for what was not finite
    skipped_in_a_row: Natural = 0
    forked_at: Natural = 0  # the step that this directory, or its last extension, began with
    rollbacks: Natural = 0
    pending: bool = False  # what was due after this step was cut short by a stop, and is made again
    passed_over: Natural = 0  # batches, in rollbacks: update n sees batch n + passed_over


@dataclass
class State:
    """What state.json holds.

    Attributes:
        step: updates made.
        scaler: state of fp16's loss scaler; empty without one.
        micro_batch: sequences of one forward pass.
        best: whether its validation loss was the lowest of those saved so far.
        data_fingerprint: of the token files that it was trained on.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: Natural
    progress: Progress
    scaler: dict[str, float | int]
    micro_batch: Annotated[int, Field(ge=1, le=2**31)]
    best: bool
    data_fingerprint: str
    format: int = FORMAT


_STATE = TypeAdapter(State)


def read_state(checkpoint: Checkpoint) -> State:
    """The state in a checkpoint.

    Raises:
        InputError: it is of another format, or none.
    """
    found = checkpoint.state.get("format")
    if found != FORMAT:
        raise InputError(f"{checkpoint.name}: state.json: format is {found!r}, not {FORMAT}")
    try:
        state = _STATE.validate_json(json.dumps(checkpoint.state))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{checkpoint.name}: state.json: {where}: {first['msg']}") from None
    counts = state.progress
    if not counts.skipped_in_a_row <= counts.skipped <= counts.step == state.step:
        raise InputError(f"{checkpoint.name}: state.json: its counts of updates do not agree")
    return state
