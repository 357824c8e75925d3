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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from pydantic import TypeAdapter, ValidationError

from gpt import tokenizer
from gpt.config import DataConfig
from gpt.data.sources import Tokens
from gpt.errors import InputError
from gpt.files import describe, flush, write_bytes, write_text

FORMAT = 2
DTYPES = ("uint16", "uint32")
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
    documents: int
    tokens: int
    bytes: int
    longest: int
    size: int
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
    encoding: tiktoken.Encoding
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
    encoding: tiktoken.Encoding,
    revisions: list[str | None],
) -> None:
    """Describe the token files `names` of `folder`, and write meta.json when all is on disk.

    Args:
        revisions: the commit of each source, None where it has none.

    Raises:
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
        "fingerprint": _fingerprint(files, others),
        "revisions": revisions,
        "files": [asdict(file) for file in files],
        "others": others,
    }
    for name in names:
        flush(folder / f"{name}.bin")
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def _fingerprint(files: Sequence[TokenFile], others: dict[str, dict[str, int | str]]) -> str:
    digests = [*(file.sha256 for file in files), str(others["tokenizer.json"]["sha256"])]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _describe(
    path: Path, dtype: np.dtype[Any], encoding: tiktoken.Encoding, counts: npt.NDArray[np.int64]
) -> TokenFile:
    """Describe a token file, and fill in how often each token occurs in it."""
    digest = hashlib.sha256()
    at = start = longest = 0  # places of this block and of the document that it begins in
    with path.open("rb") as file:
        while raw := file.read(BLOCK * dtype.itemsize):
            digest.update(raw)
            block = np.frombuffer(raw, dtype)
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


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def open_dataset(config: DataConfig, folder: Path) -> Dataset:
    """A prepared corpus, held against its sidecar.

    Raises:
        InputError: a file is missing, has been cut short, or is not what was written.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        files = TypeAdapter(tuple[TokenFile, ...]).validate_python(meta["files"])
        if [file.name for file in files] != [*train_names(config), "val"]:
            raise ValueError("meta.json describes other files")
        if meta["dtype"] not in DTYPES:
            raise ValueError(f"meta.json: dtype is neither {' nor '.join(DTYPES)}")
        for name in OTHERS:
            size = int(meta["others"][name]["size"])
            if (
                not _has_size(folder / name, size)
                or describe(folder / name) != meta["others"][name]
            ):
                raise ValueError(f"{name} is not what was written")
        for file in files:
            _verify(folder / f"{file.name}.bin", file)
        dtype = np.dtype(meta["dtype"])
        *train, val = (_map(folder / f"{file.name}.bin", dtype) for file in files)
        encoding = tokenizer.load(folder / "tokenizer.json")
        return Dataset(
            train=tuple(train),
            weights=config.weights,
            val=val,
            encoding=encoding,
            fingerprint=_fingerprint(files, meta["others"]),
            files=files,
            counts=np.fromfile(folder / "counts.bin", np.int64).reshape(
                len(files), encoding.n_vocab
            ),
            folder=folder,
        )
    except ValidationError as error:
        raise _damaged(folder, f"meta.json: files: {error.errors()[0]['msg']}") from None
    except (ValueError, LookupError, TypeError, OSError, OverflowError, RecursionError) as error:
        raise _damaged(folder, str(error).partition("\n")[0]) from None


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(f"{folder}: is damaged ({reason}); delete the folder to prepare it again")


def _has_size(path: Path, size: int) -> bool:
    """Whether a plain file of that size is there; a device would be read without end."""
    return path.is_file() and path.stat().st_size == size


def _verify(path: Path, file: TokenFile) -> None:
    """Hold a token file against its size and SHA-256; a large one is hashed if it was touched."""
    stat = path.stat()
    if not _has_size(path, file.size):
        raise ValueError(f"{path.name} has {stat.st_size:,} bytes, {file.size:,} were written")
    trusted = file.size > REHASH and stat.st_mtime_ns == file.time
    if not trusted and describe(path)["sha256"] != file.sha256:
        raise ValueError(f"{path.name} is not what was written")
