"""What state.json of a checkpoint holds: all that a run knows of itself beside its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gpt.checkpoint import Checkpoint
from gpt.errors import InputError

FORMAT = 4


@dataclass
class Progress:
    """How far a run is, and what it has seen and met."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int = 0
    seconds: float = 0.0  # wall clock
    update_seconds: float = 0.0  # of it, in updates
    train_loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    best_val_loss: float | None = None  # of all evaluations
    best_saved_val_loss: float | None = None  # of those whose step was saved: `best`
    batches: str = ""  # SHA-256 of this field one batch ago, and of the batch: all that was seen
    idle: int = 0  # evaluations in a row at which it knew no more than token frequencies
    skipped: int = 0  # updates, for what was not finite
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    passed_over: int = 0  # batches, in rollbacks: update n sees batch n + passed_over


@dataclass
class State:
    """What state.json holds.

    Attributes:
        step: updates made.
        scaler: state of fp16's loss scaler; empty without one.
        micro_batch: sequences of one forward pass.
        data_fingerprint: of the token files that it was trained on.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int
    progress: Progress
    scaler: dict[str, float | int]
    micro_batch: Annotated[int, Field(ge=1)]
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
        raise InputError(f"{checkpoint.name}: has format {found!r}, this program has {FORMAT}")
    try:
        return _STATE.validate_json(json.dumps(checkpoint.state))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{checkpoint.name}: state.json: {where}: {first['msg']}") from None
