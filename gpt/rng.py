"""Randomness as a function of (seed, purpose, ...), without hidden state to save or disturb.

Every random number of a run comes from a seed derived here. So evaluation cannot change what
training draws, a resumed run draws the same numbers as an uninterrupted one, and two runs that
differ in one option draw the same numbers for everything that the option does not affect.
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
    return torch.Generator(device).manual_seed(derive(*key))


_GLOBAL = threading.Lock()  # held while a thread draws from them


@contextlib.contextmanager
def global_generators_restored(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators, the CPU's and the device's, after a `with` block.

    The constructors of torch's modules draw from these generators and accept no others. A lock
    admits one thread at a time.
    """
    with _GLOBAL, torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
