from __future__ import annotations

import errno
import gzip
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock

from gpt.config import Config, DataConfig, SourceConfig
from gpt.data import build, cache, encode, preparation, prepared, token_files, vocabulary
from gpt.data.preparation import find, prepare
from gpt.data.prepared import Dataset
from gpt.data.sources import SOURCES
from gpt.data.token_files import Tokens
from gpt.data.tokenizer import TOKENIZERS, to_json
from gpt.errors import InputError, StoppedError
from gpt.io.console import Console


def text_config(folder: Path, *paths: object, **options: Any) -> DataConfig:
    tree = {"source": "text", "tokenizer": "bytes", "val_fraction": 0.3, **options}
    if paths:
        tree["path"] = [str(p) for p in paths]
    return DataConfig.model_validate({**tree, "cache_dir": str(folder / "cache")})


def texts(dataset: Dataset, tokens: Tokens) -> list[str]:
    joined = dataset.encoding.decode(tokens.tolist())
    assert joined.endswith("<|endoftext|>")
    return joined.split("<|endoftext|>")[:-1]


def left(config: DataConfig) -> list[str]:
    """The names in the cache folder."""
    folder = Path(config.cache_dir)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def interrupt(config: DataConfig) -> Path:
    """Stop a preparation after the tenth job; returns the half-prepared folder."""
    asked = iter(range(40))
    with pytest.raises(StoppedError):
        prepare(config, stop=lambda: next(asked) == 10)
    (building,) = left(config)
    return Path(config.cache_dir) / building


