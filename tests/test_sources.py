from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt import config as configs
from gpt.config import DataConfig, SourceConfig, validate
from gpt.data import sources
from gpt.data.sources import SOURCES
from gpt.errors import InputError


def config_of(source: str, *paths: object, **options: Any) -> SourceConfig:
    tree = {"source": source, "path": [str(path) for path in paths], **options}
    return SourceConfig.model_validate(tree)


def documents(config: SourceConfig, end: int = 256, read=lambda count: None) -> Iterator[Any]:
    source = SOURCES[config.source]
    for document in source.documents(config, source.files(config), read, end):
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
    files = SOURCES["stdlib"].files(config)
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
    topics = [p for p in SOURCES["stdlib"].files(config) if p.name == "topics.py"]
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
def test_tokens_are_parted_at_end_of_text(tmp_path: Path, dtype: str):
    ids = [5, 6, 256, 256, 7, 256, 8, 9]
    (tmp_path / "t.bin").write_bytes(np.array(ids, np.dtype(dtype)).tobytes())
    config = config_of("tokens", tmp_path / "t.bin", dtype=dtype)
    assert list(documents(config)) == [[5, 6], [7], [8, 9]]


def test_token_documents_cross_blocks(tmp_path: Path, monkeypatch):
    random = np.random.default_rng(0)
    ids = random.integers(0, 8, 1000).astype("<u2")
    (tmp_path / "t.bin").write_bytes(ids.tobytes())
    monkeypatch.setattr(sources, "CHUNK", 7)
    monkeypatch.setattr(sources, "PIECE", 3)
    found = list(documents(config_of("tokens", tmp_path / "t.bin"), end=7))
    expected = [[int(c) for c in part] for part in "".join(map(str, ids)).split("7") if part]
    assert found == expected


BAD_FILES = [
    ("text", "a.txt", b"good \xff bad", r"a.txt: is no UTF-8 text: byte 5 is 0xff; .*replace"),
    ("text", "a.txt", b"x" * 3_000_000 + b"\xe9\n", r"byte 3,000,000 is 0xe9"),
    ("text", "a.txt", "é".encode() * 800_000 + b"\xc3", r"byte 1,600,000 is 0xc3"),
    ("text", "a.txt", b"\xef\xbb\xbfabc\xff", r"byte 6 is 0xff"),
    ("text", "a.txt", "in UTF-16".encode("utf-16"), r"byte 0 is 0xff"),
    ("text", "a.txt", "é".encode() * 10 + b"\0", r"byte 20 is 0x00"),
    ("text", "a.gz", b"no gzip", r"a.gz: is no whole .gz file"),
    ("text", "a.gz", gzip.compress(b"text " * 9999, mtime=0)[:-9], r"a.gz: is no whole .gz file"),
    ("text", "a.gz", gzip.compress(b"\xff", mtime=0), r"a.gz: is no UTF-8 text: byte 0 is 0xff"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl:3: is no JSON: Expecting "
     r"value, column 10"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n["text"]\n', r"a.jsonl:2: is no JSON object"),
    ("jsonl", "a.jsonl", b'{"txt": "a", "n": 1}\n', r"a.jsonl:1: has no field 'text'; perhaps "
     r"you meant txt; data.text_field names it, its fields: txt, n"),
    ("jsonl", "a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: the field 'text' is a number"),
    ("jsonl", "a.jsonl", b'{"text": null}\n', r"a.jsonl:1: the field 'text' is null"),
    ("jsonl", "a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: is no UTF-8 text \(byte 10"),
    ("jsonl", "a.jsonl", b'{"text": "a\\ud800"}\n', r"a.jsonl:1: holds a broken character at 1"),
    ("jsonl", "a.jsonl", b"[" * 99_999, r"a.jsonl:1: is no JSON"),
    ("parquet", "a.parquet", b"PAR1 but no more", r"a.parquet: is no whole Parquet file"),
    ("parquet", "a.parquet", b"", r"a.parquet: is no whole Parquet file"),
    ("tokens", "a.bin", b"abc", r"a.bin: 3 bytes are no whole number of uint16 tokens"),
    ("tokens", "a.bin", b"\1\0\2\0\1\1", r"a.bin: token 2 is 257, beyond a vocabulary of 257"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, source: str, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(documents(config_of(source, tmp_path / name)))
    assert re.search(message, str(caught.value))
    assert len(str(caught.value).splitlines()) <= 3


def test_parquet_without_the_column_or_with_numbers_in_it(tmp_path: Path):
    pq.write_table(pa.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    for field, message in (
        ("text", "has no field 'text'; data.text_field names it, its fields: body, n"),
        ("n", "a.parquet: row 1: the field 'n' is a number"),
        ("body", "a.parquet: row 2: the field 'body' is null"),
    ):
        with pytest.raises(InputError, match=message):
            list(documents(config_of("parquet", tmp_path, text_field=field)))


def test_what_is_no_text_is_replaced_on_request(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb\0")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\\ud800"}\n')
    replace = {"invalid_text": "replace"}
    text = config_of("text", tmp_path / "a.txt", **replace)
    assert list(documents(text)) == ["a\ufffdb\0"]
    jsonl = config_of("jsonl", tmp_path / "a.jsonl", **replace)
    assert list(documents(jsonl)) == ["\ufffd\ufffd"]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "tokens"])
def test_a_missing_path_is_named(tmp_path: Path, source: str):
    for path in ("nowhere", "no*where"):
        with pytest.raises(InputError, match="no such file, folder or pattern"):
            SOURCES[source].files(config_of(source, tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        SOURCES[source].files(config_of(source, tmp_path / "empty"))


# -- Options -----------------------------------------------------------------------------------


def test_sources_of_a_mix_and_validation_inherit_what_they_leave_out():
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
        ({"path": "a"}, "source: stdlib reads no path; source: text does"),
        ({"source": "text", "path": "a", "validation": {}}, "validation: source: text needs path"),
        ({"source": "text", "path": "a", "mix": [{"path": "b"}]}, "path and mix are both given"),
        ({"mix": [{"source": "text"}]}, "mix.0: source: text needs path"),
        ({"mix": [{"source": "txt", "path": "a"}]}, "mix.0.source: 'txt' is none of"),
        ({"mix": [{"weight": -1}]}, "mix.0.weight: -1 is not between 1e-06 and 1e+06"),
        ({"mix": [{"pth": "a"}]}, "mix.0.pth: no such option; perhaps you meant mix.0.path"),
        ({"mix": 3}, "mix: input should be a valid tuple"),
        ({"mix": {"source": "text"}}, "mix.0: source: text needs path"),
        ({"mix": "[{path: a"}, "mix: as YAML: line 1: expected ',' or '}'"),
        ({"validation": {"hub": 3}}, "validation.hub: must be a mapping"),
        ({"tokenizer": "file"}, "go together"),
        ({"vocabulary": "x.json"}, "go together"),
        ({"source": "tokens", "path": "a"}, "no text that a bpe tokenizer could learn from"),
        ({"source": "tokens", "path": "a", "dtype": "int8"}, "dtype: input should be 'uint16'"),
    ],
)
def test_options_that_make_no_sense(tree: dict[str, Any], message: str):
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
    assert "data.mix: " in "\n".join(config.differences(other))
    assert "data.validation.path: ('v',) -> None" in config.differences(other)
