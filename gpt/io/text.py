"""Decoding text, in the same way wherever it enters: training files, records, prompts.

Text is UTF-8, plain or compressed (gzip, bzip2, xz, zstd, recognized by the first bytes, which the
file's name must not contradict). A byte-order mark at its start is dropped. Other formats, such as
UTF-16 or Parquet, are recognized by their first bytes, and the error names the format; only if none
matches does it name the invalid byte.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from gpt.errors import InputError

CHUNK = 2**17  # bytes read at a time; with 2**20 the allocator kept twice the memory
HEAD = 2**12  # bytes at the beginning from which a format is recognized


# ---------------------------------------------------------------------------------------------
# Compressed files


def _gzip(file: BinaryIO) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=file)


def _bzip2(file: BinaryIO) -> Any:
    import bz2  # missing from some builds of Python, as is lzma

    return bz2.BZ2File(file)


def _xz(file: BinaryIO) -> Any:
    import lzma

    return lzma.LZMAFile(file)


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


# Name -> first bytes, file name suffix, decompressor.
COMPRESSIONS: dict[str, tuple[bytes, str, Callable[[BinaryIO], Any]]] = {
    "gzip": (b"\x1f\x8b", ".gz", _gzip),
    "bzip2": (b"BZh", ".bz2", _bzip2),
    "xz": (b"\xfd7zXZ\0", ".xz", _xz),
    "zstd": (b"\x28\xb5\x2f\xfd", ".zst", _zstd),
}
SUFFIXES = tuple(suffix for _, suffix, _ in COMPRESSIONS.values())


def decompressed(file: BinaryIO, origin: str) -> Iterator[bytes]:
    """The contents of a seekable file, decompressed if needed, a chunk at a time.

    Raises:
        InputError: the compressed file is damaged or truncated, or its name has the suffix of
            another compression.
        OSError: it cannot be read.
    """
    head = file.read(HEAD)
    file.seek(0)
    actual = named = ""
    for name, (signature, suffix, _) in COMPRESSIONS.items():
        if head.startswith(signature) and not _is_text(head):
            actual = name
        if origin.lower().endswith(suffix):
            named = name
    named = named or actual
    if named and not head:
        raise InputError(
            f"{origin}: is empty, not {named}-compressed as its name says; delete it or download "
            "it again"
        )
    if named != actual:
        raise InputError(
            f"{origin}: is not {named}-compressed, although its name says so"
            + (f" (it is {actual}-compressed)" if actual else "")
            + "; rename it if it is complete"
        )
    if not actual:
        yield from iter(lambda: file.read(CHUNK), b"")
        return
    stream = COMPRESSIONS[actual][2](file)
    try:
        yield from iter(lambda: stream.read(CHUNK), b"")
    except Exception as error:  # each library raises its own for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{origin}: is damaged or truncated ({actual}: {error})") from None


# ---------------------------------------------------------------------------------------------
# Other formats

CONVERT = "convert it, for example with `iconv -f {} -t UTF-8 FILE > NEW`"
# Name -> first bytes.
FORMATS: dict[str, tuple[bytes, ...]] = {
    "UTF-32 text": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16 text": (b"\xff\xfe", b"\xfe\xff"),
    **{f"{name}-compressed": (signature,) for name, (signature, _, _) in COMPRESSIONS.items()},
    "lz4-compressed": (b"\x04\x22\x4d\x18",),
    "a Parquet file": (b"PAR1",),
    "an Arrow file": (b"ARROW1",),
    "a NumPy array": (b"\x93NUMPY",),
    "a zip archive (or .docx, .epub, .npz, .pt)": (b"PK\x03\x04", b"PK\x05\x06"),
    "an archive": (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"),
    "a PDF": (b"%PDF-",),
    "an office document": (b"\xd0\xcf\x11\xe0", b"{\\rtf"),
    "an SQLite database": (b"SQLite format 3\0",),
    "an HDF5 file": (b"\x89HDF",),
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "a program": (b"\x7fELF", b"MZ"),
}
FEW, RARE = 16, 0.2  # number and fraction of invalid characters tolerated at the beginning of text
CONTROLS = [chr(n) for n in (*range(1, 9), *range(14, 27))]  # characters that text does not contain
WIDE = {  # encoding -> bytes per character, positions usually zero, a position rarely zero
    "UTF-32LE": (4, (2, 3), 0),
    "UTF-32BE": (4, (0, 1), 3),
    "UTF-16LE": (2, (1,), 0),
    "UTF-16BE": (2, (0,), 1),
}


def recognize(head: bytes) -> str | None:
    """Name of the format that `head`, the beginning of a file, belongs to.

    None for UTF-8 text, and for bytes of an unknown format.
    """
    head = head[:HEAD]
    if _is_text(head):
        return None
    for name, signatures in FORMATS.items():
        if head.startswith(signatures):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:10] == b'{"' and not any(head[4:8]):
        return "a safetensors file"
    return _wide(head)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # may end inside a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte-order mark."""
    for encoding, (size, zeros, other) in WIDE.items():
        zero = [head[at::size].count(0) * size / max(len(head), 1) for at in range(size)]
        if len(head) >= 8 and all(zero[at] > 0.5 for at in zeros) and zero[other] < 0.05:
            return f"{encoding} text"
    return None