def learn_nothing(patch: pytest.MonkeyPatch, sample: list[str]) -> None:
    """Let the bpe tokenizer append the text that it would learn from to `sample`."""
    make: Any = lambda config, texts: sample.extend(texts)  # noqa: E731
    patch.setitem(TOKENIZERS, "bpe", replace(TOKENIZERS["bpe"], make=make))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 30 documents."""
    (tmp_path / "in").mkdir()
    for index in range(30):
        (tmp_path / f"in/{index:02}.txt").write_text(f"document number {index} " * (index + 1))
    return tmp_path


# -- What is in the files ----------------------------------------------------------------------


def test_tokens_are_the_documents_each_followed_by_end_of_text(folder: Path):
    dataset = prepare(text_config(folder, folder / "in"))
    (train,) = dataset.train
    expected = [path.read_text() for path in sorted((folder / "in").iterdir())]
    train_texts, val_texts = texts(dataset, train), texts(dataset, dataset.val)
    assert sorted(train_texts + val_texts) == sorted(expected)
    assert train_texts == [text for text in expected if text in train_texts]
    assert 0 < len(val_texts) < 20


def test_end_of_text_spelled_out_in_a_document_is_text(folder: Path):
    (folder / "in/00.txt").write_text("a <|endoftext|> in the middle")
    dataset = prepare(text_config(folder, folder / "in"))
    ends = sum(
        int((each == dataset.encoding.eot_token).sum()) for each in (*dataset.train, dataset.val)
    )
    assert ends == 30


def test_the_held_out_documents_do_not_depend_on_the_others(folder: Path):
    first = prepare(text_config(folder, folder / "in"))
    held_out = set(texts(first, first.val))
    (folder / "in/00.txt").unlink()
    second = prepare(text_config(folder, folder / "in"))
    assert held_out - set(texts(second, second.val)) <= {"document number 0 "}
    assert set(texts(second, second.val)) <= held_out


def test_a_val_fraction_of_half_holds_out_about_half_of_many_documents(folder: Path):
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(2000)))
    dataset = prepare(text_config(folder, path, source="jsonl", val_fraction=0.5))
    assert 900 < dataset.files[-1].documents < 1100


@pytest.mark.parametrize("text", ["0123456789", "é" * 10, "a" * 200_000, "日本語 " * 50_000])
def test_tail_splits_each_document(tmp_path: Path, text: str):
    (tmp_path / "a.txt").write_text(text)
    config = text_config(tmp_path, tmp_path / "a.txt", holdout="tail", val_fraction=0.2)
    dataset = prepare(config)
    (train,), (val,) = texts(dataset, dataset.train[0]), texts(dataset, dataset.val)
    assert train + val == text
    cut = int(len(text.encode()) * 0.8)
    assert cut - 4 < len(train.encode()) <= cut


def test_long_documents_are_tokenized_as_a_whole(tmp_path: Path):
    text = "".join(f"word{n} and\n  {n * n}; " for n in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "v.txt").write_text("word1 and")
    config = text_config(
        tmp_path, tmp_path / "a.txt", tokenizer="bpe", vocab_size=500, validation={"path": "x"}
    )
    config = config.model_copy(update={"validation": text_config(tmp_path, tmp_path / "v.txt")})
    dataset = prepare(config)
    expected = [*dataset.encoding.encode_ordinary(text), dataset.encoding.eot_token]
    assert dataset.train[0].tolist() == expected


def test_many_workers_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [f"{n} " * (n % 50) for n in range(3000)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    monkeypatch.setattr(encode, "JOB", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    dataset = prepare(text_config(tmp_path, path, source="jsonl", validation={"path": str(path)}))
    assert texts(dataset, dataset.train[0]) == [line for line in lines if line]


def test_several_sources_and_a_validation_source(folder: Path):
    (folder / "v.txt").write_text("validation")
    (folder / "b.jsonl").write_text('{"body": "from JSON"}\n')
    mix = [
        {"path": str(folder / "in"), "weight": 3},
        {"source": "jsonl", "path": str(folder / "b.jsonl"), "text_field": "body"},
    ]
    config = text_config(folder, mix=mix, validation={"path": str(folder / "v.txt")})
    dataset = prepare(config)
    assert [file.name for file in dataset.files] == ["train-0", "train-1", "val"]
    assert [file.documents for file in dataset.files] == [30, 1, 1]
    assert texts(dataset, dataset.train[1]) == ["from JSON"]
    assert texts(dataset, dataset.val) == ["validation"]
    assert dataset.weights == (0.75, 0.25)
    assert dataset.train_tokens == sum(map(len, dataset.train))
    other = [{**mix[0], "weight": 1}, mix[1]]
    again = text_config(folder, mix=other, validation={"path": str(folder / "v.txt")})
    assert find(again) == dataset.folder  # a weight changes no token


def test_held_out_documents_of_several_sources_are_joined(folder: Path):
    half = [{"path": str(folder / "in/0*.txt")}, {"path": str(folder / "in/[12]*.txt")}]
    mixed = prepare(text_config(folder, mix=half))
    whole = prepare(text_config(folder, folder / "in"))
    assert (mixed.val == whole.val).all()
    assert sum(file.documents for file in mixed.files) == 30


def test_token_files_of_other_programs_are_read(tmp_path: Path):
    ids = np.array([72, 105, 256, 33, 33, 256], "<u2")
    for name in ("train", "val"):
        (tmp_path / f"{name}.bin").write_bytes(ids.tobytes())
    config = text_config(
        tmp_path, tmp_path / "train.bin", source="tokens",
        validation={"path": str(tmp_path / "val.bin")},
    )  # fmt: skip
    dataset = prepare(config)
    assert dataset.train[0].tolist() == ids.tolist()
    assert texts(dataset, dataset.val) == ["Hi", "!!"]


def test_a_prepared_corpus_moves_as_tokens_with_its_vocabulary(folder: Path):
    first = prepare(text_config(folder, folder / "in", tokenizer="bpe", vocab_size=300))
    moved = text_config(
        folder, first.folder / "train.bin", source="tokens", tokenizer="file",
        vocabulary=str(first.folder / "tokenizer.json"),
        validation={"path": str(first.folder / "val.bin")},
    )  # fmt: skip
    second = prepare(moved)
    assert second.fingerprint == first.fingerprint
    assert second.files[0].sha256 == first.files[0].sha256


def test_bpe_learns_from_the_training_text_only(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ab" * 500 + "xyz" * 100)
    config = text_config(
        tmp_path, tmp_path / "a.txt", tokenizer="bpe", vocab_size=300, holdout="tail",
        val_fraction=0.25,
    )  # fmt: skip
    tokens = prepare(config).encoding.tokens
    assert b"ab" in tokens
    assert not [token for token in tokens if len(token) > 1 and b"x" in token[:1]][3:]


def test_bpe_learns_no_token_across_documents(tmp_path: Path):
    names = ["emma", "olivia", "ava"] * 300
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": n}) + "\n" for n in names))
    config = text_config(
        tmp_path, tmp_path / "a.jsonl", source="jsonl", tokenizer="bpe", vocab_size=600,
        validation={"path": str(tmp_path / "a.jsonl")},
    )  # fmt: skip
    tokens = prepare(config).encoding.tokens
    assert {b"emma", b"olivia", b"ava"} <= set(tokens)
    assert max(map(len, tokens)) == len("olivia")


@pytest.mark.parametrize("packed", [False, True])
def test_bpe_learns_from_a_sample_spread_evenly(tmp_path: Path, packed: bool):
    noise = np.random.default_rng(0)  # hardly shorter packed: Python 3.12 unpacks 128 KiB at a time
    text = "".join(f"{n:08d}-{noise.bytes(16).hex()} " for n in range(100_000))
    path = tmp_path / ("a.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    config = text_config(
        tmp_path, path, tokenizer="bpe", learn_bytes=200_000, validation={"path": str(path)}
    )
    sample: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        learn_nothing(patch, sample)
        vocabulary.train_tokenizer(config, cache.plan(config)[1])
    assert 195_000 < sum(map(len, sample)) < 205_000
    places = [int(part.split()[1][:8]) for part in sample]
    counts = np.histogram(places, bins=4, range=(0, 100_000))[0]
    assert counts.min() > 0.5 * counts.mean(), counts
    everything = config.model_copy(update={"learn_bytes": 10**9})
    with pytest.MonkeyPatch.context() as patch:
        sample.clear()
        learn_nothing(patch, sample)
        vocabulary.train_tokenizer(everything, cache.plan(config)[1])
    assert "".join(sample) == text


def test_chars_include_those_of_the_validation_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "v.txt").write_text("xyz")
    config = text_config(
        tmp_path, tmp_path / "a.txt", tokenizer="chars",
        validation={"path": str(tmp_path / "v.txt")},
    )  # fmt: skip
    dataset = prepare(config)
    assert texts(dataset, dataset.val) == ["xyz"]


def test_a_vocabulary_that_lacks_a_character_is_rejected(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    (tmp_path / "b.txt").write_text("abß" * 10)
    chars = text_config(tmp_path, tmp_path / "a.txt", tokenizer="chars", holdout="tail")
    (tmp_path / "t.json").write_text(to_json(prepare(chars).encoding))
    config = text_config(
        tmp_path, tmp_path / "b.txt", tokenizer="file", vocabulary=str(tmp_path / "t.json"),
        holdout="tail",
    )  # fmt: skip
    with pytest.raises(InputError, match="'ß' is not among the 3"):
        prepare(config)


def test_large_vocabularies_take_four_bytes_per_token(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 20000))) * 4)
    (tmp_path / "b.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + 50000))))
    paths = tmp_path / "a.txt", tmp_path / "b.txt"
    dataset = prepare(text_config(tmp_path, *paths, tokenizer="chars", holdout="tail"))
    assert dataset.train[0].dtype == np.uint32
    assert dataset.encoding.n_vocab == 70001


# -- Their description ----------------------------------------------------------------------


def test_meta_json_describes_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_files, "BLOCK", 50)
    config = text_config(folder, folder / "in", tokenizer="bpe", vocab_size=280)
    dataset = prepare(config)
    meta = json.loads((dataset.folder / "meta.json").read_text())
    assert (meta["dtype"], meta["vocabulary"]) == ("uint16", 280)
    for file, tokens in zip(dataset.files, (*dataset.train, dataset.val), strict=True):
        found = texts(dataset, tokens)
        path = dataset.folder / f"{file.name}.bin"
        assert file.documents == len(found)
        assert file.bytes == sum(len(text.encode()) for text in found)
        assert file.tokens == len(tokens) == path.stat().st_size // 2
        assert file.longest == max(len(dataset.encoding.encode(text)) for text in found)
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    joined = np.concatenate([*dataset.train, dataset.val])
    assert (dataset.counts.sum(0) == np.bincount(joined, minlength=280)).all()


def test_unigram_entropy_by_hand(tmp_path: Path):
    (tmp_path / "a.txt").write_text("aaab")
    (tmp_path / "v.txt").write_text("ab")
    config = text_config(
        tmp_path, tmp_path / "a.txt", tokenizer="chars",
        validation={"path": str(tmp_path / "v.txt")},
    )  # fmt: skip
    # Training: a 3, b 1, end 1 of 5; validation: one each. With 1 added: 4, 2, 2 of 8.
    expected = -(math.log(4 / 8) + 2 * math.log(2 / 8)) / 3
    assert prepare(config).unigram_entropy() == pytest.approx(expected)


def test_unigram_entropy_averages_several_sources_by_weight(tmp_path: Path):
    for name, text in (("a", "aaaa"), ("b", "bbbb"), ("v", "ab")):
        (tmp_path / name).write_text(text)
    for weight in (1.0, 3.0):
        mix = [{"path": str(tmp_path / "a"), "weight": weight}, {"path": str(tmp_path / "b")}]
        config = text_config(
            tmp_path, mix=mix, tokenizer="chars", validation={"path": str(tmp_path / "v")}
        )
        share = weight / (weight + 1)  # each: 5 and 1 and 2 of 8, with 1 added
        a, b = share * 5 / 8 + (1 - share) / 8, share / 8 + (1 - share) * 5 / 8
        expected = -(math.log(a) + math.log(b) + math.log(2 / 8)) / 3
        assert prepare(config).unigram_entropy() == pytest.approx(expected)


@pytest.mark.parametrize("different", [True, False])
def test_bpe_learns_from_a_limited_amount_of_distinct_long_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, different: bool
):
    """The trainer's memory grows with them, and not with words that repeat."""
    monkeypatch.setattr(vocabulary, "MAX_DISTINCT_BYTES", 50_000)
    words = (f"{number if different else 0:030d}" for number in range(10_000))
    (tmp_path / "a.txt").write_text("\n".join(words))
    config = text_config(tmp_path, tmp_path / "a.txt", tokenizer="bpe", holdout="tail")
    sample: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        learn_nothing(patch, sample)
        vocabulary.train_tokenizer(config, cache.plan(config)[1])
    size = sum(map(len, sample))
    assert 50_000 < size < 60_000 if different else size > 200_000


