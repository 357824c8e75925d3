"""Encoding documents in order and in bounded memory: a corpus on all cores, or one text."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.config import SourceConfig
from gpt.data import tokenizer
from gpt.data.sources import SOURCES
from gpt.data.sources.document import OnRead
from gpt.data.split import Item
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import Encoding

JOB = 2**17  # characters or tokens that a worker gets at a time; larger jobs were slower
Encoded = tuple[int, dict[str, Tokens]]  # number of items, and their ids by token file


def encode_items(
    items: Iterable[Item], encoding: Encoding, dtype: np.dtype[Any]
) -> Generator[Encoded]:
    """Encode items on all cores, a job at a time and in order.

    Raises:
        InputError: the tokenizer lacks a character.
    """
    local = threading.local()  # one encoding per thread: threads that share one wait for each other

    def begin() -> None:
        local.encoding = tokenizer.copy(encoding)

    def encode(job: list[Item]) -> Encoded:
        return encode_job(job, local.encoding, dtype)

    most = 2 * workers()  # jobs in memory: enough to keep the workers busy
    pool = ThreadPoolExecutor(workers(), initializer=begin)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for job in _jobs(items):
            waiting.append(pool.submit(encode, job))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def workers() -> int:
    """Threads that encode: one per core, up to 16, since each has an encoding (gpt2: 11 MB)."""
    return min(os.cpu_count() or 1, 16)


def _jobs(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of about `JOB` characters or tokens."""
    job: list[Item] = []
    size = 0
    for item in items:
        job.append(item)
        size += len(item.piece)
        if size >= JOB:
            yield job
            job, size = [], 0
    if job:
        yield job


def encode_job(job: list[Item], encoding: Encoding, dtype: np.dtype[Any]) -> Encoded:
    """Encode the items of one job; most of the time the GIL is released."""
    end = np.array([encoding.eot_token], np.uint32)
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for target, piece, last in job:
        part = parts.setdefault(target, [])
        if isinstance(piece, str):
            tokenizer.check_characters(encoding, piece, f"data: a document for {target}.bin")
            part.append(encoding.encode_to_numpy(piece, disallowed_special=()))
        else:
            part.append(piece)
        if last:
            part.append(end)
    joined = {target: np.concatenate(part).astype(dtype) for target, part in parts.items()}
    return len(job), joined


def encode_text(
    config: SourceConfig,
    files: list[Path],
    encoding: Encoding,
    origin: str,
    on_read: OnRead,
    on_skip: Callable[[str], None],
) -> Iterator[Tokens]:
    """The tokens of a source's documents in pieces, each document followed by end of text.

    Empty documents are left out, as from a corpus.

    Args:
        files: what the source finds.
        origin: what a message calls the text, such as "--data.path a.txt".
        on_read: called with the number of bytes read.
        on_skip: called with the position of each record without text.

    Raises:
        InputError: the tokenizer lacks a character, or a file cannot be read as `config` says.
    """
    end = encoding.eot_token
    for document in SOURCES[config.source].documents(config, files, on_read, end):
        if document.skipped is not None:
            on_skip(document.skipped)
            continue
        empty = True
        for piece in document.pieces:
            empty = False
            if isinstance(piece, str):
                tokenizer.check_characters(encoding, piece, origin)
                yield encoding.encode_to_numpy(piece, disallowed_special=())
            else:
                yield piece
        if not empty:
            yield np.array([end])
