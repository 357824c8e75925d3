from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt import data
from gpt.config import Config, DataConfig
from gpt.data import SOURCES, TrainingSequences, prepare, validation_sequences
from gpt.errors import InputError


def text_config(folder: Path, *paths: object, **options: Any) -> DataConfig:
    tree = {"source": "text", "tokenizer": "bytes", "val_fraction": 0.3, **options}
    tree |= {"path": [str(p) for p in paths], "cache_dir": str(folder / "cache")}
    return DataConfig.model_validate(tree)


def test_stdlib_is_the_interpreters_own_sources():
    config = DataConfig()
    files = SOURCES["stdlib"].files(config)
    names = {path.name for path in files}
    assert {"ast.py", "json", "decoder.py", "topics.py"} - names == {"json"}
    assert files == sorted(files)
    assert not [p for p in files if {"test", "tests", "site-packages"} & set(p.parts[-4:])]
    assert sum(path.stat().st_size for path in files) > 8e6
    source = next(path for path in files if path.name == "ast.py")
    (document,) = SOURCES["stdlib"].documents(source)
    ast.parse(document)


def test_stdlibs_reference_texts_are_prose_not_a_dict():
    topics = next(p for p in SOURCES["stdlib"].files(DataConfig()) if p.name == "topics.py")
    documents = list(SOURCES["stdlib"].documents(topics))
    assert len(documents) > 50
    assert not any("'" + r"\n" in document for document in documents[:5])


def test_tokens_are_the_documents_each_ended(tmp_path: Path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "three"), ("d", "four"), ("e", "five")):
        (tmp_path / f"{name}.txt").write_text(text)
    dataset = prepare(text_config(tmp_path, tmp_path / "*.txt", val_fraction=0.5))
    joined = [*dataset.encoding.decode(list(dataset.train)).split("<|endoftext|>")]
    held_out = [*dataset.encoding.decode(list(dataset.val)).split("<|endoftext|>")]
    assert joined[-1] == held_out[-1] == ""
    assert sorted(joined[:-1] + held_out[:-1]) == ["five", "four", "one", "three", "two"]
    assert len(dataset.train) == sum(map(len, joined)) + len(joined) - 1


def test_the_held_out_documents_do_not_depend_on_the_others(tmp_path: Path):
    for index in range(30):
        (tmp_path / f"{index:02}.txt").write_text(f"document number {index}")
    first = prepare(text_config(tmp_path, tmp_path / "*.txt"))
    held_out = set(first.encoding.decode(list(first.val)).split("<|endoftext|>"))
    (tmp_path / "00.txt").unlink()
    second = prepare(text_config(tmp_path, tmp_path / "*.txt"))
    again = set(second.encoding.decode(list(second.val)).split("<|endoftext|>"))
    assert held_out - again <= {"document number 0"}
    assert again <= held_out


def test_tail_splits_each_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("0123456789")
    dataset = prepare(text_config(tmp_path, tmp_path / "a.txt", holdout="tail", val_fraction=0.2))
    assert dataset.encoding.decode(list(dataset.train)) == "01234567<|endoftext|>"
    assert dataset.encoding.decode(list(dataset.val)) == "89<|endoftext|>"