def test_a_long_training_of_the_tokenizer_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "PRINT_EVERY", 0.1)
    real = build.train_tokenizer
    monkeypatch.setattr(build, "train_tokenizer", lambda *a: time.sleep(0.5) or real(*a))
    prepare(text_config(folder, folder / "in"), Console())
    assert "still training the tokenizer (0:00)\n" in capsys.readouterr().err


# -- The cache ---------------------------------------------------------------------------------


def test_a_second_run_finds_the_prepared_corpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = text_config(folder, folder / "in")
    assert find(config) is None
    first = prepare(config, Console())
    assert "preparing 30 files with the bytes tokenizer" in capsys.readouterr().err
    monkeypatch.setattr(preparation, "Build", None)
    second = prepare(config, Console())
    assert capsys.readouterr().err == ""
    assert first.fingerprint == second.fingerprint
    assert find(config) == first.folder
    assert left(config) == [first.folder.name]


@pytest.mark.parametrize("change", ["file", "option", "one more", "field"])
def test_a_change_is_noticed(folder: Path, change: str):
    first = prepare(text_config(folder, folder / "in"))
    options: dict[str, Any] = {}
    if change == "file":
        before = (folder / "in/03.txt").stat()
        (folder / "in/03.txt").write_text("x" * before.st_size)
    elif change == "option":
        options = {"val_fraction": 0.5}
    elif change == "field":
        options = {"invalid_text": "replace"}
    else:
        (folder / "in/more.txt").write_text("more")
    second = prepare(text_config(folder, folder / "in", **options))
    assert first.folder != second.folder
    assert (first.fingerprint == second.fingerprint) == (change == "field")


