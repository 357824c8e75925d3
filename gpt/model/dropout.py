"""Dropout whose random numbers belong to a sequence, whatever else is in its micro-batch.

torch's dropout draws one mask for a whole batch. Here every sequence draws from a generator of its
own, so that a run does not depend on the micro-batch, nor on how processes share a batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_drawing = threading.local()  # .generators, within `drawing_from`


@contextlib.contextmanager
def drawing_from(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """A context in which dropout draws the masks of sequence i from `generators[i]`.

    It holds for this thread. Outside of it, dropout draws from torch's global generator.
    """
    before = getattr(_drawing, "generators", None)
    _drawing.generators = generators
    try:
        yield
    finally:
        _drawing.generators = before


class Dropout(nn.Module):
    """In training, zeroes each number with probability p, and divides the others by 1 - p.

    Srivastava et al. 2014.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), for the B sequences of a micro-batch."""
        if not self.training or self.p == 0:
            return x
        return x * _kept(x, 1 - self.p) / (1 - self.p)

    def extra_repr(self) -> str:
        """The probability, when the model is printed."""
        return f"p={self.p}"


def _kept(x: Tensor, probability: float) -> Tensor:
    """Booleans of the shape of x, each true with that probability."""
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    generators = getattr(_drawing, "generators", None)
    if generators is None:
        return kept.bernoulli_(probability)
    for sequence, generator in zip(kept, generators, strict=True):
        sequence.bernoulli_(probability, generator=generator)
    return kept
