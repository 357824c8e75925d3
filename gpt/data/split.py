"""Training or validation: the token file that each piece of a document goes to.

With data.validation, the two have sources of their own. Otherwise data.holdout "documents" assigns
whole documents by a hash of their text, and "tail" holds out the end of each document, which is the
only way to split a single one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from gpt.config import DataConfig
from gpt.data.cache import PlannedSource
from gpt.data.sources import SOURCES
from gpt.data.sources.document import Document, OnRead
from gpt.data.token_files import Tokens

Piece = str | Tokens
HASHED = 2**20  # characters or tokens at the beginning of a document that determine its split


class Item(NamedTuple):
    """A piece of a document, the name of its token file, and whether the document ends with it."""

    target: str
    piece: Piece
    last: bool


def split_documents(
    config: DataConfig,
    sources: list[PlannedSource],
    on_read: OnRead,
    end_of_text: int,
    on_skip: Callable[[str], None] = lambda origin: None,
) -> Iterator[Item]:
    """Every piece of every document with its token file, always in the same order.

    Args:
        on_read: called with the number of bytes read.
        end_of_text: id of the token that separates documents in files of token ids.
        on_skip: called with the position of each record without text.
    """
    tail = config.validation is None and holds_out_tail(config, sources, end_of_text)
    for source in sources:
        kind = SOURCES[source.config.source]
        for document in kind.documents(source.config, source.files, on_read, end_of_text):
            if document.skipped is not None:
                on_skip(document.skipped)
            elif config.validation is not None:
                yield from _to_one(source.target, document.pieces)
            elif tail:
                yield from _by_tail(source.target, document, config.val_fraction)
            else:
                yield from _by_hash(source.target, document, config.val_fraction)


def holds_out_tail(config: DataConfig, sources: list[PlannedSource], end_of_text: int) -> bool:
    """Whether the end of each document is held out: if so configured, or if there is only one.

    A dataset on the hub, which has no files here, is assumed to have several documents.
    """
    if config.holdout == "tail" or not all(source.files for source in sources):
        return config.holdout == "tail"
    documents = (
        document
        for source in sources
        for document in SOURCES[source.config.source].documents(
            source.config, source.files, lambda count: None, end_of_text
        )
        if document.skipped is None and any(True for _ in itertools.islice(document.pieces, 1))
    )
    return len(list(itertools.islice(documents, 2))) == 1


def _to_one(target: str, pieces: Iterable[Piece]) -> Iterator[Item]:
    """Assign all pieces to one token file."""
    before: Piece | None = None
    for piece in pieces:
        if before is not None:
            yield Item(target, before, False)
        before = piece
    if before is not None:
        yield Item(target, before, True)


def _by_hash(target: str, document: Document, fraction: float) -> Iterator[Item]:
    """Assign the whole document by a hash of its beginning, whatever the other documents are."""
    pieces: Iterator[Piece] = iter(document.pieces)
    beginning: list[Piece] = []
    length, digest = 0, hashlib.sha256()
    for piece in pieces:
        beginning.append(piece)
        digest.update(piece.encode() if isinstance(piece, str) else piece.astype("<u4").data)
        length += len(piece)
        if length >= HASHED:
            break
    held_out = int.from_bytes(digest.digest()[:8], "little") < fraction * 2**64
    yield from _to_one("val" if held_out else target, itertools.chain(beginning, pieces))


def _by_tail(target: str, document: Document, fraction: float) -> Iterator[Item]:
    """Assign the last `fraction` of a document, in UTF-8 bytes or in tokens, to validation."""
    left = int(document.size() * (1 - fraction))
    pieces: Iterator[Piece] = iter(document.pieces)
    remainder: list[Piece] = []  # of the piece that is cut in two

    def training() -> Iterator[Piece]:
        nonlocal left
        for piece in pieces:
            size = size_of(piece)
            if size <= left:
                left -= size
                yield piece
                continue
            cut = _cut(piece, left)
            if len(piece[:cut]):
                yield piece[:cut]
            remainder.append(piece[cut:])
            return

    yield from _to_one(target, training())
    yield from _to_one("val", itertools.chain(remainder, pieces))


def size_of(piece: Piece) -> int:
    """UTF-8 bytes of a text, or number of token ids."""
    if not isinstance(piece, str) or piece.isascii():
        return len(piece)
    return len(piece.encode())


def _cut(piece: Piece, size: int) -> int:
    """The index at which the first `size` bytes or tokens of `piece` end, between characters."""
    if not isinstance(piece, str) or piece.isascii():
        return size
    return len(piece.encode()[:size].decode(errors="ignore"))
