"""Files written whole or not at all, flushed to disk, and told apart by size and SHA-256.

Checkpoints, run directories and prepared data all stand on these few functions.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(contents)
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def flush(path: Path) -> None:
    """Flush a file or folder to disk (folders cannot be opened on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
