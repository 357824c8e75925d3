"""A prepared corpus: the folder, its meta.json, and opening it as a `Dataset`.

    CACHE_DIR/SOURCE-TOKENIZER-KEY/
      train.bin, val.bin   token ids, uint16 or uint32, each document followed by end of text; with
                           several sources train-0.bin, train-1.bin, ...
      counts.bin           how often each token occurs, int64, one row per file in the order above
      tokenizer.json       the vocabulary
      meta.json            what the files contain, their sizes and SHA-256; written last

`write_meta` computes meta.json from the finished token files, which build.py makes, and
`open_dataset` checks the folder against it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from gpt.config import DataConfig
from gpt.data import tokenizer
from gpt.data.token_files import TokenFile, Tokens, check_size, summarize, verify
from gpt.data.tokenizer import Encoding
from gpt.errors import InputError
from gpt.io.files import (
    Natural,
    fsync,
    read_json,
    read_small,
    size_and_hash,
    write_bytes,
    write_text,
)

FORMAT = 3
OTHERS = ("tokenizer.json", "counts.bin")  # files that contain no tokens


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus: token ids and what they mean.

    Attributes:
        train: token ids of each source, memory-mapped.
        weights: fraction of the training sequences drawn from each source; they add up to 1.
        val: token ids of the validation text, memory-mapped.
        encoding: the tokenizer.
        fingerprint: SHA-256 of the token files and the tokenizer.
        files: descriptions of the token files: those of `train`, then that of `val`.
        counts: how often each token occurs in each of `files`, (files, vocabulary).
        folder: where the files are.
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
        """Number of training tokens of all sources."""
        return sum(len(tokens) for tokens in self.train)

    def unigram_entropy(self, targets: npt.NDArray[np.int64] | None = None) -> float:
        """H₁, nats per token: the loss of guessing validation tokens by their frequency.

        It is the cross-entropy of the targets under `unigram_distribution`. A model that has
        learned only token frequencies has this loss; one that has learned more is below it.

        Args:
            targets: how often each token is to be guessed, (vocabulary,): those that are evaluated,
                which may be easier or harder than the rest; None: the whole validation text.
        """
        counts = self.counts[-1] if targets is None else targets
        return float(-(counts / counts.sum()) @ np.log(self.unigram_distribution()))

    def unigram_distribution(self) -> npt.NDArray[np.float64]:
        """Each token's relative frequency in the training text, (vocabulary,).

        With several sources it is their average by their weights. One is added to every count
        (Laplace smoothing), so that a token that never occurs in training has a probability.
        """
        train = self.counts[:-1]
        smoothed = (train + 1) / (train.sum(1, keepdims=True) + train.shape[1])
        return np.asarray(self.weights) @ smoothed


# ---------------------------------------------------------------------------------------------
# Writing meta.json


def train_names(config: DataConfig) -> list[str]:
    """The token files of the training text: one, or one for each source of a mix."""
    return [f"train-{index}" for index in range(len(config.mix))] or ["train"]


def write_meta(
    folder: Path,
    names: Sequence[str],
    dtype: np.dtype[Any],
    encoding: Encoding,
    revisions: list[str | None],
) -> None:
    """Describe the token files `names` of `folder`, and write meta.json once all are on disk.

    Args:
        revisions: the commit of each source, None where it has none.

    Raises:
        InputError: a token file contains an id outside the vocabulary.
        OSError: the disk is full.
    """
    counts = np.zeros((len(names), encoding.n_vocab), np.int64)
    files = [
        summarize(folder / f"{name}.bin", dtype, encoding, row)
        for name, row in zip(names, counts, strict=True)
    ]
    write_bytes(folder / "counts.bin", counts.tobytes())
    others = {name: size_and_hash(folder / name) for name in OTHERS}
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
        fsync(folder / f"{name}.bin")
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def _fingerprint(files: Sequence[TokenFile], vocabulary: str) -> str:
    digests = [*(file.sha256 for file in files), vocabulary]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Opening a prepared corpus


class _File(BaseModel):
    """The part of meta.json about a file that contains no tokens."""

    size: Natural
    sha256: str


class _Meta(BaseModel):
    """The parts of meta.json that are read."""

    dtype: Literal["uint16", "uint32"]
    files: tuple[TokenFile, ...]
    others: dict[str, _File]


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def open_dataset(config: DataConfig, folder: Path) -> Dataset:
    """Open a prepared corpus, after checking it against its meta.json.

    Raises:
        InputError: a file is missing, truncated, or has changed since it was written.
    """
    try:
        meta = read_json(folder / "meta.json", _Meta)
        if [file.name for file in meta.files] != [*train_names(config), "val"]:
            raise ValueError("meta.json describes different files")
        for name in OTHERS:
            check_size(folder / name, meta.others[name].size)
            if size_and_hash(folder / name) != meta.others[name].model_dump():
                raise ValueError(f"{name} has changed since it was written")
        dtype = np.dtype(meta.dtype)
        encoding = tokenizer.load(folder / "tokenizer.json")
        counts = _read_counts(folder / "counts.bin", meta.files, encoding)
        for file in meta.files:
            verify(folder / f"{file.name}.bin", file, dtype, encoding.n_vocab)
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


def _read_counts(
    path: Path, files: Sequence[TokenFile], encoding: Encoding
) -> npt.NDArray[np.int64]:
    """How often each token occurs in each file, checked against meta.json."""
    size = len(files) * encoding.n_vocab * 8
    check_size(path, size)
    counts = np.frombuffer(read_small(path, size), np.int64).reshape(len(files), -1)
    lengths = np.array(tokenizer.byte_lengths(encoding))
    for file, row in zip(files, counts, strict=True):
        found = (int(row.sum()), int(row[encoding.eot_token]), int(row @ lengths))
        if row.min() < 0 or found != (file.tokens, file.documents, file.bytes):
            raise ValueError(f"meta.json and counts.bin disagree about {file.name}")
    return counts
