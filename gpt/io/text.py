"""Text from bytes, read the same way wherever it enters: training files, records, prompts.

Text is UTF-8, plain or compressed (gzip, bzip2, xz, zstd, told by the first bytes, whatever the
name). A byte-order mark at its start is dropped. What is something else, such as UTF-16 or a
Parquet file, is recognised by its first bytes and named with what helps; only where nothing better
fits is the broken byte itself named.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from gpt.errors import InputError

CHUNK = 2**17  # bytes read at a time; of 2**20 the allocator kept twice the memory
HEAD = 2**12  # bytes at the beginning that tell what a file is

UNPACK = "extract the texts from it"
EXPORT = "export its texts as JSON Lines"
CONVERT = "convert it, for example by `iconv -f {} -t UTF-8 FILE > NEW`"
FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (  # first bytes, name, what helps
    ((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-32 text", CONVERT.format("UTF-32")),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", CONVERT.format("UTF-16")),
    ((b"PAR1",), "a Parquet file", "data.source: parquet trains on it"),
    ((b"ARROW1",), "an Arrow file", "save it as Parquet, which data.source: parquet trains on"),
    ((b"\x93NUMPY",), "a NumPy array", "data.source: tokens trains on it if it holds token ids"),
    ((b"PK\x03\x04", b"PK\x05\x06"), "a zip archive (or .docx, .epub, .npz, .pt)", UNPACK),
    ((b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"), "an archive", UNPACK),
    ((b"\x1f\x8b",), "gzip-compressed", "decompress it"),
    ((b"BZh",), "bzip2-compressed", "decompress it"),
    ((b"\xfd7zXZ\0",), "xz-compressed", "decompress it"),
    ((b"\x28\xb5\x2f\xfd",), "zstd-compressed", "decompress it"),
    ((b"\x04\x22\x4d\x18",), "lz4-compressed", "decompress it"),
    ((b"%PDF-",), "a PDF", "extract its text, for example by `pdftotext`"),
    ((b"\xd0\xcf\x11\xe0", b"{\\rtf"), "an office document", "save it as plain text"),
    ((b"SQLite format 3\0",), "an SQLite database", EXPORT),
    ((b"\x89HDF",), "an HDF5 file", EXPORT),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle", EXPORT),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "a picture", "leave it out"),
    ((b"\x7fELF", b"MZ"), "a program", "leave it out"),
)
FEW, RARE = 16, 0.2  # broken characters, and their share, that text may have at its beginning
CONTROLS = [chr(n) for n in (*range(1, 9), *range(14, 27))]  # that no text has
WIDE = {  # encoding -> bytes of a character, those that are zero in most, and one that is not
    "UTF-32LE": (4, (2, 3), 0),
    "UTF-32BE": (4, (0, 1), 3),
    "UTF-16LE": (2, (1,), 0),
    "UTF-16BE": (2, (0,), 1),
}


def recognise(head: bytes) -> tuple[str, str] | None:
    """What a file that begins with `head` is if it is not UTF-8 text, and what helps.

    None for UTF-8 text, and for bytes of which nothing better can be said.
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
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its end may be half a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _wide(head: bytes) -> tuple[str, str] | None:
    """UTF-16 or UTF-32 without a byte-order mark."""
    for encoding, (size, zeros, other) in WIDE.items():
        share = [head[place::size].count(0) * size / max(len(head), 1) for place in range(size)]
        if len(head) >= 8 and all(share[place] > 0.5 for place in zeros) and share[other] < 0.05:
            return f"{encoding} text", CONVERT.format(encoding)
    return None


def check(head: bytes, origin: str) -> None:
    """Refuse what begins as something other than UTF-8 text with perhaps a few broken bytes.

    Raises:
        InputError: naming the format or how much is broken, and what helps.
    """
    if (found := recognise(head)) is not None:
        raise InputError(f"{origin}: is {found[0]}, not UTF-8 text; {found[1]}")
    if share := _much_broken(head):
        raise InputError(
            f"{origin}: is not UTF-8 text: {share:.0%} of its beginning is not valid; "
            + CONVERT.format("ENCODING")
        )


