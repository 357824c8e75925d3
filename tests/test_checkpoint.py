from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.errors import InputError


def make(step: int) -> Checkpoint:
    tensors = {"w": torch.arange(6.0).view(2, 3) + step, "b": torch.tensor(float(step))}
    moments = {"w|exp_avg": torch.ones(2, 3)}
    return Checkpoint(tensors, moments, {"step": step, "seconds": 0.1}, '{"tokens": ["a"]}')


def test_what_is_saved_is_loaded(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(7))
    assert folder.name == "step-00000007"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    loaded = checkpoints.load(folder)
    assert loaded.step == 7
    assert loaded.state == {"step": 7, "seconds": 0.1}
    assert loaded.tokenizer == '{"tokens": ["a"]}'
    assert torch.equal(loaded.model["w"], make(7).model["w"])
    assert torch.equal(loaded.optimizer["w|exp_avg"], torch.ones(2, 3))


def test_pointers_are_one_line_and_latest_follows(tmp_path: Path):
    checkpoints.save(tmp_path, make(1))
    second = checkpoints.save(tmp_path, make(2))
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert checkpoints.pointed(tmp_path, "latest") == second
    assert checkpoints.pointed(tmp_path, "best") is None


@pytest.mark.parametrize("text", ["", "../../etc", "step-1", "step-00000009"])
def test_a_pointer_to_elsewhere_points_nowhere(tmp_path: Path, text: str):
    (tmp_path / "latest").write_text(text)
    assert checkpoints.pointed(tmp_path, "latest") is None


def test_a_step_is_never_overwritten(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(1))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoints.save(tmp_path, make(1))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path):
    for step in range(1, 7):
        checkpoints.save(tmp_path, make(step))
    checkpoints.point(tmp_path, "best", "step-00000002")
    checkpoints.prune(tmp_path, keep=2)
    assert list(checkpoints.steps(tmp_path)) == [2, 5, 6]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_found_before_use(tmp_path: Path, file: str, damage: str):
    folder = checkpoints.save(tmp_path, make(3))
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1] if file != "manifest.json" else content[:-3])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(InputError, match="step-00000003"):
        checkpoints.load(folder)


def test_a_pickle_in_a_checkpoints_place_is_not_read(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(3))
    torch.save({"w": torch.ones(1)}, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoints.describe(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        checkpoints.load(folder)


def test_a_save_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = checkpoints.save(tmp_path, make(1))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "describe", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(tmp_path, make(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    monkeypatch.undo()
    assert checkpoints.load(good).step == 1
