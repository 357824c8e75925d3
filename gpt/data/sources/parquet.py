"""Parquet files: one document per row, in the column `text_field`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.config import SourceConfig
from gpt.data.sources.document import Document, OnRead, document_from_field, missing_field
from gpt.errors import InputError
from gpt.io.files import open_regular, reading
from gpt.io.text import CHUNK, HEAD, recognize

ROWS = 8  # rows read at a time, so that even very long rows need little memory
# A column chunk is rejected if it decompresses to more than this many bytes and more than this many
# times its compressed size, which text never does.
MAX_CHUNK, MAX_RATIO = 2**28, 200


def documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """One document per row.

    Raises:
        InputError: names the file that is damaged or lacks the column, or the row without text.
    """
    import pyarrow
    from pyarrow import parquet

    name = config.text_field
    for path in files:
        _check_format(path)
        try:
            with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
                columns = file.schema_arrow.names
                if name not in columns:
                    raise missing_field(str(path), config, columns)
                if columns.count(name) > 1:
                    raise InputError(f"{path}: has {columns.count(name)} columns named {name!r}")
                _check_decompressed_size(path, name, file.metadata)
                size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
                # With a column `a.b` this also reads the field b of a struct a, if there is one.
                for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
                    on_read(size * (row + len(batch)) // rows - size * row // rows)
                    for scalar in batch.column(name):
                        row += 1
                        yield document_from_field(_value(scalar), f"{path}: row {row}", config)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: is a damaged Parquet file: {reason}") from None


def _check_format(path: Path) -> None:
    with reading(path), open_regular(path) as file:
        head = file.read(HEAD)
    if not head.startswith((b"PAR1", b"PARE")):
        what = recognize(head) or ("text or another format" if head else "empty")
        raise InputError(f"{path}: is not a Parquet file: it is {what}")


def _check_decompressed_size(path: Path, name: str, metadata: Any) -> None:
    """Reject a few compressed bytes that would decompress to more than memory may hold."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            size, compressed = column.total_uncompressed_size, column.total_compressed_size
            if column.path_in_schema == name and size > max(MAX_CHUNK, MAX_RATIO * compressed):
                raise InputError(
                    f"{path}: row group {number + 1} decompresses {compressed:,} bytes of {name!r} "
                    f"to {size:,}, more than is safe; write smaller row groups"
                )


def _value(scalar: Any) -> object:
    """A value of a column; its bytes if it is a string that is not valid UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(getattr(scalar, "value", scalar).as_buffer())
