"""How a run diverged, as recorded in its result.json; failure.py finds the place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from gpt.io.files import Natural
from gpt.metrics import MAX_LAYERS


@dataclass(frozen=True)
class FaultLocation:
    """Where the first non-finite value arose.

    Attributes:
        quantity: weight, activation, logit, loss, gradient or gradient norm.
        layer: 0 for the embeddings, 1 ... L for the blocks, L + 1 for the final norm, the head and
            the loss.
        name: of the module or parameter, such as blocks.2.mlp.up.
    """

    quantity: str
    layer: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    name: str


@dataclass(frozen=True)
class Failure:
    """How a run diverged.

    Attributes:
        step: the update at which it was first observed; 0 before the first update.
        quantity: what was non-finite: training loss, gradient norm, weight or validation loss.
        place: where in the network the first non-finite value arose; None if it did not arise
            again when the step was repeated.
        advice: what to try next, the most promising first.
    """

    step: Natural
    quantity: str
    place: FaultLocation | None
    advice: tuple[str, ...]
