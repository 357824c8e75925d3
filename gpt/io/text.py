"""Decoding text, in the same way wherever it enters: training files, records, prompts.

Text is UTF-8, plain or compressed (gzip, bzip2, xz, zstd, recognized by the first bytes, whatever
the file's name). A byte-order mark at its start is dropped. Other formats, such as UTF-16 or
Parquet, are recognized by their first bytes, and the error names the format and a remedy; only if
none matches does it name the invalid byte.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from gpt.errors import InputError

CHUNK = 2**17  # bytes read at a time; with 2**20 the allocator kept twice the memory
HEAD = 2**12  # bytes at the beginning from which a format is recognized

UNPACK = "extract the texts from it"
EXPORT = "export its texts as JSON Lines"
CONVERT = "convert it, for example with `iconv -f {} -t UTF-8 FILE > NEW`"
FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (  # first bytes, name, remedy
    ((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-32 text", CONVERT.format("UTF-32")),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", CONVERT.format("UTF-16")),
    ((b"PAR1",), "a Parquet file", "use data.source: parquet"),
    ((b"ARROW1",), "an Arrow file", "save it as Parquet and use data.source: parquet"),
    ((b"\x93NUMPY",), "a NumPy array", "if it contains token ids, use data.source: tokens"),
    ((b"PK\x03\x04", b"PK\x05\x06"), "a zip archive (or .docx, .epub, .npz, .pt)", UNPACK),
    ((b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"), "an archive", UNPACK),
    ((b"\x1f\x8b",), "gzip-compressed", "decompress it"),
    ((b"BZh",), "bzip2-compressed", "decompress it"),
    ((b"\xfd7zXZ\0",), "xz-compressed", "decompress it"),
    ((b"\x28\xb5\x2f\xfd",), "zstd-compressed", "decompress it"),
    ((b"\x04\x22\x4d\x18",), "lz4-compressed", "decompress it"),
    ((b"%PDF-",), "a PDF", "extract its text, for example with `pdftotext`"),
    ((b"\xd0\xcf\x11\xe0", b"{\\rtf"), "an office document", "save it as plain text"),
    ((b"SQLite format 3\0",), "an SQLite database", EXPORT),
    ((b"\x89HDF",), "an HDF5 file", EXPORT),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle", EXPORT),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "a picture", "leave it out"),
    ((b"\x7fELF", b"MZ"), "a program", "leave it out"),
)
FEW, RARE = 16, 0.2  # number and fraction of invalid characters tolerated at the beginning of text
CONTROLS = [chr(n) for n in (*range(1, 9), *range(14, 27))]  # characters that text does not contain
WIDE = {  # encoding -> bytes per character, positions usually zero, a position rarely zero
    "UTF-32LE": (4, (2, 3), 0),
    "UTF-32BE": (4, (0, 1), 3),
    "UTF-16LE": (2, (1,), 0),
    "UTF-16BE": (2, (0,), 1),
}


def recognize(head: bytes) -> tuple[str, str] | None:
    """Name and remedy of the format that `head`, the beginning of a file, belongs to.

    None for UTF-8 text, and for bytes of an unknown format.
    """
    head = head[:HEAD]
    if _is_text(head):
        return None
    for signatures, name, remedy in FORMATS:
        if head.startswith(signatures):
            return name, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if head[8:10] == b'{"' and not any(head[4:8]):
        return "a safetensors file", "leave it out"
    return _wide(head)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # may end inside a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _wide(head: bytes) -> tuple[str, str] | None:
    """UTF-16 or UTF-32 without a byte-order mark."""
    for encoding, (size, zeros, other) in WIDE.items():
        zero = [head[at::size].count(0) * size / max(len(head), 1) for at in range(size)]
        if len(head) >= 8 and all(zero[at] > 0.5 for at in zeros) and zero[other] < 0.05:
            return f"{encoding} text", CONVERT.format(encoding)
    return None


def check(head: bytes, origin: str) -> None:
    """Reject anything but UTF-8 text, judging by its beginning; a few invalid bytes are tolerated.

    Raises:
        InputError: names the format or the fraction of invalid characters, and a remedy.
    """
    if (found := recognize(head)) is not None:
        raise InputError(f"{origin}: is {found[0]}, not UTF-8 text; {found[1]}")
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
# Text


def decoded(
    chunks: Iterable[bytes], origin: str, *, replace: bool = False, hint: str = ""
) -> Iterator[str]:
    """Decode UTF-8 bytes, a chunk at a time, without a byte-order mark at the start.

    Args:
        origin: what a message calls the text, such as the file's name.
        replace: whether invalid bytes become U+FFFD. Other formats, and text of which a large part
            of the beginning is invalid, are rejected all the same.
        hint: a remedy appended to the message about an invalid byte, if few are invalid.

    Raises:
        InputError: the bytes are not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if replace else "strict")
    position = 0  # of the first byte that has not been decoded
    for chunk in itertools.chain(chunks, [b""]):
        if not position:
            check(chunk, origin)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at, byte = position + error.start, error.object[error.start]
            raise invalid_byte(origin, at, byte, "" if _much_invalid(chunk) else hint) from None
        if not replace and "\0" in text:
            at = position + len(text.partition("\0")[0].encode())
            raise InputError(
                f"{origin}: contains a NUL byte at byte {at:,}; delete NUL bytes, for example with "
                f"`tr -d '\\000' < FILE > NEW`{hint}"
            )
        if text:
            yield text.removeprefix("\ufeff") if not position else text
        position += len(text.encode()) if not replace else len(chunk)


def invalid_byte(origin: str, position: int, byte: int, hint: str) -> InputError:
    """The error about a byte that is not valid UTF-8."""
    return InputError(
        f"{origin}: is not UTF-8 text: byte {position:,} is 0x{byte:02x}; if it is in another "
        f"encoding, convert it{hint}"
    )


def decode(raw: bytes, origin: str, *, replace: bool = False, hint: str = "") -> str:
    """`decoded`, for bytes in memory."""
    return "".join(decoded([raw], origin, replace=replace, hint=hint))