def test_bpe_learns_from_the_training_text_only(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ab" * 500 + "xyz" * 100)
    config = text_config(
        tmp_path, tmp_path / "a.txt", tokenizer="bpe", vocab_size=300, holdout="tail",
        val_fraction=0.25,
    )  # fmt: skip
    tokens = prepare(config).encoding._mergeable_ranks
    assert b"ab" in tokens
    assert not [token for token in tokens if len(token) > 1 and b"x" in token[:1]][3:]


def test_a_second_start_finds_the_prepared_corpus(tmp_path: Path):
    source = tmp_path / "a.txt"
    source.write_text("text " * 50)
    config = text_config(tmp_path, source, holdout="tail")
    assert data.find(config) is None
    said: list[str] = []
    first = prepare(config, said.append)
    second = prepare(config, said.append)
    assert len(said) == 1
    assert first.fingerprint == second.fingerprint
    assert data.find(config) is not None
    assert [p for p in Path(config.cache_dir).iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("change", ["file", "option"])
def test_a_change_is_noticed(tmp_path: Path, change: str):
    source = tmp_path / "a.txt"
    source.write_text("text " * 50)
    first = prepare(text_config(tmp_path, source, holdout="tail"))
    if change == "file":
        source.write_text("more text " * 50)
        second = prepare(text_config(tmp_path, source, holdout="tail"))
    else:
        second = prepare(text_config(tmp_path, source, holdout="tail", val_fraction=0.5))
    assert first.fingerprint != second.fingerprint


def test_a_shortened_token_file_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text " * 50)
    config = text_config(tmp_path, tmp_path / "a.txt", holdout="tail")
    prepare(config)
    folder = data.find(config)
    assert folder is not None
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train\.bin holds"):
        prepare(config)


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 20000))) * 4)
    (tmp_path / "b.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + 50000))))
    config = text_config(tmp_path, tmp_path, tokenizer="chars", holdout="tail")
    dataset = prepare(config)
    assert dataset.train.dtype == np.uint32
    assert dataset.encoding.n_vocab == 70001


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "no such file, folder or pattern"),
        (b"", {"holdout": "tail"}, "no text was left for training"),
        (b"one document", {}, "no text was left for"),
        (b"good \xff bad", {"holdout": "tail"}, "byte 5"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, content: bytes | None, options: dict[str, Any], message: str
):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    config = text_config(tmp_path, tmp_path / "a.txt", **options)
    with pytest.raises(InputError) as caught:
        prepare(config)
    assert message in str(caught.value)
    cache = Path(config.cache_dir)
    assert not cache.exists() or list(cache.iterdir()) == []


TOKENS = np.arange(1000, dtype=np.uint16)


def starts(sequences: TrainingSequences, steps: range, size: int) -> list[int]:
    return [int(row[0]) for step in steps for row in sequences.batch(step, size)[0]]


def test_targets_are_the_inputs_one_on():
    x, y = TrainingSequences(TOKENS, 16, seed=0).batch(3, 4)
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == np.int64
    assert (y == x + 1).all()


def test_an_epoch_sees_every_window_once_and_the_next_from_another_offset():
    sequences = TrainingSequences(TOKENS, 16, seed=0)
    per_epoch = sequences.per_epoch
    assert per_epoch == 61
    first = starts(sequences, range(1, per_epoch + 1), 1)
    second = starts(sequences, range(per_epoch + 1, 2 * per_epoch + 1), 1)
    for epoch in (first, second):
        ordered = sorted(epoch)
        assert {b - a for a, b in itertools.pairwise(ordered)} == {16}
        assert ordered[-1] + 16 < 1000
        assert epoch != ordered
    assert min(first) % 16 != min(second) % 16


def test_batches_are_a_function_of_seed_and_step():
    one, two = (TrainingSequences(TOKENS, 16, seed=5) for _ in range(2))
    later = one.batch(40, 4)[0]
    for step in range(1, 40):
        two.batch(step, 4)
    assert (two.batch(40, 4)[0] == later).all()
    assert (TrainingSequences(TOKENS, 16, seed=6).batch(40, 4)[0] != later).any()


def test_the_stream_of_sequences_does_not_depend_on_the_batch_size():
    sequences = TrainingSequences(TOKENS, 16, seed=0)
    assert starts(sequences, range(1, 13), 4) == starts(sequences, range(1, 5), 12)


@pytest.mark.parametrize("count", [17, 18, 31, 32, 33, 48])
def test_small_corpora_stay_inside(count: int):
    sequences = TrainingSequences(TOKENS[:count], 16, seed=0)
    _, y = sequences.batch(1, 50)
    assert y.max() < count


def test_validation_sequences_are_spread_evenly():
    x, y = validation_sequences(TOKENS, 16, None)
    assert x[:, 0].tolist() == list(range(0, 62 * 16, 16))
    assert (y == x + 1).all()
    x, _ = validation_sequences(TOKENS, 16, 4)
    assert x[:, 0].tolist() == [0, 240, 496, 736]


def test_too_few_tokens_are_an_error():
    with pytest.raises(InputError, match="16 training tokens"):
        TrainingSequences(TOKENS[:16], 16, seed=0)
    with pytest.raises(InputError, match="16 validation tokens"):
        validation_sequences(TOKENS[:16], 16, None)


def test_the_sidecar_says_what_was_prepared(tiny: Callable[..., Config]):
    config = tiny().data
    prepare(config)
    folder = data.find(config)
    assert folder is not None
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == 40
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", 257)
