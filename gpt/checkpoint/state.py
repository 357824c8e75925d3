"""state.json of a checkpoint: all that resuming a run needs besides the tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gpt.checkpoint import Checkpoint
from gpt.errors import InputError, option
from gpt.io.files import Loss, Natural, Time

FORMAT = 5


@dataclass
class Progress:
    """How far a run has come, and what has happened on the way."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: Natural = 0
    seconds: Time = 0.0  # wall clock
    update_seconds: Time = 0.0  # the part of `seconds` spent in updates
    train_loss: Loss = None
    val_loss: Loss = None
    val_bits_per_byte: Loss = None
    best_val_loss: Loss = None  # of all evaluations
    best_saved_val_loss: Loss = None  # of all saved steps: the loss of `best`
    inputs_digest: str = ""  # SHA-256 of its previous value and the newest sequence
    stalled_evals: Natural = 0  # evaluations in a row no better than guessing by token frequency
    evals_since_best: Natural = 0  # evaluations in a row without a new lowest validation loss
    skipped_updates: Natural = 0  # updates that were not finite
    skipped_in_a_row: Natural = 0
    start_step: Natural = 0  # where this directory started, or training.steps was last raised
    rewarm_from: tuple[Natural, Time] | None = None  # last step and rate before schedule.rewarm
    rollbacks: Natural = 0
    pending: bool = False  # a stop interrupted what was due after this step; a resumed run does it
    skipped_batches: Natural = 0  # by rollbacks: update n sees batch n + skipped_batches
    protected_steps: tuple[Natural, ...] = ()  # of checkpoints kept under earlier options


@dataclass
class State:
    """The contents of state.json.

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
        InputError: it has another format, or is damaged.
    """
    found = checkpoint.state.get("format")
    if type(found) is int and 0 < found < FORMAT:
        raise InputError(
            f"{checkpoint.name}: was saved by an earlier version of steadygpt, and this one cannot "
            "resume it;\nsample.py still reads it; train with that version, or in another "
            f"{option('out_dir')}"
        )
    if found != FORMAT:
        raise InputError(f"{checkpoint.name}: state.json: format is {found!r}, not {FORMAT}")
    try:
        state = _STATE.validate_json(json.dumps(checkpoint.state))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{checkpoint.name}: state.json: {where}: {first['msg']}") from None
    counts = state.progress
    if not counts.skipped_in_a_row <= counts.skipped_updates <= counts.step == state.step:
        raise InputError(f"{checkpoint.name}: state.json: its update counts are inconsistent")
    return state