def check(head: bytes, origin: str, remedies: Mapping[str, str] | None = None) -> None:
    """Reject anything but UTF-8 text, judging by its beginning; a few invalid bytes are tolerated.

    Args:
        remedies: by format, what to do with a file that the caller cannot use.

    Raises:
        InputError: names the format or the fraction of invalid characters, and a remedy.
    """
    if (name := recognize(head)) is not None:
        remedy = (remedies or {}).get(name, "")
        if name.endswith(" text"):
            remedy = CONVERT.format(name.removesuffix(" text"))
        elif name.endswith("-compressed"):
            remedy = "decompress it"
        raise InputError(f"{origin}: is {name}, not UTF-8 text{remedy and f'; {remedy}'}")
    if fraction := _much_invalid(head):
        raise InputError(
            f"{origin}: is not UTF-8 text: {fraction:.0%} of its beginning is invalid; "
            + CONVERT.format("ENCODING")
        )


def _much_invalid(raw: bytes) -> float:
    """The fraction of invalid and control characters if it is too large for UTF-8 text, else 0."""
    if _is_text(raw):
        return 0.0
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw)
    invalid = text.count("\ufffd") - raw.count("\ufffd".encode()) + sum(map(text.count, CONTROLS))
    return invalid / len(text) if invalid > max(FEW, RARE * len(text)) else 0.0


# ---------------------------------------------------------------------------------------------
# Text


def decoded(
    chunks: Iterable[bytes],
    origin: str,
    *,
    replace: bool = False,
    hint: str = "",
    remedies: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Decode UTF-8 bytes, a chunk at a time, without a byte-order mark at the start.

    Args:
        origin: what a message calls the text, such as the file's name.
        replace: whether invalid bytes become U+FFFD. Other formats, and text whose beginning is
            largely invalid, are rejected all the same.
        hint: a remedy appended to the message about an invalid byte, if few are invalid.
        remedies: see `check`.

    Raises:
        InputError: the bytes are not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if replace else "strict")
    position = 0  # of the first byte that has not been decoded
    for chunk in itertools.chain(chunks, [b""]):
        if not position:
            check(chunk, origin, remedies)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at, byte = position + error.start, error.object[error.start]
            raise _invalid_byte(origin, at, byte, "" if _much_invalid(chunk) else hint) from None
        if not replace and "\0" in text:
            at = position + len(text.partition("\0")[0].encode())
            raise InputError(
                f"{origin}: contains a NUL byte at byte {at:,}; delete NUL bytes, for example with "
                f"`tr -d '\\000' < FILE > NEW`{hint}"
            )
        if text:
            yield text.removeprefix("\ufeff") if not position else text
        position += len(text.encode()) if not replace else len(chunk)


def _invalid_byte(origin: str, position: int, byte: int, hint: str) -> InputError:
    """The error about a byte that is not valid UTF-8."""
    return InputError(
        f"{origin}: is not UTF-8 text: byte {position:,} is 0x{byte:02x}; if it is in another "
        f"encoding, convert it{hint}"
    )


def decode(raw: bytes, origin: str) -> str:
    """`decoded`, for bytes in memory."""
    return "".join(decoded([raw], origin))


def decode_part(raw: bytes, origin: str, *, replace: bool, hint: str) -> str:
    """Decode a line or a field of a file whose beginning was checked; arguments as in `decoded`.

    Raises:
        InputError: names the first invalid byte.
    """
    try:
        return raw.decode(errors="replace" if replace else "strict")
    except UnicodeDecodeError as error:
        raise _invalid_byte(origin, error.start, raw[error.start], hint) from None
