from __future__ import annotations

import ast
import bz2
import glob
import gzip
import io
import json
import lzma
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save as save_safetensors

from gpt import config as configs
from gpt.config import DataConfig, SourceConfig, validate
from gpt.data.sources import SOURCES, jsonl, parquet
from gpt.data.sources import tokens as token_source
from gpt.data.sources.document import REMEDIES
from gpt.errors import InputError
from gpt.io.text import CHUNK, FORMATS


def config_of(source: str, *paths: object, **options: Any) -> SourceConfig:
    tree = {"source": source, "path": [str(path) for path in paths], **options}
    return SourceConfig.model_validate(tree)


def documents(config: SourceConfig, end: int = 256, on_read=lambda count: None) -> Iterator[Any]:
    source = SOURCES[config.source]
    for document in source.documents(config, source.find(config).files, on_read, end):
        parts = list(document.pieces)
        assert all(len(part) for part in parts)
        if parts and not isinstance(parts[0], str):
            assert document.size() == sum(map(len, parts))
            yield np.concatenate(parts).tolist()
        else:
            assert document.size() == sum(len(part.encode()) for part in parts)
            yield "".join(parts)


# -- Files -------------------------------------------------------------------------------------


def test_stdlib_is_the_interpreters_own_sources():
    config = DataConfig()
    files = SOURCES["stdlib"].find(config).files
    names = {path.name for path in files}
    assert {"ast.py", "decoder.py", "topics.py"} <= names
    assert files == sorted(files)
    assert not [p for p in files if {"test", "tests", "site-packages"} & set(p.parts[-4:])]
    assert sum(path.stat().st_size for path in files) > 8e6
    (ast_py,) = [path for path in files if path.parts[-2:] == (files[0].parent.name, "ast.py")]
    (document,) = SOURCES["stdlib"].documents(config, [ast_py], lambda count: None, 0)
    ast.parse("".join(map(str, document.pieces)))


def test_stdlibs_reference_texts_are_prose_not_a_dict():
    config = DataConfig()
    topics = [p for p in SOURCES["stdlib"].find(config).files if p.name == "topics.py"]
    found = SOURCES["stdlib"].documents(config, topics, lambda count: None, 0)
    texts = ["".join(map(str, document.pieces)) for document in found]
    assert len(texts) > 50
    assert not any("'" + r"\n" in text for text in texts[:5])


def test_text_is_files_folders_patterns_and_gz(tmp_path: Path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/b.txt").write_text("bé")
    (tmp_path / "in/deep/c.md").write_text("c")
    (tmp_path / "in/.hidden").write_bytes(b"\xff")
    (tmp_path / "in/a.gz").write_bytes(gzip.compress(b"packed ") + gzip.compress(b"twice"))
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfmark")
    assert list(documents(config_of("text", tmp_path / "in"))) == ["packed twice", "bé", "c"]
    named = config_of("text", tmp_path / "one.txt", tmp_path / "in/*.txt", tmp_path / "in/b.txt")
    assert list(documents(named)) == ["mark", "bé"]


def test_progress_counts_the_files_own_bytes(tmp_path: Path):
    text = "words and words " * 200_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}) + "\n" + '{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["abc"] * 5000}), tmp_path / "d.parquet")
    (tmp_path / "e.bin").write_bytes(np.arange(5000, dtype="<u2").tobytes())
    for name, kind in (("a.txt", "text"), ("b.gz", "text"), ("c.jsonl", "jsonl"),
                       ("d.parquet", "parquet"), ("e.bin", "tokens")):  # fmt: skip
        counts: list[int] = []
        list(documents(config_of(kind, tmp_path / name), 10_000, counts.append))
        assert sum(counts) == (tmp_path / name).stat().st_size, name


