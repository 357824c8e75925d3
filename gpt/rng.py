"""Randomness as a function of (seed, purpose, ...): there is no hidden state to save or disturb.

Every random number in the program comes from a seed derived here, so that evaluation cannot shift
training, a resumed run draws what the undisturbed run would have drawn, and two runs that differ in
one option share everything that the option does not touch.
"""

from __future__ import annotations

import hashlib

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