def _much_broken(raw: bytes) -> float:
    """The share of broken and control characters in UTF-8 if that is more than text has, or 0."""
    if _is_text(raw):
        return 0.0
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw)
    broken = text.count("\ufffd") - raw.count("\ufffd".encode()) + sum(map(text.count, CONTROLS))
    return broken / len(text) if broken > max(FEW, RARE * len(text)) else 0.0


# ---------------------------------------------------------------------------------------------
# Compressed files


def _gzip(file: BinaryIO) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=file)


def _bzip2(file: BinaryIO) -> Any:
    import bz2  # not every Python was built with it, nor with lzma

    return bz2.BZ2File(file)


def _xz(file: BinaryIO) -> Any:
    import lzma

    return lzma.LZMAFile(file)


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


PACKED: dict[str, tuple[bytes, str, Callable[[BinaryIO], Any]]] = {  # name: first bytes, ending
    "gzip": (b"\x1f\x8b", ".gz", _gzip),
    "bzip2": (b"BZh", ".bz2", _bzip2),
    "xz": (b"\xfd7zXZ\0", ".xz", _xz),
    "zstd": (b"\x28\xb5\x2f\xfd", ".zst", _zstd),
}
ENDINGS = tuple(ending for _, ending, _ in PACKED.values())


def unpacked(file: BinaryIO, origin: str) -> Iterator[bytes]:
    """The bytes of a seekable file, or what is compressed in it, a chunk at a time.

    Raises:
        InputError: the compressed file is damaged or cut short, or its name says that it is
            compressed and it is not.
        OSError: it cannot be read.
    """
    head = file.read(HEAD)
    file.seek(0)
    packed = named = ""
    for name, (signature, ending, _) in PACKED.items():
        if head.startswith(signature) and not _is_text(head):
            packed = name
        if origin.lower().endswith(ending):
            named = name
    named = named or packed
    if named and not head:
        raise InputError(
            f"{origin}: is empty, and not {named}-compressed, as its name says; delete it, or get "
            "it again"
        )
    if named != packed:
        raise InputError(
            f"{origin}: is not {named}-compressed, as its name says"
            + (f", but {packed}-compressed" if packed else "")
            + "; rename it if it is whole"
        )
    if not packed:
        yield from iter(lambda: file.read(CHUNK), b"")
        return
    stream = PACKED[packed][2](file)
    try:
        yield from iter(lambda: stream.read(CHUNK), b"")
    except Exception as error:  # each library has its own for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{origin}: is damaged or cut short ({packed}: {error})") from None


# ---------------------------------------------------------------------------------------------
# Text


def decoded(
    chunks: Iterable[bytes], origin: str, *, replace: bool = False, hint: str = ""
) -> Iterator[str]:
    """The text of UTF-8 bytes, a chunk at a time, without a byte-order mark at its start.

    Args:
        origin: what a message calls them, such as the file's name.
        replace: broken bytes become U+FFFD. What is recognised as another format, or broken in
            large part at its beginning, is refused.
        hint: a way on that a message about a broken byte ends with, where few are broken.

    Raises:
        InputError: they are not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if replace else "strict")
    position = 0  # of the first byte that is not yet text
    for chunk in itertools.chain(chunks, [b""]):
        if not position:
            check(chunk, origin)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at, byte = position + error.start, error.object[error.start]
            raise broken(origin, at, byte, "" if _much_broken(chunk) else hint) from None
        if not replace and "\0" in text:
            at = position + len(text.partition("\0")[0].encode())
            raise InputError(
                f"{origin}: holds a NUL byte, as no text does: byte {at:,}; delete those bytes, "
                f"for example by `tr -d '\\000' < FILE > NEW`{hint}"
            )
        if text:
            yield text.removeprefix("\ufeff") if not position else text
        position += len(text.encode()) if not replace else len(chunk)


def broken(origin: str, position: int, byte: int, hint: str) -> InputError:
    """What is said of a byte that is not UTF-8."""
    return InputError(
        f"{origin}: is not UTF-8 text: byte {position:,} is 0x{byte:02x}; if it is in another "
        f"encoding, convert it{hint}"
    )


def decode(raw: bytes, origin: str, *, replace: bool = False, hint: str = "") -> str:
    """The same of bytes that are in memory."""
    return "".join(decoded([raw], origin, replace=replace, hint=hint))
