"""Token files: the type of their ids is read from a header or checked, never guessed wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.data.sources.foreign_tokens import open_ids
from gpt.errors import InputError

GPT2 = 50_257
TYPES = {"<u2": "uint16", "<u4": "uint32", "<i8": "int64", ">u2": "big-endian uint16",
         ">u4": "big-endian uint32", "<f4": "float32", "<f8": "float64"}  # fmt: skip


def ids_of(vocabulary: int, count: int = 3000) -> Any:
    """Ids as frequent as words are: the lowest most often."""
    random = np.random.default_rng(0)
    return (vocabulary * random.random(count) ** 3).astype(np.int64)


def message(path: Path, dtype: str, vocabulary: int) -> str:
    with pytest.raises(InputError) as caught:
        open_ids(path, dtype, vocabulary)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("vocabulary", [66, 257, 2048, GPT2])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize("count", [64, 20_000])
def test_errors_name_the_type_of_ids(
    tmp_path: Path, made: str, dtype: str, vocabulary: int, count: int
):
    path = tmp_path / "t.bin"
    ids = ids_of(vocabulary, count)
    path.write_bytes(ids.astype(made).tobytes())
    if made == np.dtype(dtype).str:
        assert (open_ids(path, dtype, vocabulary) == ids).all()
    else:
        assert f"contains {TYPES[made]}" in message(path, dtype, vocabulary)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_errors_name_ids_beyond_16_bits(tmp_path: Path, dtype: str):
    path, vocabulary = tmp_path / "t.bin", 128_256
    ids = ids_of(vocabulary)
    path.write_bytes(ids.astype("<u4").tobytes())
    if dtype == "uint32":
        assert (open_ids(path, dtype, vocabulary) == ids).all()
    else:
        assert "set data.dtype: uint32" in message(path, dtype, vocabulary)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [5, 0, 7, 0],
        [0] * 5000,
        [7] * 5000,
        [0, 0, 0, 9] * 2000,
        [8224] * 5000,
        [1, 2, 3, 0] * 2000,
        [0] * 100_000 + [5, 6] * 50,
        [*range(257)] * 20,
        [0, 256] * 40 + [3, 4] * 10,
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_unusual_but_valid_files_are_accepted(tmp_path: Path, ids: list[int], dtype: str):
    path = tmp_path / "t.bin"
    path.write_bytes(np.array(ids, dtype).tobytes())
    assert open_ids(path, dtype, GPT2).tolist() == ids


@pytest.mark.parametrize("made", ["<u2", ">u4", "<i8", "<u8"])
def test_an_npy_header_states_the_type(tmp_path: Path, made: str):
    ids = ids_of(GPT2)
    np.save(tmp_path / "t.npy", ids.astype(made))
    assert (open_ids(tmp_path / "t.npy", "uint16", GPT2) == ids).all()
    whole = (tmp_path / "t.npy").read_bytes()
    (tmp_path / "t.npy").write_bytes(whole[:-8])
    assert "is truncated or damaged" in message(tmp_path / "t.npy", "uint16", GPT2)
    (tmp_path / "t.npy").write_bytes(whole.replace(b"}", b"(", 1))
    assert "is a damaged .npy file" in message(tmp_path / "t.npy", "uint16", GPT2)


@pytest.mark.parametrize("array", [np.zeros((3, 4), int), np.zeros(9), np.array(["a"], object)])
def test_arrays_that_are_not_ids_are_rejected(tmp_path: Path, array: Any):
    np.save(tmp_path / "t.npy", array)
    assert "token ids must be a one-dimensional array of integers" in message(
        tmp_path / "t.npy", "uint16", GPT2
    )


@pytest.mark.parametrize(("magic", "made"), [(20240520, "<u2"), (20240801, "<u4")])
def test_the_header_of_llm_c_is_not_read_as_tokens(tmp_path: Path, magic: int, made: str):
    ids, header = ids_of(GPT2), np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids)
    path = tmp_path / "t.bin"
    path.write_bytes(header.tobytes() + ids.astype(made).tobytes())
    assert (open_ids(path, "uint16", GPT2) == ids).all()
    path.write_bytes(path.read_bytes()[:-2])
    assert "is truncated or damaged" in message(path, "uint16", GPT2)


def test_meta_json_of_a_prepared_folder_states_the_type_and_the_vocabulary(tmp_path: Path):
    ids = ids_of(GPT2)
    (tmp_path / "train.bin").write_bytes(ids.astype("<u4").tobytes())
    meta = {"dtype": "uint32", "vocabulary": GPT2, "files": [{"name": "train"}]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert (open_ids(tmp_path / "train.bin", "uint16", GPT2) == ids).all()
    assert "was written with a vocabulary of 50,257" in message(
        tmp_path / "train.bin", "uint16", 300
    )


@pytest.mark.parametrize("content", [b"plain text, and no ids\n" * 9, b"\x1f\x8b\x08\0" * 9])
def test_files_that_are_not_token_ids_are_rejected(tmp_path: Path, content: bytes):
    (tmp_path / "t.bin").write_bytes(content)
    assert "not token ids" in message(tmp_path / "t.bin", "uint16", GPT2)


def test_the_sample_is_spread_over_a_large_file(tmp_path: Path):
    path = tmp_path / "t.bin"
    ids = np.zeros(3_000_000, "<u4")
    ids[1_000_000:] = ids_of(GPT2, 2_000_000)
    path.write_bytes(ids.tobytes())
    assert "set data.dtype: uint32" in message(path, "uint16", GPT2)


@pytest.mark.parametrize("made", [">u4", "<i8", "<f8", "<f4"])
def test_the_advice_to_convert_a_file_works(tmp_path: Path, made: str):
    ids = ids_of(GPT2)
    (tmp_path / "t.bin").write_bytes(ids.astype(made).tobytes())
    advice = message(tmp_path / "t.bin", "uint16", GPT2)
    assert (
        f"np.fromfile(FILE, '{made}').astype('uint32').tofile(NEW); then set data.dtype: uint32"
        in advice
    )
    np.fromfile(tmp_path / "t.bin", made).astype("uint32").tofile(tmp_path / "new.bin")
    assert (open_ids(tmp_path / "new.bin", "uint32", GPT2) == ids).all()
