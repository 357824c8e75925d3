"""Text files, one document each: the user's, or those of Python's standard library."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gpt.config import SourceConfig
from gpt.data.sources.document import (
    INVALID_TEXT_HINT,
    REMEDIES,
    Document,
    OnRead,
    document_from_field,
)
from gpt.data.sources.paths import SourceFiles
from gpt.data.tokenizer import pieces
from gpt.errors import InputError
from gpt.io.files import open_regular, reading
from gpt.io.text import decoded, decompressed


def read_chunks(path: Path, on_read: OnRead = lambda count: None) -> Iterator[bytes]:
    """The contents of a file, decompressed; `on_read` counts the file's own bytes."""
    with reading(path), open_regular(path) as file:
        before = 0
        for chunk in decompressed(file, str(path)):
            on_read(file.tell() - before)
            before = file.tell()
            yield chunk


def documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """One document per file."""
    for path in files:
        yield _document(path, config, on_read)


def _document(path: Path, config: SourceConfig, on_read: OnRead) -> Document:
    size = lambda: sum(len(chunk.encode()) for chunk in _read_text(path, config))  # noqa: E731
    return Document(pieces(_read_text(path, config, on_read)), size)


def _read_text(
    path: Path, config: SourceConfig, on_read: OnRead = lambda count: None
) -> Iterator[str]:
    """A file's text, a chunk at a time, without a byte-order mark."""
    replace = config.invalid_text == "replace"
    return decoded(
        read_chunks(path, on_read),
        str(path),
        replace=replace,
        hint=INVALID_TEXT_HINT,
        remedies=REMEDIES,
    )


def find_stdlib(config: SourceConfig) -> SourceFiles:
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
    return SourceFiles(sorted(files))


def stdlib_documents(
    config: SourceConfig, files: list[Path], on_read: OnRead, end: int
) -> Iterator[Document]:
    """One document per file, and one per topic of `pydoc_data`, whose topics are in a dict."""
    for path in files:
        if path.parent.name == "pydoc_data" and path.name == "topics.py":
            for node in ast.parse("".join(_read_text(path, config, on_read))).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    for topic in ast.literal_eval(node.value).values():
                        yield document_from_field(topic, str(path), config)
        else:
            yield _document(path, config, on_read)
