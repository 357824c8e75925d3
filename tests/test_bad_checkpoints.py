"""Damaged and forged checkpoints. What a clear error is: see `bad_input.py`."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import (
    DEEP,
    HUGE_HEADER,
    ODD_HEADER,
    PICKLE,
    SHORT,
    WRONG_JSON,
    call,
    contents,
    corrupted_copy,
    is_clear,
    must_be_clear,
    newest,
    refused,
    resumed,
    seal_again,
    tries,
)
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt import checkpoint as checkpoints
from gpt.config import Config

# -- By the thousand ---------------------------------------------------------------------------


@tries(0.02)
@given(data=st.data())
def test_train_from_a_corrupted_checkpoint(
    smallest_runs: dict[str, Path], data: st.DataObject, no_pictures: None
):
    with corrupted_copy(data.draw, smallest_runs["stopped"]) as run:
        start = next((run / "checkpoints").glob("step-*"), run / "checkpoints/step-00000001")
        fresh = run.parent / "fresh"
        flags = ("--out-dir", fresh, "--resume", start)
        must_be_clear("train.py", smallest_runs["stopped"] / "config.yaml", *flags, folder=run)


# -- One by one --------------------------------------------------------------------------------


@pytest.fixture
def run(smallest_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(smallest_runs["finished"], tmp_path / "run"))


@pytest.fixture
def stopped(smallest_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(smallest_runs["stopped"], tmp_path / "run"))


class Touch:
    """What loading a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("what", ["pickle", "huge header", "odd header", "empty", "JSON", "zip"])
def test_a_checkpoint_without_tensors(what: str, sealed: bool, run: Path, tmp_path: Path):
    odd = {
        "pickle": pickle.dumps(Touch(tmp_path / "owned")),
        "huge header": HUGE_HEADER,
        "odd header": ODD_HEADER,
        "empty": b"",
        "JSON": b"{}",
        "zip": b"PK\x03\x04" + PICKLE,
    }
    (newest(run) / "model.safetensors").write_bytes(odd[what])
    if sealed:
        seal_again(run)
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{newest(run)}" in error
    assert "damaged" in error
    assert not (tmp_path / "owned").exists()


TOKENIZERS = {
    "deep": b"[" * DEEP,
    "list": b"[]",
    "no tokens": b'{"format": 1}',
    "tokens of numbers": b'{"format": 1, "end_of_text": 1, "name": "chars", "tokens": [1]}',
    "name": b'{"format": 1, "end_of_text": 1, "name": ["chars"], "pattern": "a", "tokens": ["a"]}',
    "pattern": b'{"format": 1, "end_of_text": 1, "name": "chars", "pattern": "(", "tokens": ["a"]}',
    "twice": b'{"format":1,"end_of_text":2,"name":"chars","pattern":".","tokens":["a","a"]}',
    "pattern of numbers": b'{"format":1,"end_of_text":1,"name":"chars","pattern":3,"tokens":["a"]}',
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_file_that_is_not_a_tokenizer(what: str, run: Path, smallest: Config, tmp_path: Path):
    """In a checkpoint with a matching manifest, and as data.vocabulary."""
    path = newest(run) / "tokenizer.json"
    path.write_bytes(TOKENIZERS[what])
    seal_again(run)
    assert "is not a tokenizer file" in refused("sample.py", run, *SHORT, folder=run)
    (tmp_path / "c.yaml").write_text(smallest.to_yaml())
    flags = ("--data.tokenizer", "file", "--data.vocabulary", path, "--dry-run")
    assert str(path) in refused("train.py", tmp_path / "c.yaml", *flags, folder=tmp_path)


@pytest.mark.parametrize("target", ["../../outside", "/etc", "step-00000002/..", "x\0", "\x1b[2J"])
def test_latest_leads_nowhere_else(target: str, run: Path):
    """If it does not name a checkpoint, the newest is used."""
    (run / "checkpoints" / "latest").write_text(target)
    assert call("sample.py", run, *SHORT).code == 0


def test_a_link_to_other_weights(run: Path, tmp_path: Path):
    (tmp_path / "other").write_bytes(b"secret")
    path = newest(run) / "model.safetensors"
    path.unlink()
    path.symlink_to(tmp_path / "other")
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{path}: is damaged" in error
    assert (tmp_path / "other").read_bytes() == b"secret"


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool", "float64", "float16"])
def test_weights_of_another_type(dtype: str, smallest: Config, stopped: Path):
    path = newest(stopped) / "model.safetensors"
    wrong = {key: value.to(getattr(torch, dtype)) for key, value in load_file(path).items()}
    save_file(wrong, path)
    seal_again(stopped)
    error = refused("sample.py", stopped, *SHORT, folder=stopped)
    assert f"its dtype is torch.{dtype}, not torch.float32" in error
    assert f"its dtype is torch.{dtype}, not torch.float32" in resumed(smallest, stopped)


@pytest.mark.parametrize("step", ["9" * 5000, "-1", "1.0", "5", "٤", "step-00000005", "worst"])
def test_a_checkpoint_that_is_not_there(step: str, run: Path):
    error = refused("sample.py", run, "--checkpoint", step, "--prompt", "a", folder=run)
    assert f"{run} has best, latest, " in error


def as_step(folder: Path, step: int) -> Path:
    """A copy of a checkpoint, as another step's."""
    copy = Path(shutil.copytree(folder, folder.with_name(f"step-{step:08d}")))
    for name in ("state.json", "manifest.json"):
        tree = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**tree, "step": step}))
    seal_again(copy)
    return copy


