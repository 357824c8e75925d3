"""Token files written by other programs: the type of their ids is checked before it is trusted.

Some files state their type: `.npy`, the `.bin` files of llm.c and modded-nanogpt (a header of 1,024
bytes), and the files of a folder prepared by this program (its meta.json). For others, the config's
dtype is used unless a sample of the ids clearly contradicts it: read as uint16, a file of uint32
ids has a zero at every second position, which no text has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt.data.token_files import Tokens
from gpt.errors import InputError
from gpt.io import text
from gpt.io.files import open_regular, read_small, reading

LLM_C = {20240520: "<u2", 20240801: "<u4"}  # magic number of the header -> type of the ids
LLM_C_HEADER = 256  # int32: magic number, version, number of ids, zeros
BLOCKS, BLOCK = 64, 2**13  # a sample: the maximum number of blocks, spread evenly, and their bytes
MIN_SAMPLE = 64  # bytes of the smallest sample from which a type can be inferred
# Types that a file may have, the widest first.
TYPES = ("<i8", ">i8", "<f8", "<u4", ">u4", "<f4", "<u2", ">u2")


def open_ids(path: Path, dtype: str, vocabulary: int) -> Tokens:
    """The token ids of a file, memory-mapped.

    Args:
        dtype: of the ids if the file does not state it, "uint16" or "uint32"; little-endian.
        vocabulary: number of tokens of the tokenizer.

    Raises:
        InputError: it is not a file of token ids, or they clearly have another type.
    """
    with reading(path), open_regular(path) as file:
        stated = _stated_type(path, file, vocabulary)
        kind, offset = stated or (np.dtype(dtype).newbyteorder("<"), 0)
        size = file.seek(0, 2) - offset
        if not offset:
            _check_type(path, file, size, kind, vocabulary)
    if size % kind.itemsize:
        raise InputError(f"{path}: {size:,} bytes are not a whole number of {kind.name} tokens")
    return np.memmap(path, kind, "r", offset) if size else np.empty(0, kind)


def _stated_type(path: Path, file: BinaryIO, vocabulary: int) -> tuple[np.dtype[Any], int] | None:
    """The type of the ids and their offset, from a header or from meta.json in the same folder."""
    head = file.read(text.HEAD)
    file.seek(0)
    if head.startswith(b"\x93NUMPY"):
        return _npy(path, file)
    found = text.recognize(head)
    if found is not None and not found.startswith("UTF"):  # small ids look like UTF-16
        raise InputError(f"{path}: is {found}, not token ids")
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")[:LLM_C_HEADER]
    if len(numbers) == LLM_C_HEADER and int(numbers[0]) in LLM_C and not numbers[3:].any():
        kind = np.dtype(LLM_C[int(numbers[0])])
        return _check_length(path, file, kind, 4 * LLM_C_HEADER, numbers[2])
    return _prepared_type(path, vocabulary)


def _npy(path: Path, file: BinaryIO) -> tuple[np.dtype[Any], int]:
    """The type and offset of a NumPy array, from its header."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
    except Exception as error:  # the header is a Python literal, which can fail in many ways
        raise InputError(f"{path}: is a damaged .npy file: {error}") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise InputError(
            f"{path}: contains an array of shape {shape} and type {dtype}; token ids must be a "
            "one-dimensional array of integers"
        )
    return _check_length(path, file, dtype, file.tell(), shape[0])


def _check_length(
    path: Path, file: BinaryIO, kind: np.dtype[Any], offset: int, count: int
) -> tuple[np.dtype[Any], int]:
    """The type and offset, if the header is followed by the `count` ids that it announces."""
    size = file.seek(0, 2) - offset
    if size != int(count) * kind.itemsize:
        raise InputError(
            f"{path}: is truncated or damaged: its header announces {count:,} {kind.name} tokens, "
            f"but {size:,} bytes follow"
        )
    return kind, offset


def _prepared_type(path: Path, vocabulary: int) -> tuple[np.dtype[Any], int] | None:
    """The type and offset of a file that this program prepared."""
    sidecar = path.parent / "meta.json"
    try:
        meta = json.loads(read_small(sidecar))
        if path.stem not in [file["name"] for file in meta["files"]]:
            return None
        kind, original = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]], meta["vocabulary"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if original != vocabulary:
        raise InputError(
            f"{path}: was written with a vocabulary of {original:,} tokens ({sidecar}), but the "
            f"tokenizer has {vocabulary:,};\nset data.tokenizer: file and data.vocabulary: "
            f"{path.parent / 'tokenizer.json'} to use the original one"
        )
    return np.dtype(kind), 0


def _check_type(
    path: Path, file: BinaryIO, size: int, claimed: np.dtype[Any], vocabulary: int
) -> None:
    """Reject a file whose ids clearly have another type than claimed."""
    sample = _sample(file, size)
    if len(sample) < MIN_SAMPLE:
        return
    if _is_text(sample):
        raise InputError(f"{path}: is text, not token ids; set data.source: text or jsonl")
    fits = _fits(sample, claimed, vocabulary)
    for name in TYPES:
        kind = np.dtype(name)
        wider = kind.itemsize > claimed.itemsize
        if (wider or not fits) and size % kind.itemsize == 0 and _fits(sample, kind, vocabulary):
            raise InputError(
                f"{path}: contains {_name(kind)} ids, not {claimed.name}: as {kind.name}, all ids "
                f"of a sample are in the vocabulary of {vocabulary:,};\n{_remedy(kind)}"
            )


def _sample(file: BinaryIO, size: int) -> bytes:
    """Blocks spread evenly over a file, or all of a small one; each begins at a multiple of 8."""
    count = min(BLOCKS, -(-size // BLOCK))
    blocks = []
    for number in range(count):
        file.seek(max(size - BLOCK, 0) * number // max(count - 1, 1) // 8 * 8)
        blocks.append(file.read(BLOCK))
    return b"".join(block[: len(block) // 8 * 8] for block in blocks)


def _is_text(sample: bytes) -> bool:
    """Whether all bytes are printable ASCII, which is never true of a file of ids."""
    used = set(sample)
    return len(used) >= 8 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in used)


def _fits(sample: bytes, kind: np.dtype[Any], vocabulary: int) -> bool:
    """Whether a sample consists of ids of the vocabulary, mostly nonzero, with several values.

    Zeros are not evidence, since they are zeros in every type; nor is a single repeated id.
    """
    with np.errstate(invalid="ignore"):
        ids = np.frombuffer(sample, kind)
        valid = (ids >= 0) & (ids < vocabulary)
        if kind.kind == "f":
            valid &= ids == np.floor(ids)
    informative = np.count_nonzero(ids) > len(ids) / 2 and len(np.unique(ids)) > 2
    return bool(valid.all() and informative)


def _name(kind: np.dtype[Any]) -> str:
    order = "big-endian " if kind.newbyteorder("=") != kind else ""
    return order + {"u4": "uint32 or int32"}.get(kind.str[1:], kind.name)


def _remedy(kind: np.dtype[Any]) -> str:
    if kind.str in ("<u2", "<u4"):
        return f"set data.dtype: {kind.name}"
    return (
        f"convert them: np.fromfile(FILE, {kind.str!r}).astype('uint32').tofile(NEW); "
        "then set data.dtype: uint32"
    )