def test_jsonl_is_the_field_of_each_line(tmp_path: Path):
    lines = [{"text": "one\ntwo", "n": 1}, {"body": "b", "text": "\U0001f642"}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, lines)).encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\r\n')
    (tmp_path / "ignored.txt").write_text("no JSON")
    assert list(documents(config_of("jsonl", tmp_path))) == ["one\ntwo", "\U0001f642", "packed"]


def test_jsonl_lines_longer_than_a_chunk(tmp_path: Path):
    texts = ["x y " * 700_000, "short", "z " * 1_000_000]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(documents(config_of("jsonl", path))) == texts


def test_parquet_is_the_column(tmp_path: Path):
    texts = [f"row {n} é" for n in range(3000)]
    table = pa.table({"id": range(3000), "body": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    config = config_of("parquet", tmp_path, text_field="body")
    assert list(documents(config)) == texts


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_split_at_end_of_text(tmp_path: Path, dtype: str):
    ids = [5, 6, 256, 256, 7, 256, 8, 9]
    (tmp_path / "t.bin").write_bytes(np.array(ids, np.dtype(dtype)).tobytes())
    config = config_of("tokens", tmp_path / "t.bin", dtype=dtype)
    assert list(documents(config)) == [[5, 6], [7], [8, 9]]


def test_token_documents_cross_blocks(tmp_path: Path, monkeypatch):
    random = np.random.default_rng(0)
    ids = random.integers(0, 8, 1000).astype("<u2")
    (tmp_path / "t.bin").write_bytes(ids.tobytes())
    monkeypatch.setattr(token_source, "BLOCK", 7)
    monkeypatch.setattr(token_source, "PIECE", 3)
    found = list(documents(config_of("tokens", tmp_path / "t.bin"), end=7))
    expected = [[int(c) for c in part] for part in "".join(map(str, ids)).split("7") if part]
    assert found == expected


BAD_FILES = [
    ("text", "a.txt", b"good \xff bad", r"a.txt: is not UTF-8 text: byte 5 is 0xff; .*replace"),
    ("text", "a.txt", b"x" * 3_000_000 + b"\xe9\n", r"byte 3,000,000 is 0xe9"),
    ("text", "a.txt", "é".encode() * 800_000 + b"\xc3", r"byte 1,600,000 is 0xc3"),
    ("text", "a.txt", b"\xef\xbb\xbfabc\xff", r"byte 6 is 0xff"),
    ("text", "a.txt", "in UTF-16".encode("utf-16"), r"a.txt: is UTF-16 text, not "
     r"UTF-8 text; .*iconv -f UTF-16"),
    ("text", "a.txt", "é".encode() * 10 + b"\0", r"a.txt: contains a NUL byte at byte "
     r"20; delete NUL bytes, for example with .*, or set data.invalid_text: replace"),
    ("text", "a.gz", b"no gzip", r"a.gz: is not gzip-compressed, although its name says so"),
    ("text", "a.gz", b"", r"a.gz: is empty, not gzip-compressed as its name says; delete it"),
    ("text", "a.gz", gzip.compress(b"text " * 9999, mtime=0)[:-9],
     r"a.gz: is damaged or truncated \(gzip"),
    ("text", "a.gz", gzip.compress(b"\xff", mtime=0), r"a.gz: is not UTF-8 text: byte 0 is 0xff"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl:3: the JSON object "
     r"does not end on this line \(Expecting value, column 10\);\nJSON Lines has one"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n["text"]\n', r"a.jsonl:2: is not a JSON object"),
    ("jsonl", "a.jsonl", b'{"txt": "a", "n": 1}\n', r"a.jsonl:1: has no field 'text'; perhaps "
     r"you meant txt; set data.text_field to one of its fields: txt, n"),
    ("jsonl", "a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: the field 'text' is a number"),
    ("jsonl", "a.jsonl", b'{"text": null}\n', r"a.jsonl:1: the field 'text' is null"),
    ("jsonl", "a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: is not UTF-8 text: byte 10 is 0xff"),
    ("jsonl", "a.jsonl", b'{"text": "a\\ud800"}\n', r"a.jsonl:1: contains an invalid "
     r"character at position 1"),
    ("jsonl", "a.jsonl", b'{"a": ' + b"[" * 99_999, r"a.jsonl:1: cannot be parsed as JSON"),
    ("parquet", "a.parquet", b"PAR1 but no more", r"a.parquet: is a damaged Parquet file"),
    ("parquet", "a.parquet", b"", r"a.parquet: is not a Parquet file: it is empty"),
    ("tokens", "a.bin", b"abc", r"a.bin: 3 bytes are not a whole number of uint16 tokens"),
    ("tokens", "a.bin", b"\1\0\2\0\1\1", r"a.bin: token 2 is 257, outside the vocabulary of 257"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "content", "message"), BAD_FILES)
def test_errors_name_the_bad_file(
    tmp_path: Path, source: str, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(documents(config_of(source, tmp_path / name)))
    assert re.search(message, str(caught.value))
    assert len(str(caught.value).splitlines()) <= 3


def test_parquet_without_the_column_or_with_numbers_in_it(tmp_path: Path):
    pq.write_table(pa.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    for field, message in (
        ("text", "has no field 'text'; set data.text_field to one of its fields: body, n"),
        ("n", "a.parquet: row 1: the field 'n' is a number"),
        ("body", "a.parquet: row 2: the field 'body' is null"),
    ):
        with pytest.raises(InputError, match=message):
            list(documents(config_of("parquet", tmp_path, text_field=field)))


def test_invalid_text_is_replaced_on_request(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb\0")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\\ud800"}\n')
    replace = {"invalid_text": "replace"}
    text = config_of("text", tmp_path / "a.txt", **replace)
    assert list(documents(text)) == ["a\ufffdb\0"]
    jsonl = config_of("jsonl", tmp_path / "a.jsonl", **replace)
    assert list(documents(jsonl)) == ["\ufffd\ufffd"]


JAPANESE = "これは日本語の文章です。犬が庭を走り、猫は窓から外を見ていた。\n" * 9
OTHER_ENCODINGS = {
    "EBCDIC": ("Lines of plain text.\n" * 9).encode("cp500"),
    "Shift-JIS": JAPANESE.encode("shift-jis"),
    "UTF-16BE": JAPANESE.encode("utf-16-be"),
    "UTF-16LE": JAPANESE.encode("utf-16-le"),
    "KOI8-R": ("Все счастливые семьи похожи.\n" * 9).encode("koi8-r"),
}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_text_in_another_encoding_is_never_replaced(tmp_path: Path, source: str, encoding: str):
    path = tmp_path / "a.txt"
    path.write_bytes(OTHER_ENCODINGS[encoding])
    for invalid_text in ("refuse", "replace"):
        with pytest.raises(InputError, match=r"not UTF-8 text: \d\d% of its .*iconv") as caught:
            list(documents(config_of(source, path, invalid_text=invalid_text)))
        assert "replace" not in str(caught.value)


def test_a_few_invalid_bytes_are_replaced(tmp_path: Path):
    path = tmp_path / "a.txt"
    for content in ("Le café est fermé jusqu'à demain.\n" * 99, "ÄÖÜ"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match=r"data.invalid_text: replace"):
            list(documents(config_of("text", path)))
        [found] = documents(config_of("text", path, invalid_text="replace"))
        assert found == re.sub("[^ -~\n]", "\ufffd", content)


def test_replace_is_not_suggested_if_much_is_invalid_later(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"x" * CHUNK + JAPANESE.encode("shift-jis"))
    with pytest.raises(InputError, match=r"byte 131,072 is 0x82; .*convert it$"):
        list(documents(config_of("text", tmp_path)))


def test_a_row_of_bytes_that_begins_like_another_format_is_text(tmp_path: Path):
    pq.write_table(pa.table({"text": [b"a", b"\xff\xfea"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: row 2: is not UTF-8 text: byte 0 is 0xff"):
        list(documents(config_of("parquet", tmp_path)))
    replaced = config_of("parquet", tmp_path, invalid_text="replace")
    assert list(documents(replaced)) == ["a", "\ufffd\ufffda"]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "tokens"])
def test_errors_name_a_missing_path(tmp_path: Path, source: str):
    for path in ("nowhere", "no*where"):
        with pytest.raises(InputError, match="no such file, folder or pattern"):
            SOURCES[source].find(config_of(source, tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no files"):
        SOURCES[source].find(config_of(source, tmp_path / "empty"))


# -- Folders -----------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Links that loop, lead outside, lead nowhere or name a file twice; a pipe; a hidden folder."""
    folder = tmp_path / "in"
    for path in ("in/a/one.txt", "in/B.TXT", "outside/deep/two.txt", "in/.git/head.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(Path(path).stem)
    (folder / "a/loop").symlink_to(folder)
    (folder / "a/other-loop").symlink_to(folder)
    (folder / "0-linked").symlink_to(folder / "a")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "nowhere.txt").symlink_to(tmp_path / "none")
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    (folder / "0-again.txt").symlink_to(folder / "a/one.txt")
    os.mkfifo(folder / "pipe.txt")
    return folder


def test_a_folder_and_a_glob_read_linked_folders_and_each_file_once(odd_folder: Path):
    wanted = {"one", "B", "two"}
    for path in (odd_folder, odd_folder / "**/*", odd_folder / "**"):
        texts = list(documents(config_of("text", path)))
        assert sorted(texts) == sorted(wanted), path
    lower_case = list(documents(config_of("text", odd_folder / "**/*.txt")))
    assert sorted(lower_case) == ["one", "two"]


def test_paths_left_out_of_a_folder_are_counted_and_named(odd_folder: Path):
    found = SOURCES["text"].find(config_of("text", odd_folder))
    assert {reason: len(paths) for reason, paths in found.left_out.items()} == {
        "hidden": 1,
        "broken links": 2,
        "devices, sockets or named pipes": 1,
        "duplicate links to a file": 1,
    }
    assert odd_folder / "a/one.txt" in found.files  # by its own name
    assert f"hidden: 1 ({odd_folder}/.git)" in found.describe_left_out()
    assert "\n" not in found.describe_left_out()


def test_a_folder_listed_with_its_parent_is_read_once(odd_folder: Path):
    for paths in (["", "a"], ["a", ""], ["", ""], ["a", "a/loop"]):
        names = [str(odd_folder / path) for path in paths]
        found = SOURCES["text"].find(SourceConfig(source="text", path=names))
        texts = [path.read_text() for path in found.files]
        assert sorted(texts) == ["B", "one", "two"], paths
        assert found.has_searched(odd_folder)


def test_paths_left_out_of_a_folder_listed_twice_are_counted_once(odd_folder: Path):
    config = SourceConfig(source="text", path=[str(odd_folder)] * 2)
    assert f"hidden: 1 ({odd_folder}/.git)" in SOURCES["text"].find(config).describe_left_out()


def test_patterns_match_like_glob(tmp_path: Path):
    for name in ("a/b/c.txt", "a/c.txt", "a/.h/c.txt", "a/b/.x", "d.txt", "a/b/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in ("**/*.txt", "a/**/c.*", "**/b/*", "**", "a/**", "**/.h/*", "**/.x", "*/**/*.md",
                    "**/**/c.txt", "[ad]*/**/c.txt", "**/b/../c.txt", "a/**/b/**"):  # fmt: skip
        found = SOURCES["text"].find(config_of("text", tmp_path / pattern)).files
        names = glob.glob(str(tmp_path / pattern), recursive=True)
        assert sorted(map(str, found)) == sorted(n for n in set(names) if Path(n).is_file())


def test_a_pattern_finds_a_link_to_a_folder_that_was_searched(tmp_path: Path):
    for version in ("v1", "v3"):
        (tmp_path / "x" / version).mkdir(parents=True)
        (tmp_path / "x" / version / "a.txt").write_text(version)
    (tmp_path / "x/latest").symlink_to("v3")
    (tmp_path / "x/v1/loop").symlink_to(tmp_path)
    for pattern in ("*/latest/*.txt", "**/latest/*.txt", "**/latest/**", "**/*/latest/**/a.txt"):
        found = SOURCES["text"].find(config_of("text", tmp_path / pattern)).files
        assert found == [tmp_path / "x/latest/a.txt"], pattern


def test_a_pattern_terminates_among_many_loops_of_links(tmp_path: Path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        for other in "abcdefgh":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    (tmp_path / "h/end.txt").write_text("end")
    [found] = SOURCES["text"].find(config_of("text", tmp_path / "**/*/**/*/**/*.txt")).files
    assert found.samefile(tmp_path / "h/end.txt")


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "tokens"])
def test_errors_name_what_is_not_a_file(tmp_path: Path, source: str):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for path, message in (
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "link", "is a broken link"),
    ):
        with pytest.raises(InputError, match=message):
            SOURCES[source].find(config_of(source, path))


def test_suffixes_are_matched_case_insensitively(tmp_path: Path):
    for name in ("a.jsonl", "B.JSONL", "c.NdJson"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    with bz2.open(tmp_path / "D.JSONL.BZ2", "wt") as file:
        file.write('{"text": "packed"}')
    (tmp_path / "e.csv").write_text("text")
    config = config_of("jsonl", tmp_path)
    assert sorted(documents(config)) == ["B.JSONL", "a.jsonl", "c.NdJson", "packed"]
    found = SOURCES["jsonl"].find(config)
    assert found.left_out == {"other suffixes": [tmp_path / "e.csv"]}


# -- Other formats -----------------------------------------------------------------------------

LINES = b"line of text\n" * 20_000
PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_text_is_read_whatever_its_name(tmp_path: Path, packer: str):
    path, pack = tmp_path / "a.txt", PACKERS[packer]
    path.write_bytes(pack(LINES) + pack(b"second"))
    assert list(documents(config_of("text", path))) == [LINES.decode() + "second"]
    path.write_bytes(pack(LINES)[:-6])
    with pytest.raises(InputError, match=rf"is damaged or truncated \({packer}"):
        list(documents(config_of("text", path)))
    path.write_bytes(pack(pack(LINES)))
    with pytest.raises(InputError, match=rf"is {packer}-compressed, not UTF-8 text"):
        list(documents(config_of("text", path, invalid_text="replace")))


def saved(save: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")


FILES = {
    "UTF-16 text": "a text".encode("utf-16"),
    "UTF-16LE text": "a text without a mark\n".encode("utf-16-le"),
    "UTF-16BE text": "a text without a mark\n".encode("utf-16-be"),
    "UTF-32 text": "a text".encode("utf-32"),
    "UTF-32LE text": "a text without a mark\n".encode("utf-32-le"),
    "a Parquet file": saved(lambda f: pq.write_table(pa.table({"text": ["a"]}), f)),
    "a NumPy array": saved(lambda f: np.save(f, np.arange(5))),
    "a zip archive": saved(zipped),
    "a zip archive .or": b"PK\5\6" + bytes(18),  # empty
    "a pickle": pickle.dumps({"text": "a"}),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a safetensors file": save_safetensors({"a": np.zeros(3, np.float32)}),
    "a tar archive": tarfile.TarInfo("a.txt").tobuf(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_errors_name_other_formats_which_are_never_replaced(tmp_path: Path, source: str, name: str):
    path = tmp_path / "a.jsonl"
    for content in (FILES[name], gzip.compress(FILES[name])):
        path.write_bytes(content)
        for invalid_text in ("refuse", "replace"):
            with pytest.raises(InputError, match=f"is {name}.*, not UTF-8 text; "):
                list(documents(config_of(source, path, invalid_text=invalid_text)))


def test_each_format_has_a_remedy():
    of_any_text = [name for name in FORMATS if name.endswith((" text", "-compressed"))]
    assert {*FORMATS, "a tar archive", "a safetensors file"} == {*REMEDIES, *of_any_text}


@pytest.mark.parametrize("start", ["BZh, he said", "PAR1", "%PDF- is how PDFs begin", "GIF8", "MZ"])
def test_text_that_begins_like_another_format_is_text(tmp_path: Path, start: str):
    (tmp_path / "a.txt").write_text(start + " and goes on " * 1000)
    assert "".join(documents(config_of("text", tmp_path / "a.txt"))).startswith(start)


# -- Records -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', r"is a JSON array, not JSON Lines .*jq -c '\.\[\]'"),
        (b"\xef\xbb\xbf\n [\n", "is a JSON array"),
        (
            b'{\n  "text": "a"\n}\n',
            r":1: the JSON object does not end on this line (?s:.*)jq -c \.",
        ),
        (b'{"n": 1,\n "text": "a"}\n', "does not end on this line"),
    ],
)
def test_errors_name_json_that_is_not_json_lines(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(documents(config_of("jsonl", tmp_path / "a.jsonl")))


def test_an_endless_line_is_rejected(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 2**20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(50):
            file.write(b"a" * 2**20)
    counts: list[int] = []
    with pytest.raises(InputError, match=r"gz:2: the line is longer than 1,048,576 bytes"):
        list(documents(config_of("jsonl", path), on_read=counts.append))
    assert sum(counts) < path.stat().st_size / 2


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_records_without_text_are_skipped_on_request(tmp_path: Path, source: str):
    path, texts = tmp_path / "a", ["one", None, "two", None]
    if source == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + '{"n": 1}\n')
    else:
        pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(InputError, match=r"field 'text' is null.*data.missing_text: skip"):
        list(documents(config_of(source, path)))
    config = config_of(source, path, missing_text="skip")
    found = list(SOURCES[source].documents(config, [path], lambda count: None, 0))
    where = [document.skipped for document in found]
    rows = [None, f"{path}:2", None, f"{path}:4", f"{path}:5"]
    if source == "parquet":
        rows = [None, f"{path}: row 2", None, f"{path}: row 4"]
    assert where == rows
    assert [text for text in documents(config) if text] == ["one", "two"]


def test_a_field_that_no_record_has_is_an_error_even_if_records_are_skipped(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match="has no field 'text'; perhaps you meant txt"):
        list(documents(config_of("jsonl", tmp_path / "a.jsonl", missing_text="skip")))


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.binary(3)),
    ],
)
def test_columns_of_every_string_type_are_read(tmp_path: Path, kind: pa.DataType):
    values = [b"abc", b"de\n"] if "binary" in str(kind) else ["abc", "de\n"]
    pq.write_table(pa.table({"text": pa.array(values, kind)}), tmp_path / "a.parquet")
    assert list(documents(config_of("parquet", tmp_path))) == ["abc", "de\n"]


def test_a_flat_column_is_not_a_field_of_a_struct(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"doc": [{"text": "nested"}], "doc.text": ["flat"]}), path)
    assert list(documents(config_of("parquet", path, text_field="doc.text"))) == ["flat"]
    with pytest.raises(InputError, match="the field 'doc' is a mapping"):
        list(documents(config_of("parquet", path, text_field="doc")))


def test_errors_name_unusual_parquet_files(tmp_path: Path):
    path = tmp_path / "a.parquet"
    broken = [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, broken)}), path)
    with pytest.raises(InputError, match=r"row 1: is not UTF-8 text: byte 1 is 0xff"):
        list(documents(config_of("parquet", path)))
    assert list(documents(config_of("parquet", path, invalid_text="replace"))) == ["a\ufffdb"]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(table, path)
    with pytest.raises(InputError, match="has 2 columns named 'text'"):
        list(documents(config_of("parquet", path)))
    path.write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(InputError, match="is not a Parquet file: it is gzip-compressed"):
        list(documents(config_of("parquet", path)))


def test_a_parquet_file_that_decompresses_to_too_much_is_rejected_first(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(parquet, "MAX_CHUNK", 2**20)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * 2**22]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(
        InputError, match=r"row group 1 decompresses [\d,]+ bytes of 'text' to 4,194,"
    ):
        list(documents(config_of("parquet", path)))


# -- Options -----------------------------------------------------------------------------------


def test_sources_of_a_mix_and_validation_inherit_options():
    tree = {
        "source": "jsonl",
        "text_field": "body",
        "mix": [{"path": "a", "weight": 3}, {"path": ["b"], "text_field": "text"}],
        "validation": {"path": "v"},
    }
    config = validate(DataConfig, tree)
    assert [(s.source, s.path, s.text_field) for s in config.sources] == [
        ("jsonl", ("a",), "body"),
        ("jsonl", ("b",), "text"),
    ]
    assert config.weights == (0.75, 0.25)
    assert config.validation is not None
    assert (config.validation.source, config.validation.text_field) == ("jsonl", "body")
    again = validate(DataConfig, config.model_dump(mode="json"))
    assert again == config


def test_a_hub_dataset_and_its_validation_split():
    tree = {"source": "hub", "hub": {"name": "a/b"}, "validation": {"hub": {"split": "test"}}}
    config = validate(DataConfig, tree)
    assert config.hub.split == "train"
    assert config.validation is not None
    assert (config.validation.hub.name, config.validation.hub.split) == ("a/b", "test")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"source": "hub"}, "needs hub.name"),
        ({"source": "jsonl"}, "source: jsonl needs path"),
        ({"path": "a"}, "source: stdlib does not read path; source: text does"),
        ({"source": "text", "path": "a", "validation": {}}, "validation: source: text needs path"),
        ({"source": "text", "path": "a", "mix": [{"path": "b"}]}, "path and mix are both given"),
        ({"mix": [{"source": "text"}]}, "mix.0: source: text needs path"),
        ({"mix": [{"source": "txt", "path": "a"}]}, "mix.0.source: 'txt' is not one of"),
        ({"mix": [{"weight": -1}]}, "mix.0.weight: -1 is not between 1e-06 and 1e+06"),
        ({"mix": [{"pth": "a"}]}, "mix.0.pth: no such option; perhaps you meant mix.0.path"),
        ({"mix": 3}, "mix: must be a list"),
        ({"mix": {"source": "text"}}, "mix.0: source: text needs path"),
        ({"mix": "[{path: a"}, "mix: as YAML: line 1: expected ',' or '}'"),
        ({"validation": {"hub": 3}}, "validation.hub: must be a mapping"),
        ({"tokenizer": "file"}, "must be given together"),
        ({"vocabulary": "x.json"}, "must be given together"),
        ({"source": "tokens", "path": "a"}, "no text to train a bpe tokenizer on"),
        (
            {"source": "tokens", "path": "a", "dtype": "int8"},
            "dtype: must be uint16 or uint32",
        ),
    ],
)
def test_contradictory_options_are_rejected(tree: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        validate(DataConfig, tree)
    assert message in str(caught.value)


def test_a_mix_can_be_a_flag(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: text, tokenizer: bytes}\n")
    flags = {"data": {"mix": "[{path: a, weight: 2}, {path: b}]", "validation": "{path: v}"}}
    config = configs.load(path, flags)
    assert [source.path for source in config.data.sources] == [("a",), ("b",)]
    other = configs.load(path, {"data": {"path": "a"}})
    assert "data.mix" in config.differences(other)
    assert config.differences(other)["data.validation.path"] == (("v",), None)
