"""Sources: where documents come from. One entry of `SOURCES` each.

A source names the files that it reads, which tell a changed corpus from an unchanged one, and
yields documents. A document comes in pieces of bounded size, so that a file of any length is read
in constant memory, and ends where no token can cross (`gpt.data.tokenizer.pieces`).

Everything that can be wrong with a user's file is found here and named: the file, and the byte,
line, row or token. Not here: what bytes are as text (gpt/io/text.py), and what type token ids have
(token_files.py).
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import functools
import glob
import itertools
import json
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt.config import HubConfig, SourceConfig
from gpt.data import token_files
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import PIECE, pieces
from gpt.errors import InputError, UnreachableError, nearest, printable
from gpt.io import text
from gpt.io.files import open_regular
from gpt.io.text import CHUNK, HEAD
from gpt.io.wait import PATIENCE, wait_for

Read = Callable[[int], None]  # is told of each number of bytes that was read, for the progress

STALL = 60.0  # seconds without a row until a dataset counts as out of reach
RECORD = 2**25  # bytes of a record at most: it is read whole, and JSON takes up to 20 times as much
SPLIT = "a record is read whole: split it"
REPLACE = ", or data.invalid_text: replace reads it all the same"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        pieces: its text in order, or its token ids, to be read once. None of them is empty.
        size: UTF-8 bytes of all pieces, or number of token ids; may read the file to know.
        skipped: of a record without a text, which is left out, where it is.
    """

    pieces: Iterator[str] | Iterator[Tokens]
    size: Callable[[], int]
    skipped: str | None = None


@dataclass(frozen=True)
class Source:
    """One kind of source.

    Attributes:
        find: finds the files that `documents` will read. Its errors begin with the option that is
            wrong, such as "path: ".
        documents: the documents in them. The last argument is the id of the end-of-text token,
            which tells documents apart where the source is tokens already.
    """

    find: Callable[[SourceConfig], Found]
    documents: Callable[[SourceConfig, list[Path], Read, int], Iterator[Document]]


