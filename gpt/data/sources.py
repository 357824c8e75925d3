"""Sources: where documents come from. One entry of `SOURCES` each.

A source names the files that it reads, which tell a changed corpus from an unchanged one, and
yields documents. A document comes in pieces of bounded size, so that a file of any length is read
in constant memory, and ends where no token can cross (`gpt.tokenizer.pieces`).

Everything that can be wrong with a user's file is found here and named: the file, and the byte,
line, row or token. Not here: tokens and token files (preparation.py).
"""

from __future__ import annotations

import ast
import codecs
import functools
import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.config import HubConfig, SourceConfig
from gpt.errors import InputError, UnreachableError, nearest
from gpt.tokenizer import PIECE, pieces
from gpt.wait import PATIENCE, wait_for

_ERRORS = {"refuse": "strict", "replace": "replace"}  # of decoding, by `invalid_text`

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Read = Callable[[int], None]  # is told of each number of bytes that was read, for the progress

STALL = 60.0  # seconds without a row until a dataset counts as out of reach
CHUNK = 2**17  # bytes read from a file at a time; of 2**20 the allocator kept twice the memory


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        pieces: its text in order, or its token ids, to be read once. None of them is empty.
        size: UTF-8 bytes of all pieces, or number of token ids; may read the file to know.
    """

    pieces: Iterator[str] | Iterator[Tokens]
    size: Callable[[], int]


@dataclass(frozen=True)
class Source:
    """One kind of source.

    Attributes:
        files: the files that `documents` will read, in order; empty for the hub. Its errors begin
            with the option that is wrong, such as "path: ".
        documents: the documents in them. The last argument is the id of the end-of-text token,
            which tells documents apart where the source is tokens already.
    """

    files: Callable[[SourceConfig], list[Path]]
    documents: Callable[[SourceConfig, list[Path], Read, int], Iterator[Document]]


def _whole(text: object, where: str, config: SourceConfig) -> Document:
    """A document that is in memory, such as a field of a record; `where` names it in messages."""
    if not isinstance(text, str):
        kind = {type(None): "null", bool: "a truth value", dict: "a mapping", list: "a list"}
        found = kind.get(type(text), "a number" if isinstance(text, int | float) else "no text")
        raise InputError(f"{where}: the field {config.text_field!r} is {found}, not a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            if config.invalid_text == "refuse":
                raise InputError(
                    f"{where}: holds a broken character at {error.start}; "
                    "data.invalid_text: replace reads it all the same"
                ) from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    whole = text
    return Document(pieces((whole,)), lambda: len(whole.encode()))


# ---------------------------------------------------------------------------------------------
# Files


def _paths(config: SourceConfig, *suffixes: str) -> list[Path]:
    """The files that `path` names; of a folder, all below it whose names end in `suffixes`."""
    files: list[Path] = []
    for name in config.path:
        path = Path(name)
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and _is_shown(p.relative_to(path))]
            found = [p for p in found if not suffixes or p.name.endswith(suffixes)]
        elif path.is_file():
            found = [path]
        else:
            found = [p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file()]
        if not found:
            kind = f" ending in {' or '.join(suffixes)}" if path.is_dir() and suffixes else ""
            what = f"holds no files{kind}" if path.is_dir() else "no such file, folder or pattern"
            raise InputError(f"path: {name}: {what} (looked from {Path.cwd()})")
        files += sorted(found)
    return list(dict.fromkeys(files))


def _is_shown(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _chunks(path: Path, read: Read = lambda count: None) -> Iterator[bytes]:
    """The bytes of a file, of a .gz file what is packed in it; `read` is told of the file's own."""
    try:
        with path.open("rb") as file:
            stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            before = 0
            while chunk := stream.read(CHUNK):
                read(file.tell() - before)
                before = file.tell()
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is no whole .gz file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path, read: Read) -> Iterator[bytes]:
    """The lines of a file, without their ends."""
    rest: list[bytes] = []
    for chunk in _chunks(path, read):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    if last := b"".join(rest):
        yield last