def test_a_new_option_is_part_of_the_key_unless_it_is_listed(folder: Path):
    class Data(DataConfig):
        longest: int = 0

    def key(**options: object) -> str:
        tree = {"source": "text", "path": str(folder / "in"), **options}
        return cache.plan(Data.model_validate(tree))[0].name

    assert key(longest=1) != key()
    assert key(seed=1, windows="random") == key()


def test_the_fingerprint_is_of_the_files_not_of_their_description(folder: Path):
    config = text_config(folder, folder / "in")
    dataset = prepare(config)
    path = dataset.folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    assert prepare(config).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    "name", ["train.bin", "val.bin", "counts.bin", "tokenizer.json", "meta.json"]
)
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_is_rejected(folder: Path, name: str, damage: str):
    config = text_config(folder, folder / "in")
    path = prepare(config).folder / name
    content = path.read_bytes()
    before = path.stat()
    if damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "altered":
        path.write_bytes(content.replace(b"n", b"m", 1) if name != "counts.bin" else content[::-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path.unlink()
    if (name, damage) == ("meta.json", "missing"):
        assert find(config) is None
        return
    with pytest.raises(InputError, match=r"is damaged .*delete the folder to prepare it again"):
        prepare(config)


def test_a_large_file_is_hashed_again_only_if_it_was_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config = text_config(folder, folder / "in")
    path = prepare(config).folder / "train.bin"
    monkeypatch.setattr(token_files, "REHASH", 10)
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content[::-1])
    with pytest.raises(InputError, match=r"train\.bin has changed since it was written"):
        prepare(config)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    prepare(config)
    path.write_bytes(content)
    prepare(config)


# -- Interruptions and failures ----------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_stopped_anywhere_it_continues_to_the_same_result(
    folder: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "JOB", 100)
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 280}
    whole = prepare(text_config(folder / "whole", folder / "in", **options))
    config = text_config(folder, folder / "in", **options)
    learnt: list[int] = []
    real = build.train_tokenizer
    monkeypatch.setattr(build, "train_tokenizer", lambda *a: learnt.append(1) or real(*a))
    stops = 0
    while find(config) is None:
        learning = tokenizer == "bpe" and not stops  # which asks 30 times
        limit = 35 if learning else 7
        asked = iter(range(limit + 1))
        try:
            prepare(config, stop=lambda asked=asked, limit=limit: next(asked) == limit)
        except StoppedError:
            stops += 1
            (building,) = left(config)
            assert building.endswith(".building")
    pieced = prepare(config)
    assert stops > 2
    assert len(learnt) == 1
    assert pieced.fingerprint == whole.fingerprint
    assert [file.sha256 for file in pieced.files] == [file.sha256 for file in whole.files]
    assert left(config) == [pieced.folder.name]


