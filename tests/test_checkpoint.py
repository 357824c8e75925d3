from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import vouch
from safetensors import SafetensorError

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint, PrunedError, store
from gpt.errors import InputError
from gpt.io import files


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


def test_pointers_are_one_line_and_latest_is_updated(tmp_path: Path):
    checkpoints.save(tmp_path, make(1))
    second = checkpoints.save(tmp_path, make(2))
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert checkpoints.read_pointer(tmp_path, "latest") == second
    assert checkpoints.read_pointer(tmp_path, "best") is None


@pytest.mark.parametrize("text", ["", "../../etc", "step-1", "step-00000009"])
def test_a_pointer_to_another_folder_is_ignored(tmp_path: Path, text: str):
    (tmp_path / "latest").write_text(text)
    assert checkpoints.read_pointer(tmp_path, "latest") is None


def test_a_step_is_never_overwritten(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(1))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoints.save(tmp_path, make(1))
    aside = tmp_path / "damaged-step-00000001"
    assert (aside / "model.safetensors").stat().st_mtime_ns == before
    assert checkpoints.is_intact(folder)


def test_a_replaced_step_is_deleted_only_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill while gigabytes are deleted must leave one of the two."""
    new = replace(make(3), tokenizer='{"tokens": ["b"]}')
    checkpoints.save(tmp_path, make(3))
    found: list[Checkpoint] = []
    rmtree = store.shutil.rmtree

    def look(path: Path, **options: Any) -> None:
        found.append(checkpoints.load(tmp_path / "step-00000003"))
        rmtree(path, **options)

    monkeypatch.setattr(store.shutil, "rmtree", look)
    checkpoints.save(tmp_path, new, replaces=True)
    assert [each.tokenizer for each in found] == [new.tokenizer]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_replaced_step_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints.save(tmp_path, make(3))
    rename, renamed = Path.rename, [0]

    def fail_once(self: Path, target: Path) -> Path:
        renamed[0] += 1
        if renamed[0] == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.save(tmp_path, make(3), replaces=True)
    assert checkpoints.load(tmp_path / "step-00000003").step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path):
    for step in range(1, 7):
        checkpoints.save(tmp_path, make(step))
    (tmp_path / "best").write_text("step-00000002\n")
    checkpoints.prune(tmp_path, kept={5})
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


@pytest.mark.parametrize("other", ["optimizer.safetensors", "../step-00000002/model.safetensors"])
def test_swapped_files_are_found(tmp_path: Path, other: str):
    checkpoints.save(tmp_path, make(2))
    folder = checkpoints.save(tmp_path, make(3))
    one, two = folder / "model.safetensors", folder / other
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"):
        checkpoints.load(folder)


def test_a_checkpoint_with_the_name_of_another_step_is_rejected(tmp_path: Path):
    checkpoints.save(tmp_path, make(3)).rename(tmp_path / "step-00000004")
    with pytest.raises(InputError, match="contains the checkpoint of another step"):
        checkpoints.load(tmp_path / "step-00000004")


@pytest.mark.parametrize("target", ["/dev/zero", "elsewhere"])
def test_a_link_instead_of_a_file_is_not_followed(tmp_path: Path, target: str):
    folder = checkpoints.save(tmp_path, make(3))
    path = folder / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="is not a regular file"):
        checkpoints.verify(folder)


def test_the_newest_intact_checkpoint_is_loaded(tmp_path: Path):
    assert checkpoints.newest_intact(tmp_path) == (None, [])
    folders = [checkpoints.save(tmp_path, make(step)) for step in (1, 2, 3, 4)]
    checkpoints.write_pointers(
        tmp_path, "step-00000003", best=False
    )  # a kill came before the pointer
    loaded, skipped = checkpoints.newest_intact(tmp_path)
    assert (loaded.step, skipped) == (4, [])
    assert checkpoints.newest_intact(tmp_path, lambda step: step % 3 == 0)[0].step == 3
    (folders[2] / "state.json").unlink()
    (folders[3] / "manifest.json").write_text("[" * 100_000)
    loaded, skipped = checkpoints.newest_intact(tmp_path)
    assert loaded.step == 2
    assert ["step-00000004" in str(skipped[0]), "step-00000003" in str(skipped[1])] == [True] * 2
    for folder in folders[:2]:
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"step-00000004.*;\nnone of the 4 checkpoints in .* is intact"
    ):
        checkpoints.newest_intact(tmp_path)


def test_a_damaged_step_is_set_aside_when_it_is_saved_again(tmp_path: Path):
    for round_ in (1, 2):
        folder = checkpoints.save(tmp_path, make(3))
        assert checkpoints.load(folder).step == 3
        (folder / "state.json").write_text(f"{round_}")
    checkpoints.save(tmp_path, make(3))
    assert checkpoints.is_intact(folder)
    for name, text in (("damaged-step-00000003", "1"), ("damaged-step-00000003-2", "2")):
        assert (tmp_path / name / "state.json").read_text() == text


def test_the_manifest_is_written_last_and_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    fsync, rename = store.fsync, Path.rename
    written = files.write_bytes

    def note(path: Path) -> None:
        order.append("fsync " + ("folder" if path.name.startswith(".writing-") else path.name))
        fsync(path)

    def moved(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return rename(self, target)

    def wrote(path: Path, contents: bytes) -> None:
        written(path, contents)
        order.append(f"{path.name} written and synced")

    monkeypatch.setattr(store, "fsync", note)
    monkeypatch.setattr(files, "write_bytes", wrote)
    monkeypatch.setattr(Path, "rename", moved)
    checkpoints.save(tmp_path, make(3), best=True)
    assert order == [
        *(f"fsync {name}" for name in checkpoints.FILES),
        "manifest.json written and synced",
        "rename to step-00000003",
        f"fsync {tmp_path.name}",
        "best written and synced",
        "latest written and synced",
    ]


def test_a_full_disk_is_recognized_by_its_error_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoints.save(tmp_path, make(2))
    assert (caught.value.errno, Path(caught.value.filename).name) == (28, "model.safetensors")


def test_a_pickle_instead_of_a_checkpoint_is_not_read(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(3))
    torch.save({"w": torch.ones(1)}, folder / "model.safetensors")
    vouch(folder)
    assert not checkpoints.is_intact(folder)
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"):
        checkpoints.load(folder)


def test_a_header_with_an_absurd_length_is_rejected(tmp_path: Path):
    """A safetensors file begins with the length of its header; the manifest vouches for it."""
    folder = checkpoints.save(tmp_path, make(3))
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    vouch(folder)
    assert not checkpoints.is_intact(folder)
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"):
        checkpoints.load(folder)


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = checkpoints.save(tmp_path, make(1))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "size_and_hash", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(tmp_path, make(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    monkeypatch.undo()
    assert checkpoints.load(good).step == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_utf8_is_read_back(tmp_path: Path):
    parent = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    parent.mkdir()
    saved = make(3)
    checkpoints.save(parent, saved)
    (folder,) = checkpoints.steps(parent).values()
    assert torch.equal(checkpoints.load(folder).model["w"], saved.model["w"])


def test_loading_without_the_optimizer_does_not_need_its_file(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(3))
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    loaded = checkpoints.load(folder, optimizer=False)
    assert loaded.step == 3
    assert not loaded.optimizer
    with pytest.raises(InputError, match=r"optimizer\.safetensors: is damaged"):
        checkpoints.load(folder)


@pytest.mark.parametrize("how", ["pruned", "saved again"])
def test_a_checkpoint_deleted_while_being_read_is_not_called_damaged(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = checkpoints.save(tmp_path, make(1))
    checkpoints.save(tmp_path, make(2))
    read = store._read_manifest

    def meddle(folder: Path) -> dict[str, Any]:
        manifest = read(folder)
        if how == "pruned":
            checkpoints.prune(tmp_path, {2})
        else:
            checkpoints.save(tmp_path, replace(make(1), tokenizer="of another length"))
        return manifest

    monkeypatch.setattr(store, "_read_manifest", meddle)
    with pytest.raises(PrunedError, match="step-00000001: does not exist, or was deleted"):
        checkpoints.load(first)


def test_a_checkpoint_pruned_before_is_not_called_damaged(tmp_path: Path):
    with pytest.raises(PrunedError, match="step-00000001: does not exist"):
        checkpoints.load(tmp_path / "step-00000001")


def test_a_pointer_replaced_while_being_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints.save(tmp_path, make(1))
    read = store.read_small

    def meddle(path: Path, limit: int) -> bytes:
        text = read(path, limit)
        monkeypatch.undo()
        checkpoints.save(tmp_path, make(2))
        checkpoints.prune(tmp_path, {2})
        return text

    monkeypatch.setattr(store, "read_small", meddle)
    assert checkpoints.read_pointer(tmp_path, "latest") == tmp_path / "step-00000002"


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "folder"])
def test_a_pointer_that_is_not_a_file_is_rejected(kind: str, tmp_path: Path):
    path = tmp_path / "best"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(InputError, match="best: is a "):
        checkpoints.read_pointer(tmp_path, "best")


@pytest.mark.parametrize(
    "name", ["step-0000000a", "step-000000001", "step-" + "9" * 200, "step-٠" * 8]
)
def test_folders_with_other_names_are_not_checkpoints(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    folder = checkpoints.save(tmp_path, make(1))
    assert checkpoints.steps(tmp_path) == {1: folder}


def test_a_sparse_file_of_ten_gigabytes_is_rejected_at_once(tmp_path: Path):
    folder = checkpoints.save(tmp_path, make(1))
    for name in checkpoints.FILES:
        kept = (folder / name).read_bytes()
        with (folder / name).open("r+b") as file:
            file.truncate(10**10)
        with pytest.raises(InputError, match=name):
            checkpoints.load(folder)
        text = (folder / "manifest.json").read_text()
        manifest = json.loads(text)
        manifest["files"][name]["size"] = 10**10  # as an attacker would write
        (folder / "manifest.json").write_text(checkpoints.manifest_text(manifest))
        with pytest.raises(InputError, match=name):
            checkpoints.load(folder)
        (folder / "manifest.json").write_text(text)
        (folder / name).write_bytes(kept)
