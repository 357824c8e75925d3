"""Documents, which every source yields, and how the field of a record becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpt.config import SourceConfig
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import pieces
from gpt.errors import InputError, nearest
from gpt.io.text import decode_part

OnRead = Callable[[int], None]  # called with the number of bytes just read, to report progress

INVALID_TEXT_HINT = ", or set data.invalid_text: replace"
UNPACK, EXPORT = "extract the texts from it", "export its texts as JSON Lines"
REMEDIES = {  # by format, what to do with a file that is not text
    "a Parquet file": "use data.source: parquet",
    "an Arrow file": "save it as Parquet and use data.source: parquet",
    "a NumPy array": "if it contains token ids, use data.source: tokens",
    "a zip archive (or .docx, .epub, .npz, .pt)": UNPACK,
    "an archive": UNPACK,
    "a tar archive": UNPACK,
    "a PDF": "extract its text, for example with `pdftotext`",
    "an office document": "save it as plain text",
    "an SQLite database": EXPORT,
    "an HDF5 file": EXPORT,
    "a pickle": EXPORT,
    "a picture": "leave it out",
    "a program": "leave it out",
    "a safetensors file": "leave it out",
}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        pieces: its text or its token ids, in order; can be iterated once. No piece is empty.
        size: returns the number of UTF-8 bytes, or of token ids, in all pieces; may read the file.
        skipped: where the record is, if it has no text and is left out; otherwise None.
    """

    pieces: Iterator[str] | Iterator[Tokens]
    size: Callable[[], int]
    skipped: str | None = None


def skipped_document(origin: str) -> Document:
    """A record without text, which is counted and left out."""
    return Document(iter(()), lambda: 0, skipped=origin)


def document_from_field(value: object, origin: str, config: SourceConfig) -> Document:
    """The document in a record's text field.

    Args:
        value: the field's value.
        origin: where the record is, such as `FILE:LINE`, for messages.

    Raises:
        InputError: the value is not a string, or not valid Unicode and `invalid_text` is "refuse".
    """
    if value is None and config.missing_text == "skip":
        return skipped_document(origin)
    replace = config.invalid_text == "replace"
    if isinstance(value, bytes):
        value = decode_part(value, origin, replace=replace, hint=INVALID_TEXT_HINT)
    if not isinstance(value, str):
        hint = "; set data.missing_text: skip to skip such records" if value is None else ""
        raise InputError(
            f"{origin}: the field {config.text_field!r} is {_type_of(value)}, not a string{hint}"
        )
    whole = _without_surrogates(value, origin, replace).removeprefix("\ufeff")
    return Document(pieces((whole,)), lambda: len(whole.encode()))


def _without_surrogates(value: str, origin: str, replace: bool) -> str:
    """`value` without lone halves of surrogate pairs, which JSON can contain."""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if not replace:
            raise InputError(
                f"{origin}: contains an invalid character at position {error.start}; "
                "set data.invalid_text: replace to replace it"
            ) from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _type_of(value: object) -> str:
    kinds = {type(None): "null", bool: "a boolean", dict: "a mapping", list: "a list"}
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return kinds.get(type(value), number)


def missing_field(origin: str, config: SourceConfig, fields: list[str]) -> InputError:
    """The error about a record without the text field."""
    name, shown = config.text_field, ", ".join(fields[:8]) or "none"
    return InputError(
        f"{origin}: has no field {name!r}{nearest(name, fields)}; set data.text_field to one of "
        f"its fields: {shown}{', ...' if len(fields) > 8 else ''}"
    )