def test_an_unresponsive_source_does_not_delay_a_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    never = threading.Event()

    def documents(*arguments: Any) -> Any:
        never.wait()
        return iter(())

    monkeypatch.setitem(SOURCES, "text", replace(SOURCES["text"], documents=documents))
    began = time.monotonic()
    with pytest.raises(StoppedError, match="stopped while preparing data"):
        prepare(text_config(folder, folder / "in"), stop=lambda: True)
    assert time.monotonic() - began < 4
    never.set()


def test_stopped_while_its_files_are_hashed_nothing_is_encoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config = text_config(folder, folder / "in")

    def stopped(*arguments: Any) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "write_meta", stopped)
        with pytest.raises(StoppedError):
            prepare(config)
    encoded: list[int] = []
    real = encode.encode_job
    monkeypatch.setattr(encode, "encode_job", lambda *a: encoded.append(1) or real(*a))
    dataset = prepare(config)
    assert not encoded
    assert dataset.fingerprint == prepare(text_config(folder / "whole", folder / "in")).fingerprint
    assert not {"progress.json", "revisions.json"} & {p.name for p in dataset.folder.iterdir()}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_training_of_a_tokenizer(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals
):
    text = "".join(random.Random(0).choices("ACGT", k=6_000_000))  # 10 s and more to learn from
    (tmp_path / "dna.txt").write_text(text)
    data = text_config(tmp_path, tmp_path / "dna.txt", tokenizer="bpe", holdout="tail")
    (tmp_path / "c.yaml").write_text(Config(data=data).to_yaml())
    command = [sys.executable, "-m", "gpt.data", str(tmp_path / "c.yaml")]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        assert "preparing" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(number)
        sent = time.monotonic()
        stderr = process.stderr.read()
    assert process.returncode == 75
    assert time.monotonic() - sent < 5
    assert stderr.split("\n", 1)[1].startswith(
        f"{number.name}: stopping; a second signal kills the process\n"
        f"python -m gpt.data: {preparation.STOPPED}"
    )