def _text(path: Path, config: SourceConfig, read: Read = lambda count: None) -> Iterator[str]:
    """A file's text, a chunk at a time; a byte-order mark at its start is no part of it."""
    replacing = config.invalid_text == "replace"
    decoder = codecs.getincrementaldecoder("utf-8")(_ERRORS[config.invalid_text])
    position = 0  # in the unpacked file, of the first byte that is not yet text
    for chunk in itertools.chain(_chunks(path, read), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at, byte = position + error.start, error.object[error.start]
            raise _no_text(path, at, byte) from None
        if not replacing and "\0" in text:
            raise _no_text(path, position + len(text.partition("\0")[0].encode()), 0)
        if text:
            yield text.removeprefix("\ufeff") if not position else text
        position += len(text.encode()) if not replacing else len(chunk)


def _no_text(path: Path, position: int, byte: int) -> InputError:
    return InputError(
        f"{path}: is no UTF-8 text: byte {position:,} is 0x{byte:02x}; "
        "data.invalid_text: replace reads it all the same"
    )


def _file(path: Path, config: SourceConfig, read: Read) -> Document:
    """A whole file as one document."""
    size = lambda: sum(len(text.encode()) for text in _text(path, config))  # noqa: E731
    return Document(pieces(_text(path, config, read)), size)


def _stdlib_files(config: SourceConfig) -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for folder, inside, names in os.walk(root):  # never into site-packages, which may be large
        inside[:] = [name for name in inside if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise InputError(
            f"source: stdlib found no Python sources in {root};\n"
            "use data.source: text with data.path, the files or folders to read"
        )
    return sorted(files)


def _stdlib(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """One file a document; of `pydoc_data`'s reference, kept as a dict literal, one topic each."""
    for path in files:
        if path.parent.name == "pydoc_data" and path.name == "topics.py":
            for node in ast.parse("".join(_text(path, config, read))).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    for topic in ast.literal_eval(node.value).values():
                        yield _whole(topic, str(path), config)
        else:
            yield _file(path, config, read)


def _text_files(
    config: SourceConfig, files: list[Path], read: Read, end: int
) -> Iterator[Document]:
    """One file, one document."""
    for path in files:
        yield _file(path, config, read)


def _jsonl(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """One line, one document: the text in the field `text_field` of its JSON object."""
    for path in files:
        for number, line in enumerate(_lines(path, read), 1):
            where = f"{path}:{number}"
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode(errors=_ERRORS[config.invalid_text]))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}: is no UTF-8 text (byte {error.start} of the line); "
                    "data.invalid_text: replace reads it all the same"
                ) from None
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{where}: is no JSON: {error.msg}, column {error.colno}"
                ) from None
            except (ValueError, RecursionError) as error:  # numbers and nesting beyond all bounds
                raise InputError(f"{where}: is no JSON that can be read: {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{where}: is no JSON object with fields")
            if config.text_field not in record:
                raise _no_field(where, config, list(record))
            yield _whole(record[config.text_field], where, config)


