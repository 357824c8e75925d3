"""JSON Lines: one document per line, in the field `text_field` of its JSON object."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt.config import SourceConfig
from gpt.data.sources.document import (
    INVALID_TEXT_HINT,
    REMEDIES,
    Document,
    OnRead,
    document_from_field,
    missing_field,
    skipped_document,
)
from gpt.data.sources.text import read_chunks
from gpt.errors import InputError
from gpt.io import text

SUFFIXES = tuple(a + b for a in (".jsonl", ".ndjson") for b in ("", *text.SUFFIXES))
MAX_LINE = 2**25  # bytes: a line is parsed at once, and JSON takes up to 20 times its size


def documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """One document per line that is not blank.

    Raises:
        InputError: names the line that is not a JSON object or has no text; or a file in which no
            record has the field, even if records without text are skipped.
    """
    for path in files:
        first_error: InputError | None = None  # about the first record without the field
        has_field = False
        for number, line in enumerate(_lines(_checked_chunks(path, on_read), path), 1):
            origin = f"{path}:{number}"
            if not line.strip():
                continue
            record = _parse(line, origin, config)
            if config.text_field in record:
                has_field = True
                yield document_from_field(record[config.text_field], origin, config)
            else:
                first_error = first_error or missing_field(origin, config, list(record))
                if config.missing_text == "refuse":
                    raise first_error
                yield skipped_document(origin)
        if first_error is not None and not has_field:
            raise first_error


def _checked_chunks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """A file's contents without a byte-order mark; rejects other formats by their first bytes."""
    chunks = read_chunks(path, on_read)
    head = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
    text.check(head, str(path), REMEDIES)
    if head.lstrip().startswith(b"["):
        raise InputError(
            f"{path}: is a JSON array, not JSON Lines (one object per line); "
            "convert it, for example with `jq -c '.[]' FILE > NEW.jsonl`"
        )
    return itertools.chain([head], chunks)


def _lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file, without line terminators.

    Raises:
        InputError: a line is longer than `MAX_LINE` bytes, as in a file without line breaks.
    """
    rest: list[bytes] = []
    size, number = 0, 1
    for chunk in chunks:
        *ends, last = chunk.split(b"\n")
        for line in ends:
            yield b"".join((*rest, line))
            rest, size, number = [], 0, number + 1
        rest.append(last)
        size += len(last)
        if size > MAX_LINE:
            raise InputError(
                f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; split the record"
            )
    if size:
        yield b"".join(rest)


def _parse(line: bytes, origin: str, config: SourceConfig) -> dict[str, Any]:
    """The JSON object on one line."""
    replace = config.invalid_text == "replace"
    decoded = text.decode_part(line, origin, replace=replace, hint=INVALID_TEXT_HINT)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) and line.lstrip().startswith(b"{"):
            raise InputError(
                f"{origin}: the JSON object does not end on this line ({error.msg}, column "
                f"{error.colno});\nJSON Lines has one object per line: `jq -c . FILE > NEW.jsonl` "
                "converts pretty-printed JSON"
            ) from None
        raise InputError(f"{origin}: is not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, or brackets nested too deep
        raise InputError(f"{origin}: cannot be parsed as JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{origin}: is not a JSON object")
    return record