def test_tokens_written_after_the_last_saved_progress_are_written_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "JOB", 100)
    whole = prepare(text_config(folder / "whole", folder / "in"))
    config = text_config(folder, folder / "in")
    with (interrupt(config) / "train.bin").open("ab") as file:
        file.write(b"half-written" * 10_000)
    assert prepare(config).fingerprint == whole.fingerprint


def test_ids_that_an_interrupted_run_cannot_have_written_are_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "JOB", 100)
    config = text_config(folder, folder / "in")
    with (interrupt(config) / "train.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(
        InputError, match=r"train.bin: is damaged: it contains the id 65535, outside"
    ):
        prepare(config)
    assert not left(config)
    assert prepare(config)


def test_a_dataset_is_read_at_one_commit_in_all_runs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "JOB", 100)
    read: list[str | None] = []
    real = SOURCES["text"].documents

    def documents(config: SourceConfig, *rest: Any) -> Any:
        read.append(config.hub.revision)
        return real(config, *rest)

    monkeypatch.setitem(SOURCES, "text", replace(SOURCES["text"], documents=documents))
    config = text_config(folder, folder / "in", tokenizer="bpe", vocab_size=280)
    commits = iter("ab")
    monkeypatch.setattr(build, "resolve_commit", lambda config: next(commits))
    asked = iter(range(40))
    with pytest.raises(StoppedError):
        prepare(config, stop=lambda: next(asked) == 35)
    dataset = prepare(config)
    assert set(read) == {"a"}  # training the tokenizer, encoding, continuing
    assert len(read) >= 3
    assert json.loads((dataset.folder / "meta.json").read_text())["revisions"] == ["a"]


def test_a_file_that_changes_while_it_is_read_is_noticed(folder: Path):
    config = text_config(folder, folder / "in")

    def change() -> bool:
        (folder / "in/03.txt").write_text("changed")
        return False

    with pytest.raises(InputError, match="changed while it was read"):
        prepare(config, stop=change)
    assert left(config) == []


def test_a_folder_without_meta_json_is_an_error(folder: Path):
    config = text_config(folder, folder / "in")
    path = prepare(config).folder
    (path / "meta.json").unlink()
    with pytest.raises(InputError, match=r"it has no meta\.json"):
        prepare(config)


def test_stopped_while_a_tokenizer_is_trained_nothing_is_left(folder: Path):
    config = text_config(folder, folder / "in", tokenizer="bpe")
    with pytest.raises(StoppedError):
        prepare(config, stop=lambda: True)
    assert left(config) == []


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "no such file, folder or pattern"),
        (b"", {"holdout": "tail"}, "data: contains no text"),
        (b"", {"tokenizer": "chars"}, "data: contains no text"),
        (b"", {"tokenizer": "bpe"}, "data: contains no text"),
        (b"a", {"holdout": "tail"}, "no text is left for training"),
        (b"one document", {"val_fraction": 0.99}, "no text is left for training"),
        (b"good \xff bad", {"holdout": "tail"}, "byte 5"),
        (b"{}", {"source": "jsonl"}, "a.txt:1: has no field 'text'"),
        (b"\0\2", {"source": "tokens"}, "outside the vocabulary of 257"),
        (b"text", {"tokenizer": "file", "vocabulary": "none.json"}, "none.json: cannot be read"),
        (b"text", {"validation": {"path": "none.txt"}}, "none.txt: no such file"),
    ],
)
def test_bad_input_is_reported_and_leaves_nothing(
    tmp_path: Path, content: bytes | None, options: dict[str, Any], message: str
):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    config = text_config(tmp_path, tmp_path / "a.txt", **options)
    with pytest.raises(InputError) as caught:
        prepare(config)
    assert message in str(caught.value)
    assert left(config) == []


