"""Checkpoints: everything a run needs in order to resume, written atomically and verified.

    store.py    what a checkpoint folder holds: writing, verifying and reading it

`python -m gpt.checkpoint verify DIR` checks every checkpoint in a folder.
"""

from gpt.checkpoint.store import (
    FILES,
    MANIFEST,
    STEP_NAME,
    BackgroundWriter,
    Checkpoint,
    PrunedError,
    is_intact,
    load,
    manifest_text,
    newest_intact,
    prune,
    read_pointer,
    reading,
    save,
    set_aside,
    steps,
    verify,
    write_pointers,
)

__all__ = [
    "FILES",
    "MANIFEST",
    "STEP_NAME",
    "BackgroundWriter",
    "Checkpoint",
    "PrunedError",
    "is_intact",
    "load",
    "manifest_text",
    "newest_intact",
    "prune",
    "read_pointer",
    "reading",
    "save",
    "set_aside",
    "steps",
    "verify",
    "write_pointers",
]
