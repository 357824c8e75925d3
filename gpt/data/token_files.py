"""Token files of a prepared corpus: the ids, what a file contains, and whether it is unchanged.

Files that other programs wrote are read by sources/foreign_tokens.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt.data import tokenizer
from gpt.data.tokenizer import Encoding
from gpt.errors import InputError
from gpt.io.files import Natural, open_regular

Tokens = npt.NDArray[np.integer[Any]]  # token ids

FROM_SCRATCH = "the next run prepares the data from scratch"  # as the damaged folder is deleted
BLOCK = 2**22  # tokens read at a time
REHASH = 2**30  # bytes; a larger token file is hashed again only if its modification time changed


@dataclass(frozen=True)
class TokenFile:
    """What one token file contains.

    Attributes:
        name: train, train-0, ... or val; the file is `name`.bin.
        documents: their number.
        tokens: their number, including the end of text after each document.
        bytes: UTF-8 bytes of the text.
        longest: tokens of the longest document, without end of text.
        size: of the file in bytes.
        sha256: of the file.
        time: modification time in nanoseconds.
    """

    name: str
    documents: Natural
    tokens: Natural
    bytes: Natural
    longest: Natural
    size: Natural
    sha256: str
    time: int


def summarize(
    path: Path, dtype: np.dtype[Any], encoding: Encoding, counts: npt.NDArray[np.int64]
) -> TokenFile:
    """What a token file contains; adds the number of occurrences of each token to `counts`."""
    digest = hashlib.sha256()
    at = start = longest = 0  # where this block begins, and where the document there begins
    with path.open("rb") as file:
        for block in _blocks(file, dtype, digest):
            if block.max() >= len(counts):  # altered after an interrupted run had written it
                raise InputError(
                    f"{path}: is damaged: it contains the id {block.max()}, outside the vocabulary "
                    f"of {len(counts)} tokens; {FROM_SCRATCH}"
                )
            counts += np.bincount(block, minlength=len(counts))
            ends = at + np.flatnonzero(block == encoding.eot_token)
            if len(ends):
                longest = max(longest, int(np.diff(ends, prepend=start - 1).max()) - 1)
                start = int(ends[-1]) + 1
            at += len(block)
    stat = path.stat()
    return TokenFile(
        name=path.stem,
        documents=int(counts[encoding.eot_token]),
        tokens=at,
        bytes=int(counts @ np.array(tokenizer.byte_lengths(encoding))),
        longest=longest,
        size=stat.st_size,
        sha256=digest.hexdigest(),
        time=stat.st_mtime_ns,
    )


def check_size(path: Path, size: int) -> None:
    """Check the size of a file in bytes.

    Raises:
        ValueError: the size differs from `size`.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
    if found != size:
        raise ValueError(f"{path.name} has {found:,} bytes instead of {size:,}")


def verify(path: Path, file: TokenFile, dtype: np.dtype[Any], vocabulary: int) -> None:
    """Check a token file against its description; a large one is hashed only if its time changed.

    Raises:
        ValueError: it has changed since it was written, or contains an id outside the vocabulary.
    """
    check_size(path, file.size)
    if file.size != file.tokens * dtype.itemsize or not file.longest <= file.tokens > 0:
        raise ValueError(f"meta.json: the sizes of {path.name} are inconsistent")
    if file.size > REHASH and path.stat().st_mtime_ns == file.time:
        return
    digest = hashlib.sha256()
    with open_regular(path) as opened:
        largest = max((int(block.max()) for block in _blocks(opened, dtype, digest)), default=0)
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"{path.name} has changed since it was written")
    if largest >= vocabulary:
        raise ValueError(f"{path.name} contains the id {largest}, outside the vocabulary")


def _blocks(file: BinaryIO, dtype: np.dtype[Any], digest: Any) -> Iterator[Tokens]:
    """The ids of a file, a block at a time; adds the bytes of each block to `digest`."""
    while raw := file.read(BLOCK * dtype.itemsize):
        digest.update(raw)
        yield np.frombuffer(raw, dtype)