def test_a_folder_that_contains_the_cache_is_rejected(folder: Path):
    config = text_config(folder, folder)
    for _ in range(2):
        with pytest.raises(InputError, match=r"data\.path: .* contains data\.cache_dir"):
            prepare(config)


def test_errors_name_the_option_of_a_missing_file(folder: Path):
    none = str(folder / "none")
    for options, place in (
        ({"path": none}, r"^data\.path: "),
        ({"path": str(folder / "in"), "validation": {"path": none}}, r"^data\.validation\.path: "),
        ({"mix": [{"path": str(folder / "in")}, {"path": none}]}, r"^data\.mix\.1\.path: "),
    ):
        with pytest.raises(InputError, match=place):
            prepare(text_config(folder, **options))


def test_errors_name_an_empty_source_of_several(folder: Path):
    (folder / "empty.txt").write_text("")
    mix = [{"path": str(folder / "in")}, {"path": str(folder / "empty.txt")}]
    with pytest.raises(InputError, match=r"data\.mix\.1: no text is left for training"):
        prepare(text_config(folder, mix=mix))
    with pytest.raises(InputError, match=r"data\.validation: contains no text"):
        prepare(text_config(folder, folder / "in", validation={"path": str(folder / "empty.txt")}))


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_DISK = r"data\.cache_dir: .*cache: No space left on device"


def test_a_full_disk_is_reported_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = text_config(folder, folder / "in")
    monkeypatch.setattr(encode, "encode_job", full)
    with pytest.raises(InputError, match=f"{FULL_DISK}$"):
        prepare(config)
    assert left(config) == []


@pytest.mark.parametrize("part", ["encoding", "saving progress", "finalizing"])
def test_progress_saved_before_the_disk_was_full_is_kept(
    part: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "JOB", 100)
    whole = prepare(text_config(folder / "whole", folder / "in"))
    config = text_config(folder, folder / "in")
    encoded: list[int] = []
    encode_job, write_text = encode.encode_job, build.write_text

    def fills_the_disk(*arguments: Any) -> Any:
        encoded.append(1)
        return encode_job(*arguments) if len(encoded) < 10 or part != "encoding" else full()

    def fills_it_with_progress(path: Path, text: str) -> None:
        if path.name == build.PROGRESS and path.exists() and part == "saving progress":
            full()
        write_text(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SAVE_EVERY", 0.0)
        patch.setattr(encode, "encode_job", fills_the_disk)
        patch.setattr(build, "write_text", fills_it_with_progress)
        if part == "finalizing":
            patch.setattr(prepared, "summarize", full)
        with pytest.raises(InputError, match=f"{FULL_DISK}; the work so far is kept, and the"):
            prepare(config)
    (building,) = left(config)
    done = json.loads((Path(config.cache_dir) / building / build.PROGRESS).read_text())
    assert done["items"] > 0
    dataset = prepare(config)
    assert dataset.fingerprint == whole.fingerprint
    assert left(config) == [dataset.folder.name]


@pytest.mark.parametrize("content", ["{", "[]", None], ids=str)
@pytest.mark.parametrize("name", ["tokenizer.json", "progress.json", "revisions.json", "train.bin"])
def test_a_damaged_half_prepared_folder_is_prepared_from_scratch(
    name: str, content: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "JOB", 100)
    config = text_config(folder, folder / "in")
    path = interrupt(config) / name
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(
        InputError, match=r"building/.*; the next run prepares the data from scratch$"
    ):
        prepare(config)
    assert not left(config)
    assert prepare(config)


def test_a_second_preparation_at_the_same_time_is_rejected(
    folder: Path, environment: dict[str, str]
):
    config = text_config(folder, folder / "in")
    (folder / "c.json").write_text(config.model_dump_json())
    refused: list[str] = []
    program = (
        "import sys; from pathlib import Path; from gpt.config import DataConfig; "
        "from gpt.data.preparation import prepare; "
        "prepare(DataConfig.model_validate_json(Path(sys.argv[1]).read_text()))"
    )

    def second() -> bool:
        if not refused:
            command = [sys.executable, "-c", program, folder / "c.json"]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            refused.append(ran.stderr)
        return False

    dataset = prepare(config, stop=second)
    assert "another process is preparing this data" in refused[0]
    assert left(config) == [dataset.folder.name]


def test_a_stale_lock_does_not_block(folder: Path):
    config = text_config(folder, folder / "in")
    final, _ = cache.plan(config)
    final.parent.mkdir()
    path = final.with_name(f".{final.name}.lock")
    with FileLock(path):
        pass
    path.touch()
    assert left(config) == [path.name]
    prepare(config)
    assert left(config) == [final.name]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_killed_preparation_continues(
    tiny: Callable[..., Config], tmp_path: Path, environment: dict[str, str], number: signal.Signals
):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "some words to encode, and more of them; " * 40}) + "\n"
    path.write_text(line * 60_000)
    data = {"source": "jsonl", "path": [str(path)], "cache_dir": str(tmp_path / "cache")}
    config = tiny(data={**data, "holdout": "tail"})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "gpt.data", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    final, _ = cache.plan(config.data)
    building = final.with_name(f".{final.name}.building")
    while not (building / "train.bin").is_file() or not (building / "train.bin").stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 75, stderr
        assert preparation.STOPPED in stderr
    else:
        assert process.returncode == -signal.SIGKILL
    assert (building / "tokenizer.json").is_file()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert ("resuming an interrupted preparation" in again.stderr) == (number == signal.SIGTERM)
    files = json.loads((final / "meta.json").read_text())["files"]
    assert sum(file["documents"] for file in files) == 120_000
    assert sum(file["bytes"] for file in files) == 60_000 * 40 * 40
    assert left(config.data) == [final.name]