def _parquet(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """One row, one document: the text in the column `text_field`."""
    import pyarrow
    from pyarrow import parquet

    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                if config.text_field not in file.schema_arrow.names:
                    raise _no_field(str(path), config, file.schema_arrow.names)
                size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
                for batch in file.iter_batches(batch_size=32, columns=[config.text_field]):
                    read(size * (row + len(batch)) // rows - size * row // rows)
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield _whole(text, f"{path}: row {row}", config)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: is no whole Parquet file: {reason}") from None


def _no_field(where: str, config: SourceConfig, fields: list[str]) -> InputError:
    name, shown = config.text_field, ", ".join(fields[:8]) or "none"
    return InputError(
        f"{where}: has no field {name!r}{nearest(name, fields)}; data.text_field names it, "
        f"its fields: {shown}{', ...' if len(fields) > 8 else ''}"
    )


def _tokens(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """Token ids without a header, as nanoGPT writes them; end of text parts the documents."""
    dtype = np.dtype(config.dtype).newbyteorder("<")
    for path in files:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise InputError(f"{path}: {size:,} bytes are no whole number of {config.dtype} tokens")
        ids: Tokens = np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
        start = 0
        for stop in _ends(ids, end, path):
            if stop > start:
                yield Document(_slices(ids[start:stop], read), (stop - start).__index__)
            start = stop + 1


def _slices(ids: Tokens, read: Read) -> Iterator[Tokens]:
    for start in range(0, len(ids), PIECE):
        piece = ids[start : start + PIECE]
        read(piece.nbytes)
        yield piece


def _ends(ids: Tokens, end: int, path: Path) -> Iterator[int]:
    """Where the documents end: the place of each end of text, and of the end of the file."""
    place = -1
    for at in range(0, len(ids), CHUNK):
        block = ids[at : at + CHUNK]
        for place in (at + np.flatnonzero(block >= end)).tolist():
            if ids[place] > end:
                raise InputError(
                    f"{path}: token {place:,} is {ids[place]}, beyond a vocabulary of {end + 1:,};"
                    "\ndata.tokenizer and data.dtype must be those that made the file"
                )
            yield place
    if place != len(ids) - 1:
        yield len(ids)


# ---------------------------------------------------------------------------------------------
# The hub


def _hub_files(config: SourceConfig) -> list[Path]:
    """Of a local folder its files; a name on the hub has none here."""
    folder = Path(config.hub.name or "")
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.is_file() and _is_shown(p.relative_to(folder)))


def commit(config: SourceConfig) -> str | None:
    """The commit that a dataset of the hub is at; where there is none, the revision asked for.

    Raises:
        InputError: there is no such dataset, or the hub does not answer within `PATIENCE`.
    """
    hub = config.hub
    if config.source != "hub" or _hub_files(config):
        return hub.revision
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return hub.revision
    name = str(hub.name)
    try:
        return wait_for(
            lambda: HfApi().dataset_info(name, revision=hub.revision, timeout=PATIENCE).sha,
            PATIENCE,
        )
    except Exception as error:  # whatever the library raises; nothing else is run here
        raise _no_dataset(hub, error) from None


def _hub(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """One row, one document: the text in the field `text_field`."""
    import datasets

    hub, row = config.hub, 0
    load = functools.partial(
        datasets.load_dataset,
        *(hub.name, hub.config),
        split=hub.split,
        revision=hub.revision,
        streaming=hub.streaming,
    )
    try:
        batches = wait_for(load, STALL if hub.streaming else None).iter(batch_size=256)
        while (batch := wait_for(lambda: next(batches, None), STALL)) is not None:
            if config.text_field not in batch:
                raise _no_field(f"{hub.name}: row {row + 1}", config, list(batch))
            for text in batch[config.text_field]:
                row += 1
                document = _whole(text, f"{hub.name}: row {row}", config)
                read(document.size())
                yield document
    except InputError:
        raise
    except Exception as error:  # as above, also while rows are read
        raise _no_dataset(hub, error, row) from None


def _no_dataset(hub: HubConfig, error: Exception, rows: int = 0) -> InputError:
    """What went wrong with a dataset, and the ways on."""
    from huggingface_hub import constants, errors

    reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e is not None)
    reason = " ".join("; ".join(reasons).split())[:200]
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"data.hub.revision: {hub.name} has no {hub.revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(
            f"data.hub.name: {hub.name!r} is neither a folder here nor a dataset on the hub "
            "(or it is private, and HF_TOKEN does not open it)"
        )
    if isinstance(error, ValueError) and not rows:  # a configuration or split that is not there
        return InputError(f"data.hub: {hub.name}: {reason}")
    return UnreachableError(
        f"data.hub: {hub.name} cannot be read from {constants.ENDPOINT}"
        + (f" beyond row {rows:,}" if rows else "")
        + f" ({type(error).__name__}: {reason}).\nWithout a network: its Parquet or JSONL files, "
        "downloaded elsewhere, by data.source: parquet or jsonl; what is in the cache of "
        "`datasets`,\nby HF_HUB_OFFLINE=1 and data.hub.streaming: false; or a text of your own, by "
        "data.source: text, tokenized by a BPE that is trained on it (data.tokenizer: bpe)"
    )


SOURCES: dict[str, Source] = {
    "stdlib": Source(_stdlib_files, _stdlib),
    "text": Source(_paths, _text_files),
    "jsonl": Source(
        lambda config: _paths(config, ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), _jsonl
    ),
    "parquet": Source(lambda config: _paths(config, ".parquet"), _parquet),
    "hub": Source(_hub_files, _hub),
    "tokens": Source(lambda config: _paths(config, ".bin"), _tokens),
}
