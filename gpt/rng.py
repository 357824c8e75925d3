"""Randomness as a function of (seed, purpose, ...): there is no hidden state to save or disturb.

Every random number in the program comes from a seed derived here, so that evaluation cannot shift
training, a resumed run draws what the undisturbed run would have drawn, and two runs that differ in
one option share everything that the option does not touch.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import torch


def derive(*key: int | str) -> int:
    """A 63-bit seed from a key such as `(seed, "dropout", step)`; stable across versions."""
    digest = hashlib.sha256("\x00".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded from `key`."""
    made = torch.Generator(device)
    made.manual_seed(derive(*key))
    return made


_GLOBAL = threading.Lock()  # held by the thread that draws from torch's global generators


@contextlib.contextmanager
def global_generator(device: torch.device, *key: int | str) -> Iterator[None]:
    """Seed torch's global generators from `key` within a block, and leave them as they were.

    Dropout and the constructors of torch's modules draw from these generators and accept no other.
    One thread at a time is inside, so that runs in several threads of a process do not draw each
    other's numbers.

    Args:
        device: whose generator is used, beside the CPU's.
        key: as of `derive`; without one the generators are only put back.
    """
    devices = [device] if device.type == "cuda" else []
    with _GLOBAL, torch.random.fork_rng(devices):
        if key:
            torch.default_generator.manual_seed(derive(*key))
        if key and devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive(*key))
        yield
