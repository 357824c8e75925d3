"""Sources: where documents come from. One entry of `SOURCES` each.

    document.py  what every source yields, and how a field of a record becomes one
    paths.py     which files data.path names, with folders, patterns and links
    text.py      text files, and Python's standard library
    jsonl.py, parquet.py, tokens.py    one file format each
    foreign_tokens.py  the type of the ids in token files of other programs
    hub.py       datasets of the Hugging Face hub

A source finds the files that it reads, whose sizes and times tell whether a corpus has changed, and
yields documents. A document comes in pieces of bounded size, so that a file of any length is read
in constant memory; pieces end where no token can cross (`gpt.data.tokenizer.pieces`).

Sources report everything that can be wrong with a user's file, naming the file and the byte, line,
row or token. Decoding bytes as text is in gpt/io/text.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.config import SourceConfig
from gpt.data.sources import hub, jsonl, parquet, text, tokens
from gpt.data.sources.document import Document, OnRead
from gpt.data.sources.paths import SourceFiles, find_files


@dataclass(frozen=True)
class Source:
    """One kind of source.

    Attributes:
        find: finds the files that `documents` will read. Its errors begin with the option that is
            wrong, such as "path: ".
        documents: yields the documents in these files. Calls the third argument with the number of
            bytes read; the last argument is the id of the end-of-text token, which separates
            documents in files of token ids.
    """

    find: Callable[[SourceConfig], SourceFiles]
    documents: Callable[[SourceConfig, list[Path], OnRead, int], Iterator[Document]]


SOURCES: dict[str, Source] = {
    "stdlib": Source(text.find_stdlib, text.stdlib_documents),
    "text": Source(find_files, text.documents),
    "jsonl": Source(lambda config: find_files(config, *jsonl.SUFFIXES), jsonl.documents),
    "parquet": Source(lambda config: find_files(config, ".parquet"), parquet.documents),
    "hub": Source(hub.find, hub.documents),
    "tokens": Source(lambda config: find_files(config, ".bin", ".npy"), tokens.documents),
}
