"""Token files made elsewhere: what type their ids have, looked at before it is trusted.

A file that tells its type is believed: `.npy`, the `.bin` of llm.c and modded-nanogpt (a header of
1,024 bytes), and the files of a folder that this program prepared (its meta.json). Of others the
config's dtype is right unless a sample of the ids shows plainly that it is not: read as uint16, a
file of uint32 ids has a zero in every second place, which no text has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt.errors import InputError
from gpt.io import text
from gpt.io.files import open_regular, read_small

Tokens = npt.NDArray[np.integer[Any]]

LLM_C = {20240520: "<u2", 20240801: "<u4"}  # magic number of the header -> type of the ids
LLM_C_HEADER = 256  # int32: magic number, version, number of ids, zeros
BLOCKS, BLOCK = 64, 2**13  # a sample: at most so many blocks of so many bytes, spread evenly
FEWEST = 64  # bytes of a sample that shows anything
# Types that a file may have, the widest first: what fits as int64 fits as int32 as well.
TYPES = ("<i8", ">i8", "<f8", "<u4", ">u4", "<f4", "<u2", ">u2")


def open_ids(path: Path, dtype: str, vocabulary: int) -> Tokens:
    """The token ids of a file, memory-mapped.

    Args:
        dtype: of the ids where the file does not tell, "uint16" or "uint32"; little-endian.
        vocabulary: tokens of the tokenizer.

    Raises:
        InputError: it is no file of token ids, or they plainly have another type.
    """
    try:
        with open_regular(path) as file:
            kind, offset = _told(path, file, vocabulary) or (np.dtype(dtype).newbyteorder("<"), 0)
            size = file.seek(0, 2) - offset
            if not offset:
                _look(path, file, size, kind, vocabulary)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size % kind.itemsize:
        raise InputError(f"{path}: {size:,} bytes are not a whole number of {kind.name} tokens")
    return np.memmap(path, kind, "r", offset) if size else np.empty(0, kind)


def _told(path: Path, file: BinaryIO, vocabulary: int) -> tuple[np.dtype[Any], int] | None:
    """Type of the ids and where they begin, from a header or from meta.json beside the file."""
    head = file.read(text.HEAD)
    file.seek(0)
    if head.startswith(b"\x93NUMPY"):
        return _npy(path, file)
    found = text.recognise(head)
    if found is not None and not found[0].startswith("UTF"):  # small ids look like UTF-16
        raise InputError(f"{path}: is {found[0]}, not token ids")
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")[:LLM_C_HEADER]
    if len(numbers) == LLM_C_HEADER and int(numbers[0]) in LLM_C and not numbers[3:].any():
        return _whole(path, file, np.dtype(LLM_C[int(numbers[0])]), 4 * LLM_C_HEADER, numbers[2])
    return _prepared(path, vocabulary)


def _npy(path: Path, file: BinaryIO) -> tuple[np.dtype[Any], int]:
    """Of a NumPy array; only the header is read."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
    except Exception as error:  # the header is Python, and can be broken in every way of Python's
        raise InputError(f"{path}: is not a whole .npy file: {error}") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise InputError(
            f"{path}: holds an array of shape {shape} and type {dtype}; token ids are an array of "
            "whole numbers with one dimension"
        )
    return _whole(path, file, dtype, file.tell(), shape[0])


def _whole(
    path: Path, file: BinaryIO, kind: np.dtype[Any], offset: int, count: int
) -> tuple[np.dtype[Any], int]:
    """Type and offset from a header, if as many ids follow it as it says."""
    size = file.seek(0, 2) - offset
    if size != int(count) * kind.itemsize:
        raise InputError(
            f"{path}: is cut short or damaged: its header says that {count:,} {kind.name} tokens "
            f"follow, and {size:,} bytes do"
        )
    return kind, offset


def _prepared(path: Path, vocabulary: int) -> tuple[np.dtype[Any], int] | None:
    """Of a file that this program prepared."""
    sidecar = path.parent / "meta.json"
    try:
        meta = json.loads(read_small(sidecar))
        if path.stem not in [file["name"] for file in meta["files"]]:
            return None
        kind, made_with = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]], meta["vocabulary"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if made_with != vocabulary:
        raise InputError(
            f"{path}: was made with a vocabulary of {made_with:,} tokens ({sidecar}), and the "
            f"tokenizer has {vocabulary:,};\ndata.tokenizer: file and data.vocabulary: "
            f"{path.parent / 'tokenizer.json'} take the one that made it"
        )
    return np.dtype(kind), 0


def _look(path: Path, file: BinaryIO, size: int, claimed: np.dtype[Any], vocabulary: int) -> None:
    """Refuse a file whose ids plainly have another type than is claimed."""
    sample = _sample(file, size)
    if len(sample) < FEWEST:
        return
    if _is_written(sample):
        raise InputError(f"{path}: is text, not token ids; data.source: text or jsonl reads it")
    fits = _fits(sample, claimed, vocabulary)
    for name in TYPES:
        kind = np.dtype(name)
        wider = kind.itemsize > claimed.itemsize
        if (wider or not fits) and size % kind.itemsize == 0 and _fits(sample, kind, vocabulary):
            raise InputError(
                f"{path}: holds {_named(kind)} ids, not {claimed.name}: so read, all that were "
                f"looked at are in the vocabulary of {vocabulary:,};\n{_remedy(kind)}"
            )


def _sample(file: BinaryIO, size: int) -> bytes:
    """Blocks spread evenly over a file, all of a small one; each begins at a multiple of 8."""
    count = min(BLOCKS, -(-size // BLOCK))
    blocks = []
    for number in range(count):
        file.seek(max(size - BLOCK, 0) * number // max(count - 1, 1) // 8 * 8)
        blocks.append(file.read(BLOCK))
    return b"".join(block[: len(block) // 8 * 8] for block in blocks)


def _is_written(sample: bytes) -> bool:
    """Whether the bytes are printed ASCII, which those of ids, of all sizes, are not."""
    used = set(sample)
    return len(used) >= 8 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in used)


def _fits(sample: bytes, kind: np.dtype[Any], vocabulary: int) -> bool:
    """Whether the numbers of a sample are ids of the vocabulary, most not zero, and not all alike.

    Zeros tell nothing, as they are the same in every type; nor does one id again and again.
    """
    with np.errstate(invalid="ignore"):
        ids = np.frombuffer(sample, kind)
        valid = (ids >= 0) & (ids < vocabulary)
        if kind.kind == "f":
            valid &= ids == np.floor(ids)
    telling = np.count_nonzero(ids) > len(ids) / 2 and len(np.unique(ids)) > 2
    return bool(valid.all() and telling)


def _named(kind: np.dtype[Any]) -> str:
    order = "big-endian " if kind.newbyteorder("=") != kind else ""
    return order + {"u4": "uint32 or int32"}.get(kind.str[1:], kind.name)


def _remedy(kind: np.dtype[Any]) -> str:
    if kind.str in ("<u2", "<u4"):
        return f"data.dtype: {kind.name} reads it"
    return (
        f"convert them: np.fromfile(FILE, {kind.str!r}).astype('uint32').tofile(NEW); "
        "data.dtype: uint32 reads the new file"
    )
