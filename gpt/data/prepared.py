"""A prepared corpus on disk: what its files hold, and whether they are still what was written.

    CACHE_DIR/SOURCE-TOKENIZER-KEY/
      train.bin, val.bin   token ids, uint16 or uint32, each document followed by end of text; with
                           several sources train-0.bin, train-1.bin, ...
      counts.bin           how often each token occurs, int64, a row a file in the order above
      tokenizer.json       the vocabulary
      meta.json            what the files hold, their sizes and SHA-256; written last

Everything in meta.json is read off the finished token files, so it is true of them whatever wrote
them. How they are made: preparation.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from gpt.config import DataConfig
from gpt.data import tokenizer
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import Encoding
from gpt.errors import InputError
from gpt.io.files import (
    describe,
    flush,
    open_regular,
    read_json,
    read_small,
    write_bytes,
    write_text,
)

Natural = Annotated[int, Field(ge=0, le=2**53)]

FORMAT = 3
ANEW = "the next start prepares anew"  # as a folder that is damaged is deleted
OTHERS = ("tokenizer.json", "counts.bin")  # files beside the token files
BLOCK = 2**22  # tokens looked at together when a file is described
REHASH = 2**30  # bytes of a token file beyond which it is only hashed again if its time changed


@dataclass(frozen=True)
class TokenFile:
    """What one token file holds.

    Attributes:
        name: train, train-0, ... or val; the file is `name`.bin.
        documents, tokens: how many; tokens include the end of text after each document.
        bytes: UTF-8 bytes of the text.
        longest: tokens of the longest document, without end of text.
        size, sha256, time: of the file; time in nanoseconds.
    """

    name: str
    documents: Natural
    tokens: Natural
    bytes: Natural
    longest: Natural
    size: Natural
    sha256: str
    time: int


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus: token ids and what they mean.

    Attributes:
        train: token ids of each source, memory-mapped.
        weights: shares of the sources in the training sequences; they add up to 1.
        val: token ids of the validation text, memory-mapped.
        encoding: the tokenizer.
        fingerprint: SHA-256 of the token files and the tokenizer.
        files: what the token files hold: those of `train`, then that of `val`.
        counts: how often each token occurs in each of `files`, (files, vocabulary).
        folder: where they are.
    """

    train: tuple[Tokens, ...]
    weights: tuple[float, ...]
    val: Tokens
    encoding: Encoding
    fingerprint: str
    files: tuple[TokenFile, ...]
    counts: npt.NDArray[np.int64]
    folder: Path

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources together."""
        return sum(len(tokens) for tokens in self.train)

    def unigram_entropy(self) -> float:
        """H₁, nats per token: what guessing the validation tokens by their frequency costs.

        The cross-entropy of the validation tokens under the training text's unigram distribution,
        of several sources by their weights, with 1 added to every count so that a token which
        training never shows has a probability. A model that learnt no more has this loss.
        """
        *train, val = self.counts
        smoothed = [(row + 1) / (row.sum() + len(row)) for row in train]
        guess = sum(w * p for w, p in zip(self.weights, smoothed, strict=True))
        return float(-(val / val.sum()) @ np.log(guess))


# ---------------------------------------------------------------------------------------------
# Closing a folder of token files


def train_names(config: DataConfig) -> list[str]:
    """The token files of the training text: one, or one for each source of a mix."""
    return [f"train-{index}" for index in range(len(config.mix))] or ["train"]


def seal(
    folder: Path,
    names: Sequence[str],
    dtype: np.dtype[Any],
    encoding: Encoding,
    revisions: list[str | None],
) -> None:
    """Describe the token files `names` of `folder`, and write meta.json when all is on disk.

    Args:
        revisions: the commit of each source, None where it has none.

    Raises:
        InputError: a token file holds what is not a token.
        OSError: the disk is full.
    """
    counts = np.zeros((len(names), encoding.n_vocab), np.int64)
    files = [
        _describe(folder / f"{name}.bin", dtype, encoding, row)
        for name, row in zip(names, counts, strict=True)
    ]
    write_bytes(folder / "counts.bin", counts.tobytes())
    others = {name: describe(folder / name) for name in OTHERS}
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocabulary": encoding.n_vocab,
        "fingerprint": _fingerprint(files, str(others["tokenizer.json"]["sha256"])),
        "revisions": revisions,
        "files": [asdict(file) for file in files],
        "others": others,
    }
    for name in names:
        flush(folder / f"{name}.bin")
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def _fingerprint(files: Sequence[TokenFile], vocabulary: str) -> str:
    digests = [*(file.sha256 for file in files), vocabulary]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _describe(
    path: Path, dtype: np.dtype[Any], encoding: Encoding, counts: npt.NDArray[np.int64]
) -> TokenFile:
    """Describe a token file, and fill in how often each token occurs in it."""
    digest = hashlib.sha256()
    at = start = longest = 0  # places of this block and of the document that it begins in
    with path.open("rb") as file:
        while raw := file.read(BLOCK * dtype.itemsize):
            digest.update(raw)
            block = np.frombuffer(raw, dtype)
            if block.max() >= len(counts):  # an earlier start left it, and it was altered since
                raise InputError(
                    f"{path}: is damaged: it holds the id {block.max()} of {len(counts)} tokens; "
                    f"{ANEW}"
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


# ---------------------------------------------------------------------------------------------
# Opening it


class _File(BaseModel):
    """What meta.json says of a file that holds no tokens."""

    size: Natural
    sha256: str


class _Meta(BaseModel):
    """What is read of meta.json."""

    dtype: Literal["uint16", "uint32"]
    files: tuple[TokenFile, ...]
    others: dict[str, _File]


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def open_dataset(config: DataConfig, folder: Path) -> Dataset:
    """A prepared corpus, held against its sidecar.

    Raises:
        InputError: a file is missing, has been cut short, or is not what was written.
    """
    try:
        meta = read_json(folder / "meta.json", _Meta)
        if [file.name for file in meta.files] != [*train_names(config), "val"]:
            raise ValueError("meta.json describes other files")
        for name in OTHERS:
            _check_size(folder / name, meta.others[name].size)
            if describe(folder / name) != meta.others[name].model_dump():
                raise ValueError(f"{name} is not what was written")
        dtype = np.dtype(meta.dtype)
        encoding = tokenizer.load(folder / "tokenizer.json")
        counts = _read_counts(folder / "counts.bin", meta.files, encoding)
        for file in meta.files:
            _verify(folder / f"{file.name}.bin", file, dtype, encoding.n_vocab)
        *train, val = (_map(folder / f"{file.name}.bin", dtype) for file in meta.files)
        return Dataset(
            train=tuple(train),
            weights=config.weights,
            val=val,
            encoding=encoding,
            fingerprint=_fingerprint(meta.files, meta.others["tokenizer.json"].sha256),
            files=meta.files,
            counts=counts,
            folder=folder,
        )
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename or folder).name}: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{folder}{os.sep}")
        raise _damaged(folder, reason) from None


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(f"{folder}: is damaged ({reason}); delete the folder to prepare it again")


def _check_size(path: Path, size: int) -> None:
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
    if found != size:
        raise ValueError(f"{path.name} has {found:,} bytes, {size:,} were written")


def _read_counts(
    path: Path, files: Sequence[TokenFile], encoding: Encoding
) -> npt.NDArray[np.int64]:
    """How often each token occurs in each file, held against what meta.json says of the files."""
    size = len(files) * encoding.n_vocab * 8
    _check_size(path, size)
    counts = np.frombuffer(read_small(path, size), np.int64).reshape(len(files), -1)
    lengths = np.array(tokenizer.byte_lengths(encoding))
    for file, row in zip(files, counts, strict=True):
        found = (int(row.sum()), int(row[encoding.eot_token]), int(row @ lengths))
        if row.min() < 0 or found != (file.tokens, file.documents, file.bytes):
            raise ValueError(f"meta.json and counts.bin differ in {file.name}")
    return counts


def _verify(path: Path, file: TokenFile, dtype: np.dtype[Any], vocabulary: int) -> None:
    """Hold a token file against its description; a large one is read if it was touched.

    Raises:
        ValueError: it is not what was written, or holds what is not a token.
    """
    _check_size(path, file.size)
    if file.size != file.tokens * dtype.itemsize or not file.longest <= file.tokens > 0:
        raise ValueError(f"meta.json: the sizes of {path.name} do not agree")
    if file.size > REHASH and path.stat().st_mtime_ns == file.time:
        return
    digest, largest = hashlib.sha256(), 0
    with open_regular(path) as opened:
        while raw := opened.read(BLOCK * dtype.itemsize):
            digest.update(raw)
            largest = max(largest, int(np.frombuffer(raw, dtype).max()))
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"{path.name} is not what was written")
    if largest >= vocabulary:
        raise ValueError(f"{path.name} holds the id {largest} of {vocabulary} tokens")
