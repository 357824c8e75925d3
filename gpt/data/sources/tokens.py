"""Files of token ids, as nanoGPT writes them: documents are separated by end of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.config import SourceConfig
from gpt.data.sources.document import Document, OnRead
from gpt.data.sources.foreign_tokens import open_ids
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import PIECE
from gpt.errors import InputError

BLOCK = 2**17  # ids searched for end of text at a time


def documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """The token ids between two end-of-text tokens, whose id is `end`; empty documents are dropped.

    Raises:
        InputError: names the file, and the id that is not in the vocabulary.
    """
    for path in files:
        ids = open_ids(path, config.dtype, end + 1)
        start = 0
        for stop in _ends(ids, end, path):
            if stop > start:
                yield Document(_pieces(ids[start:stop], on_read), (stop - start).__index__)
            start = stop + 1


def _pieces(ids: Tokens, on_read: OnRead) -> Iterator[Tokens]:
    for start in range(0, len(ids), PIECE):
        piece = ids[start : start + PIECE]
        on_read(piece.nbytes)
        yield piece.astype(np.uint32)


def _ends(ids: Tokens, end: int, path: Path) -> Iterator[int]:
    """The position of each end of text, and of the end of the file."""
    position = -1
    for at in range(0, len(ids), BLOCK):
        block = ids[at : at + BLOCK]
        for position in (at + np.flatnonzero((block >= end) | (block < 0))).tolist():
            if ids[position] != end:
                raise InputError(
                    f"{path}: token {position:,} is {ids[position]}, outside the vocabulary of "
                    f"{end + 1:,};\n"
                    "data.tokenizer and data.dtype must be those with which the file was written"
                )
            yield position
    if position != len(ids) - 1:
        yield len(ids)
