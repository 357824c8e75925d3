"""Checkpoints: everything a run needs in order to resume, written atomically and verified.

    store.py    what a checkpoint folder holds: writing, verifying and reading it
    state.py    state.json: all that resuming needs besides the tensors
    manager.py  when a run saves, which checkpoint is its best, and which are deleted
    weights.py  loading weights into a model

`python -m gpt.checkpoint verify DIR` checks every checkpoint in a folder.
"""

from gpt.checkpoint.store import (
    FILES,
    MANIFEST,
    POINTERS,
    STEP_NAME,
    BackgroundWriter,
    Checkpoint,
    PrunedError,
    is_intact,
    load,
    manifest_text,
    named,
    newest_intact,
    prune,
    read_pointer,
    reading,
    save,
    save_tensors,
    set_aside,
    steps,
    verify,
    write_pointers,
)

__all__ = [
    "FILES",
    "MANIFEST",
    "POINTERS",
    "STEP_NAME",
    "BackgroundWriter",
    "Checkpoint",
    "PrunedError",
    "is_intact",
    "load",
    "manifest_text",
    "named",
    "newest_intact",
    "prune",
    "read_pointer",
    "reading",
    "save",
    "save_tensors",
    "set_aside",
    "steps",
    "verify",
    "write_pointers",
]