def test_sampling_retries_when_its_checkpoint_is_pruned(run: Path, monkeypatch: pytest.MonkeyPatch):
    folder, load, pruned = newest(run), checkpoints.load, []

    def meddle(path: Path, **options: Any) -> checkpoints.Checkpoint:
        if not pruned:
            pruned.append(path)
            checkpoints.write_pointers(folder.parent, as_step(folder, 9).name, best=True)
            checkpoints.prune(folder.parent, ())
        return load(path, **options)

    monkeypatch.setattr(checkpoints, "load", meddle)
    answer = call("sample.py", run, *SHORT)
    assert answer.code == 0, answer
    assert f"{run}, step 9" in answer.err
    assert not folder.exists()


def test_sampling_from_a_step_that_is_pruned_names_those_that_are_left(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    as_step(newest(run), 9)
    load = checkpoints.load

    def meddle(path: Path, **options: Any) -> checkpoints.Checkpoint:
        if path.exists():
            shutil.rmtree(path)
        return load(path, **options)

    monkeypatch.setattr(checkpoints, "load", meddle)
    error = call("sample.py", run, "--checkpoint", "9", "--prompt", "a").err
    assert f"--checkpoint 9: no such checkpoint; {run} has best, latest, " in error
    assert "damaged" not in error


def test_the_checkpoint_that_is_advised_is_not_the_damaged_one(run: Path):
    latest = newest(run)
    for path in (run / "checkpoints").glob("step-*"):
        if path != latest:
            shutil.rmtree(path)
    other = as_step(latest, 2)
    (latest / "state.json").write_text("[]")
    seal_again(latest)
    error = refused("sample.py", run, *SHORT, folder=run)
    assert f"{latest.name}: is damaged" in error
    assert "--checkpoint 2 is intact" in error
    (other / "state.json").write_text("[]")
    seal_again(other)
    assert "is intact" not in refused("sample.py", run, *SHORT, folder=run)


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_file_that_is_not_a_manifest(text: str, smallest: Config, stopped: Path):
    (newest(stopped) / "manifest.json").write_text(text)
    error = refused("sample.py", stopped, *SHORT, folder=stopped)
    assert f"{newest(stopped) / 'manifest.json'}: is damaged" in error
    assert "manifest.json" in resumed(smallest, stopped)


@pytest.mark.parametrize("prog", ["sample.py", "train.py"])
@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:8])
def test_a_state_of_the_wrong_types(text: str, prog: str, smallest: Config, stopped: Path):
    """A state of the wrong types with a manifest that matches it."""
    (newest(stopped) / "state.json").write_text(text)
    seal_again(stopped)
    if prog == "train.py":
        error = resumed(smallest, stopped)
    else:
        error = refused(prog, stopped, *SHORT, folder=stopped)
    assert newest(stopped).name in error


STATES = [
    {"format": None}, {"format": "3"}, {"step": "x"}, {"step": -1}, {"step": 10**30},
    {"progress": None}, {"progress": {"a": 1}}, {"progress": {"step": "x"}}, {"micro_batch": 0},
    {"micro_batch": "x"}, {"scaler": 3}, {"data_fingerprint": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=repr)
def test_a_state_with_a_wrong_value(change: dict[str, Any], smallest: Config, stopped: Path):
    path = newest(stopped) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal_again(stopped)
    if change == {"scaler": 3}:  # only fp16 reads it
        assert call("train.py", stopped / "config.yaml", "--out-dir", stopped).code in (0, 2)
    else:
        resumed(smallest, stopped)


@pytest.mark.parametrize("key", ["format", "step", "progress", "micro_batch", "data_fingerprint"])
def test_a_state_without_a_part(key: str, smallest: Config, stopped: Path):
    path = newest(stopped) / "state.json"
    tree = json.loads(path.read_text())
    del tree[key]
    path.write_text(json.dumps(tree))
    seal_again(stopped)
    assert newest(stopped).name in resumed(smallest, stopped)


@pytest.mark.parametrize("other", ["model", "optimizer"])
@pytest.mark.parametrize("what", ["other shapes", "other names", "none"])
def test_tensors_of_another_model(what: str, other: str, smallest: Config, stopped: Path):
    """Intact safetensors files of another model, with a matching manifest, when resuming."""
    path = newest(stopped) / f"{other}.safetensors"
    tensors = load_file(path)
    if what == "other shapes":
        tensors = {key: value.flatten().repeat(2) for key, value in tensors.items()}
    elif what == "other names":
        tensors = {f"x{key}": value for key, value in tensors.items()}
    else:
        tensors = {}
    save_file(tensors, path)
    seal_again(stopped)
    resumed(smallest, stopped)


def test_a_checkpoint_that_is_a_link(smallest: Config, stopped: Path):
    """A run resumes from a checkpoint elsewhere, and deletes nothing there."""
    step = newest(stopped)
    elsewhere = step.rename(stopped.parent / "elsewhere")
    step.symlink_to(elsewhere)
    kept = contents(elsewhere)
    changed = smallest.model_copy(update={"checkpoint": smallest.checkpoint.model_copy()})
    (stopped.parent / "c.yaml").write_text(changed.to_yaml())
    is_clear(call("train.py", stopped.parent / "c.yaml", "--out-dir", stopped))
    assert contents(elsewhere) == kept


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_an_endless_file(name: str, stopped: Path):
    """A link to /dev/zero in a checkpoint, in a process whose memory is limited."""
    path = newest(stopped) / name
    path.unlink()
    path.symlink_to("/dev/zero")
    command = f"ulimit -v 8000000; exec {sys.executable} {ROOT}/sample.py {stopped} --prompt a"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=15)
    assert done.returncode == 2, done.stderr[-500:]
    assert name in done.stderr