def _whole(value: object, where: str, config: SourceConfig) -> Document:
    """A document that is in memory, such as a field of a record; `where` names it in messages."""
    replace = config.invalid_text == "replace"
    if value is None and config.missing_text == "skip":
        return _skipped(where)
    if isinstance(value, bytes):
        try:
            value = value.decode(errors="replace" if replace else "strict")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise text.broken(where, error.start, byte, REPLACE) from None
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "a truth value", dict: "a mapping", list: "a list"}
        number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
        found = kind.get(type(value), number)
        way = "; data.missing_text: skip leaves such records out" if value is None else ""
        raise InputError(f"{where}: the field {config.text_field!r} is {found}, not a text{way}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            if not replace:
                raise InputError(
                    f"{where}: holds a broken character at {error.start}; "
                    "data.invalid_text: replace reads it all the same"
                ) from None
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    whole = value.removeprefix("\ufeff")
    return Document(pieces((whole,)), lambda: len(whole.encode()))


def _skipped(where: str) -> Document:
    return Document(iter(()), lambda: 0, skipped=where)


# ---------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Found:
    """The files of a source, in order.

    Attributes:
        files: what is read; empty for a dataset of the hub.
        folders: device and inode of each folder that was searched.
        left_out: what is not read of these folders, by the reason.
    """

    files: list[Path]
    folders: set[tuple[int, int]] = field(default_factory=set)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def has_searched(self, folder: Path) -> bool:
        status = folder.stat()
        return (status.st_dev, status.st_ino) in self.folders

    def describe_left_out(self) -> str:
        """Such as `hidden: 2 (in/.git, in/.env); named pipes: 1 (in/p)`; empty if nothing is."""
        return "; ".join(
            f"{reason}: {len(paths):,} ({', '.join(printable(str(path)) for path in paths[:3])}"
            f"{', ...' if len(paths) > 3 else ''})"
            for reason, paths in ((r, [*dict.fromkeys(p)]) for r, p in self.left_out.items())
        )


SPECIAL = "devices, sockets or named pipes"
DANGLING = "links that lead nowhere"
UNREADABLE = "unreadable"


def _find(config: SourceConfig, *suffixes: str) -> Found:
    """The files that `path` names; of a folder, all below it whose names end in `suffixes`.

    A file that is reached by several names, through links, is read once.
    """
    found = Found([])
    for name in config.path:
        path = Path(name)
        kind = _kind(path)
        if kind == "folder":
            files = []
            searched = Found([], left_out=found.left_out)  # another path may lie in this one
            for below in _walk(path, searched):
                if not suffixes or below.name.lower().endswith(suffixes):
                    files.append(below)
                else:
                    found.leave_out("other endings", below)
            found.folders.update(searched.folders)
        elif kind == "file":
            files = [path]
        else:
            files = [p for p in _matches(name, found) if _is_readable(p, found)]
        if not files:
            raise InputError(f"path: {name}: {_nothing(path, kind, suffixes, found)}")
        found.files.extend(sorted(files))
    found.files[:] = _once(found)
    return found


def _nothing(path: Path, kind: str, suffixes: tuple[str, ...], found: Found) -> str:
    """Why a path names no file to read."""
    others = found.describe_left_out()
    if kind == "folder":
        plain = [suffix for suffix in suffixes if not suffix.endswith(text.ENDINGS)]
        ending = f" ending in {' or '.join(plain)}" if plain else ""
        return f"holds no files{ending}" + (f"; left out: {others}" if others else "")
    if kind == SPECIAL:
        return "is a device, socket or named pipe, not a regular file"
    if kind == UNREADABLE:
        return "cannot be read: permission denied"
    if path.is_symlink():
        return "is a link that leads nowhere"
    where = f"left out: {others}" if others else f"looked from {Path.cwd()}"
    return f"no such file, folder or pattern ({where})"


def _kind(path: Path) -> str:
    """What a path leads to: "folder", "file", or why it cannot be read."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return UNREADABLE
    except (OSError, ValueError):  # nothing is there, links lead to each other, or no name at all
        return DANGLING
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return SPECIAL
    return "file" if os.access(path, os.R_OK) else UNREADABLE


def _is_readable(path: Path, found: Found) -> bool:
    """Whether a path is a file that can be read; what is neither that nor a folder is left out."""
    kind = _kind(path)
    if kind not in ("file", "folder"):
        found.leave_out(kind, path)
    return kind == "file"


def _walk(folder: Path, found: Found, *, follow: bool = True) -> Iterator[Path]:
    """The files below a folder. Links are followed, and no folder is searched twice."""
    folders, links = deque([folder]), deque[Path]()
    while folders or links:  # what is not a link comes first, so that a file has its own name
        folder = (folders or links).popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in found.folders:
                continue
            entries = sorted(folder.iterdir())
        except OSError:
            found.leave_out(UNREADABLE, folder)
            continue
        found.folders.add((status.st_dev, status.st_ino))
        for path in entries:
            if path.name.startswith("."):
                found.leave_out("hidden", path)
            elif _kind(path) != "folder":
                if _is_readable(path, found):
                    yield path
            elif not path.is_symlink():
                folders.append(path)
            elif follow:
                links.append(path)
            else:
                found.leave_out("linked folders", path)


def _matches(pattern: str, found: Found) -> Iterator[Path]:
    """As `glob.glob`, but links can form a loop.

    So below `**` no folder is searched twice for the same rest of the pattern.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    expects_hidden = any(part.startswith(".") for part in parts[at:])
    folders, links = deque[tuple[Path, tuple[str, ...]]](), deque[tuple[Path, tuple[str, ...]]]()

    def search(path: Path, patterns: tuple[str, ...]) -> None:
        if patterns and path.is_dir():  # links come last, so that a file has its own name
            (links if path.is_symlink() else folders).append((path, patterns))

    for root in glob.glob(str(Path(*parts[:at]))) if at else ["."]:
        search(Path(root), parts[at:])
    searched = set[tuple[int, int, int]]()
    while folders or links:
        folder, patterns = (folders or links).popleft()
        first, rest = patterns[0], patterns[1:]
        try:
            status = folder.stat()
            state = status.st_dev, status.st_ino, len(patterns)
            if state in searched:
                continue
            entries = sorted(folder.iterdir()) if glob.has_magic(first) else [folder / first]
        except OSError:
            found.leave_out(UNREADABLE, folder)
            continue
        searched.add(state)
        if first == "**" and rest:
            search(folder, rest)
        for path in entries:
            if path.name.startswith(".") and not first.startswith("."):
                if first == "**" and not expects_hidden:
                    found.leave_out("hidden", path)
            elif first == "**" or fnmatch(path.name, first):
                if not rest and os.path.lexists(path):
                    yield path
                search(path, patterns if first == "**" else rest)


def _once(found: Found) -> list[Path]:
    """The files, of each that is reached by several names the one without a link, or the first."""
    names: dict[tuple[int, int], list[Path]] = {}
    for path in dict.fromkeys(found.files):
        status = path.stat()
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    files = []
    for paths in names.values():
        own = next((p for p in paths if os.path.realpath(p) == os.path.abspath(p)), paths[0])
        for path in paths:
            if path != own:
                found.leave_out("links to a file that is read already", path)
        files.append(own)
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file that is open; what goes wrong while it is read is said of it."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _chunks(path: Path, read: Read = lambda count: None) -> Iterator[bytes]:
    """The bytes of a file, or what is compressed in it; `read` is told of the file's own."""
    with _opened(path) as file:
        before = 0
        for chunk in text.unpacked(file, str(path)):
            read(file.tell() - before)
            before = file.tell()
            yield chunk


def _lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends.

    Raises:
        InputError: one is longer than `RECORD` bytes; it may not end at all.
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
        if size > RECORD:
            raise InputError(f"{path}:{number}: is a line of more than {RECORD:,} bytes; {SPLIT}")
    if size:
        yield b"".join(rest)


def _text(path: Path, config: SourceConfig, read: Read = lambda count: None) -> Iterator[str]:
    """A file's text, a chunk at a time; a byte-order mark at its start is dropped."""
    return text.decoded(
        _chunks(path, read), str(path), replace=config.invalid_text == "replace", hint=REPLACE
    )


def _file(path: Path, config: SourceConfig, read: Read) -> Document:
    """A whole file as one document."""
    size = lambda: sum(len(text.encode()) for text in _text(path, config))  # noqa: E731
    return Document(pieces(_text(path, config, read)), size)


def _stdlib_files(config: SourceConfig) -> Found:
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
    return Found(sorted(files))


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
        chunks = _chunks(path, read)
        head = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
        text.check(head, str(path))
        if head.lstrip().startswith(b"["):
            raise InputError(
                f"{path}: is a JSON array, not JSON Lines (one object a line); "
                "convert it, for example by `jq -c '.[]' FILE > NEW.jsonl`"
            )
        lacking: InputError | None = None  # what the first record without the field would say
        has_field = False
        for number, line in enumerate(_lines(itertools.chain([head], chunks), path), 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            record = _record(line, where, config)
            if config.text_field in record:
                has_field = True
                yield _whole(record[config.text_field], where, config)
            else:
                lacking = lacking or _no_field(where, config, list(record))
                if config.missing_text == "refuse":
                    raise lacking
                yield _skipped(where)
        if lacking is not None and not has_field:
            raise lacking


def _record(line: bytes, where: str, config: SourceConfig) -> dict[str, Any]:
    """The object of one line of JSON."""
    try:
        errors = "replace" if config.invalid_text == "replace" else "strict"
        record = json.loads(line.decode(errors=errors))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 text (byte {error.start} of the line); if it is in another "
            f"encoding, convert it{REPLACE}"
        ) from None
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) and line.lstrip().startswith(b"{"):
            raise InputError(
                f"{where}: the JSON object does not end on its line ({error.msg}, column "
                f"{error.colno});\nJSON Lines have one object a line: `jq -c . FILE > NEW.jsonl` "
                "converts pretty-printed JSON"
            ) from None
        raise InputError(f"{where}: is not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond all bounds
        raise InputError(f"{where}: is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: is not a JSON object with fields")
    return record


ROWS = 8  # rows read at a time, so that even rows of `RECORD` bytes need little memory
SWOLLEN = 2**28, 200  # bytes and times its compressed size that no column chunk of texts has


def _parquet(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """One row, one document: the text in the column `text_field`."""
    import pyarrow
    from pyarrow import parquet

    name = config.text_field
    for path in files:
        _check_parquet(path)
        try:
            with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
                columns = file.schema_arrow.names
                if name not in columns:
                    raise _no_field(str(path), config, columns)
                if columns.count(name) > 1:
                    raise InputError(f"{path}: has {columns.count(name)} columns named {name!r}")
                _check_swelling(path, name, file.metadata)
                size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
                # Beside the column `a.b` this also reads the field b of a struct a, if there is one
                for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
                    read(size * (row + len(batch)) // rows - size * row // rows)
                    for scalar in batch.column(name):
                        row += 1
                        yield _whole(_value(scalar), f"{path}: row {row}", config)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: is not a whole Parquet file: {reason}") from None


def _check_parquet(path: Path) -> None:
    with _opened(path) as file:
        head = file.read(HEAD)
    if not head.startswith((b"PAR1", b"PARE")):
        found = text.recognise(head)
        what = found[0] if found else "text or another format" if head else "empty"
        raise InputError(f"{path}: is not a Parquet file: it is {what}")


def _check_swelling(path: Path, name: str, metadata: Any) -> None:
    """Refuse a few bytes that would be unpacked to what memory may not hold."""
    least, times = SWOLLEN
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            size, packed = column.total_uncompressed_size, column.total_compressed_size
            if column.path_in_schema == name and size > max(least, times * packed):
                raise InputError(
                    f"{path}: row group {number + 1} unpacks {packed:,} bytes of {name!r} to "
                    f"{size:,}, more than is safe to hold; write it in smaller row groups"
                )


def _value(scalar: Any) -> object:
    """A value of a column; of a text that is not UTF-8, the bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(getattr(scalar, "value", scalar).as_buffer())


def _no_field(where: str, config: SourceConfig, fields: list[str]) -> InputError:
    name, shown = config.text_field, ", ".join(fields[:8]) or "none"
    return InputError(
        f"{where}: has no field {name!r}{nearest(name, fields)}; data.text_field names it, "
        f"its fields: {shown}{', ...' if len(fields) > 8 else ''}"
    )


def _tokens(config: SourceConfig, files: list[Path], read: Read, end: int) -> Iterator[Document]:
    """Token ids, as nanoGPT writes them; end of text parts the documents."""
    for path in files:
        ids = token_files.open_ids(path, config.dtype, end + 1)
        start = 0
        for stop in _ends(ids, end, path):
            if stop > start:
                yield Document(_slices(ids[start:stop], read), (stop - start).__index__)
            start = stop + 1


def _slices(ids: Tokens, read: Read) -> Iterator[Tokens]:
    for start in range(0, len(ids), PIECE):
        piece = ids[start : start + PIECE]
        read(piece.nbytes)
        yield piece.astype(np.uint32)


def _ends(ids: Tokens, end: int, path: Path) -> Iterator[int]:
    """Where the documents end: the place of each end of text, and of the end of the file."""
    place = -1
    for at in range(0, len(ids), CHUNK):
        block = ids[at : at + CHUNK]
        for place in (at + np.flatnonzero((block >= end) | (block < 0))).tolist():
            if ids[place] != end:
                raise InputError(
                    f"{path}: token {place:,} is {ids[place]}, beyond a vocabulary of {end + 1:,};"
                    "\ndata.tokenizer and data.dtype must be those that made the file"
                )
            yield place
    if place != len(ids) - 1:
        yield len(ids)


# ---------------------------------------------------------------------------------------------
# The hub


def _hub_files(config: SourceConfig) -> Found:
    """Of a local folder its files; a name on the hub has none here.

    `datasets` does not follow links to folders, so they are left out.
    """
    found = Found([])
    folder = Path(config.hub.name or "")
    if folder.is_dir():
        found.files.extend(sorted(_walk(folder, found, follow=False)))
    return found


def commit(config: SourceConfig) -> str | None:
    """The commit that a dataset of the hub is at; where there is none, the revision asked for.

    Raises:
        InputError: there is no such dataset, or the hub does not answer within `PATIENCE`.
    """
    hub = config.hub
    if config.source != "hub" or _hub_files(config).files:
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
            for value in batch[config.text_field]:
                row += 1
                document = _whole(value, f"{hub.name}: row {row}", config)
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


JSONL = tuple(a + b for a in (".jsonl", ".ndjson") for b in ("", *text.ENDINGS))
SOURCES: dict[str, Source] = {
    "stdlib": Source(_stdlib_files, _stdlib),
    "text": Source(_find, _text_files),
    "jsonl": Source(lambda config: _find(config, *JSONL), _jsonl),
    "parquet": Source(lambda config: _find(config, ".parquet"), _parquet),
    "hub": Source(_hub_files, _hub),
    "tokens": Source(lambda config: _find(config, ".bin", ".npy"), _tokens),
}
