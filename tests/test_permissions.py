"""New files and folders have the mode that the umask gives, even those made under another name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt import training
from gpt.compare.grid import Cell
from gpt.compare.reuse import copy_run
from gpt.config import Config
from gpt.run.directory import RunDirectory
from gpt.run.fallback import save_to_fallback

Make = Callable[..., Config]


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong(folder: Path, umask: int) -> list[str]:
    """The files and folders in `folder`, itself included, that have another mode."""
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 1
    return [
        f"{path}: {path.stat().st_mode & 0o777:o}"
        for path in paths
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    ]


def test_files_of_a_run_and_of_prepared_data(tiny: Make, tmp_path: Path, umask: int):
    data = {"cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe", "vocab_size": 300}
    config = tiny(data=data, training={"steps": 2}, diagnostics={"every": 1})
    training.train(config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run/checkpoints/step-00000002/model.safetensors").is_file()
    assert wrong(tmp_path / "run", umask) == []
    assert wrong(tmp_path / "cache", umask) == []


def test_a_run_that_is_copied_into_a_comparison(
    tiny: Make, tiny_run: Path, tmp_path: Path, umask: int
):
    copy_run(tiny_run, Cell("one", "arm", {}, {}, tiny()), tmp_path / "comparison")
    assert wrong(tmp_path / "comparison", umask) == []


def test_a_run_that_is_saved_elsewhere(tiny: Make, tiny_run: Path, tmp_path: Path, umask: int):
    config = tiny(checkpoint={"spare_dir": str(tmp_path / "spare")})
    full = OSError(errno.ENOSPC, "No space left on device")
    save_to_fallback(RunDirectory(tiny_run), config, 1, full, files={"a": "b"}, save=lambda _: None)
    assert wrong(tmp_path / "spare", umask) == []


def test_the_lock_of_a_directory(tmp_path: Path, umask: int):
    with RunDirectory(tmp_path / "run").lock():
        assert wrong(tmp_path / "run", umask) == []
