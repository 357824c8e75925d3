"""Damaged and forged prepared corpora. What a clear error is: see `bad_input.py`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from bad_input import (
    ODD_KINDS,
    WRONG_JSON,
    call,
    corrupted_copy,
    is_clear,
    must_be_clear,
    put,
    refused,
    seal_again,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import Config
from gpt.data.preparation import find, prepare


@pytest.fixture(scope="module")
def original(smallest: Config) -> Path:
    """The prepared corpus."""
    prepare(smallest.data)
    folder = find(smallest.data)
    assert folder is not None
    return folder


# -- By the thousand ---------------------------------------------------------------------------


@tries(0.14)
@given(data=st.data())
def test_a_corrupted_corpus(original: Path, smallest: Config, data: st.DataObject):
    with corrupted_copy(data.draw, original) as folder:
        arguments = ("--data.cache-dir", folder.parent, "--dry-run")
        path = folder.parent / "c.yaml"
        path.write_text(smallest.to_yaml())
        must_be_clear("train.py", path, *arguments, folder=folder.parent)


# -- One by one --------------------------------------------------------------------------------


@pytest.fixture
def prepared(original: Path, smallest: Config, tmp_path: Path) -> Path:
    """A copy of the corpus."""
    (tmp_path / "c.yaml").write_text(smallest.to_yaml())
    return Path(shutil.copytree(original, tmp_path / "cache" / original.name))


def refused_corpus(prepared: Path, seal: bool = True) -> str:
    if seal:
        seal_again(prepared)
    config, cache = prepared.parents[1] / "c.yaml", prepared.parent
    error = refused("train.py", config, "--data.cache-dir", cache, "--dry-run", folder=cache)
    assert f"{prepared}: is damaged (" in error
    assert "delete the folder to prepare it again" in error
    return error


@pytest.mark.parametrize("change", [
    {"files": []}, {"files": {}}, {"files": 3}, {"others": {}}, {"others": []}, {"others": None},
    {"dtype": "object"}, {"dtype": "O"}, {"dtype": "int8"}, {"dtype": ["uint16"]}, {"dtype": None},
    {"others": {"tokenizer.json": {}, "counts.bin": {}}},
], ids=repr)  # fmt: skip
def test_a_corpus_of_wrong_types(change: dict[str, Any], prepared: Path):
    meta = json.loads((prepared / "meta.json").read_text())
    (prepared / "meta.json").write_text(json.dumps(meta | change))
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_corpus_whose_description_is_junk(text: str, prepared: Path):
    (prepared / "meta.json").write_text(text)
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "train/../val", "x\0"])
def test_a_corpus_reads_no_file_outside(name: str, prepared: Path):
    shutil.copy(prepared / "train.bin", prepared.parent / "outside.bin")
    meta = json.loads((prepared / "meta.json").read_text())
    meta["files"][0]["name"] = name
    (prepared / "meta.json").write_text(json.dumps(meta))
    assert "meta.json describes different files" in refused_corpus(prepared)


@pytest.mark.parametrize("name", ["tokenizer.json", "counts.bin", "train.bin", "val.bin"])
@pytest.mark.parametrize("target", ["/dev/zero", "itself", "folder"])
def test_a_corpus_with_a_link_in_a_files_place(name: str, target: str, prepared: Path):
    path = prepared / name
    path.unlink()
    if target == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if target == "itself" else target)
    refused_corpus(prepared, seal=False)


@pytest.mark.parametrize("value", [0, -1, 1, 10**15, 10**400, None, "1"], ids=repr)
@pytest.mark.parametrize("key", ["documents", "tokens", "bytes", "longest", "size"])
def test_a_corpus_of_wrong_numbers(key: str, value: object, prepared: Path):
    meta = json.loads((prepared / "meta.json").read_text())
    meta["files"][-1][key] = value
    (prepared / "meta.json").write_text(json.dumps(meta))
    if (key, value) not in [("longest", 0), ("longest", 1)]:  # which is only shown
        refused_corpus(prepared, seal=False)


def test_a_corpus_of_tokens_outside_the_vocabulary(prepared: Path):
    with (prepared / "train.bin").open("r+b") as file:
        file.seek(10)
        file.write(b"\xff\xfe")
    assert "train.bin contains the id 65279, outside the vocabulary" in refused_corpus(prepared)


@pytest.mark.parametrize("counts", [b"", b"\xff", b"\0"])
def test_a_corpus_of_forged_counts(counts: bytes, prepared: Path):
    path = prepared / "counts.bin"
    path.write_bytes(counts * path.stat().st_size)
    assert "counts.bin" in refused_corpus(prepared)


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", ["meta.json", "counts.bin", "tokenizer.json", "train.bin"])
def test_what_is_not_a_file_in_a_corpus(name: str, kind: str, prepared: Path):
    put(kind, prepared / name)
    config, cache = prepared.parents[1] / "c.yaml", prepared.parent
    began = time.process_time()
    answer = call("train.py", config, "--data.cache-dir", cache, "--dry-run")
    if name == "meta.json" and kind != "sparse":
        assert is_clear(answer)  # as if it were not prepared
    else:
        assert not is_clear(answer)
        assert name in answer.err
    assert time.process_time() - began < 10