# -- Messages ----------------------------------------------------------------------------------


def test_files_left_out_and_records_skipped_are_reported_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "in/z.jsonl").write_text('{"text": null}\n{"text": "a text"}\n{"text": null}\n')
    options = {"source": "jsonl", "holdout": "tail", "missing_text": "skip"}
    config = text_config(folder, folder / "in", **options)
    prepare(config, Console())
    output = capsys.readouterr().err
    first = ", ".join(f"{folder}/in/{index:02}.txt" for index in range(3))
    assert f"left out: other suffixes: 30 ({first}, ...)\n" in output
    assert f"skipped 2 records without text: {folder}/in/z.jsonl:1 and others\n" in output
    prepare(config, Console())
    assert capsys.readouterr().err == ""


def test_a_cache_folder_that_is_a_loop_of_links_is_rejected(folder: Path):
    (folder / "cache").symlink_to("cache")
    with pytest.raises(InputError, match=r"cache: "):
        prepare(text_config(folder, folder / "in"))


def test_a_link_to_the_cache_is_rejected_like_the_cache_itself(folder: Path):
    (folder / "cache").mkdir()
    (folder / "in/link").symlink_to(folder / "cache")
    with pytest.raises(InputError, match=r"data.path: .* contains data.cache_dir"):
        prepare(text_config(folder, folder / "in"))


@pytest.mark.parametrize(
    ("options", "kind", "advice"),
    [
        ({"val_fraction": 1 - 1e-6}, "training", "lower data.val_fraction, or use data.holdout"),
        ({"val_fraction": 1e-6}, "validation", "raise data.val_fraction, or use data.holdout"),
        ({"val_fraction": 1 - 1e-6, "holdout": "tail"}, "training", "lower data.val_fraction$"),
    ],
)
def test_the_advice_leads_to_text_on_both_sides(
    tmp_path: Path, options: dict[str, Any], kind: str, advice: str
):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the document {name}")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(InputError, match=rf"left for {kind} (?s:.*)\n{advice}"):
        prepare(text_config(tmp_path, *paths, **options))
