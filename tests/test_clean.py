"""`steadygpt clean` removes what nothing needs, and nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import contents
from test_cli import called

from gpt import checkpoint as checkpoints
from gpt import training
from gpt.config import Config, load
from gpt.io.files import lock_file
from gpt.run import cleanup
from gpt.run.directory import RunDirectory
from gpt.run.loading import load_run

Make = Callable[..., Config]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def original(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 5, 10, 15 and 20, of which 20 is the best."""
    place = tmp_path_factory.mktemp("original")
    data = {"cache_dir": str(place / "cache")}
    options = {"every": 5, "keep": 9, "spare_dir": str(place / "spare")}
    config = tiny(data=data, checkpoint=options)
    training.train(config, place / "runs/one", quiet=True)
    assert list(checkpoints.steps(place / "runs/one/checkpoints")) == [5, 10, 15, 20]
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    copy = Path(shutil.copytree(original, tmp_path / "place"))
    config = copy / "runs/one/config.yaml"
    config.write_text(config.read_text().replace(str(original), str(copy)))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def clean(capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *words: called(capsys, "clean", *words)


def listed(out: str) -> list[str]:
    return sorted(line.split("B  ")[1].split(":")[0] for line in out.splitlines() if "MB  " in line)


STEPS = [f"runs/one/checkpoints/step-000000{step}" for step in ("05", "10", "15")]


def set_config(run: Path, before: str, after: str) -> None:
    text = (run / "config.yaml").read_text()
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after))


def test_checkpoints_of_a_finished_run(place: Path, clean: Call):
    before = contents(place)
    code, out, _ = clean()
    assert (code, listed(out)) == (0, ["in all", *STEPS])
    assert "nothing was removed; --yes removes them all" in out
    assert contents(place) == before
    size = sum(file.stat().st_size for step in STEPS for file in (place / step).iterdir())
    assert f"{size / 1e6:,.1f} MB  in all" in out
    code, out, _ = clean("--yes")
    assert (code, out.splitlines()[-1]) == (0, f"removed 3 of 3, {size / 1e6:,.1f} MB")
    gone = {path for path in before if any(str(path).find(step) >= 0 for step in STEPS)}
    assert {path for path in before if path not in contents(place)} == gone
    assert load_run(place / "runs/one")[2] == 20
    assert clean()[1] == "nothing to remove\n"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda run: set_config(run, "keep_every: null", "keep_every: 10"), ["10"]),
        (lambda run: (run / "checkpoints/best").write_text("step-00000005\n"), ["05"]),
        (lambda run: (run / "result.json").unlink(), ["05", "10", "15"]),
        (lambda run: (run / "result.json").write_text("damaged"), ["05", "10", "15"]),
        (lambda run: (run / "config.yaml").write_text("damaged"), ["05", "10", "15"]),
    ],
)
def test_what_a_run_needs_is_kept(place: Path, clean: Call, change: Any, kept: list[str]):
    change(place / "runs/one")
    assert clean("--yes", "runs")[0] == 0
    left = [step for step in ("05", "10", "15") if (place / f"{STEPS[0][:-2]}{step}").exists()]
    assert left == kept
    assert (place / "runs/one/checkpoints/step-00000020").is_dir()


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_the_checkpoint_that_another_is_replaced_by_is_kept(place: Path, clean: Call, pointer: str):
    checkpoints_of_one = place / "runs/one/checkpoints"
    named = "05" if pointer == "best" else "20"
    (checkpoints_of_one / "best").write_text("step-00000005\n")
    (checkpoints_of_one / f"step-000000{named}/model.safetensors").write_bytes(b"damaged")
    assert clean("--yes")[1] == "nothing to remove\n"
    assert list(checkpoints.steps(checkpoints_of_one)) == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("init_from: null", f"init_from: {STEPS[1]}"),
        ("vocabulary: null", f"vocabulary: {STEPS[1]}/tokenizer.json"),
    ],
)
def test_what_another_run_started_from_is_kept(place: Path, clean: Call, before: str, after: str):
    other = place / "elsewhere/two"
    other.mkdir(parents=True)
    shutil.copy(place / "runs/one/config.yaml", other)
    set_config(other, before, after)
    assert listed(clean("--yes")[1]) == ["in all", STEPS[0], STEPS[2]]
    assert (place / STEPS[1]).is_dir()


@pytest.mark.parametrize("link", [False, True])
def test_data_of_runs_elsewhere_is_kept(place: Path, clean: Call, tmp_path: Path, link: bool):
    if link:
        shutil.move(place / "runs/one", tmp_path / "one")
        (place / "runs/one").symlink_to(tmp_path / "one")
    else:
        shutil.move(place / "runs", place / "comparisons")
    assert clean("cache", "--yes")[1] == "nothing to remove\n"


def test_an_interrupted_run_keeps_its_checkpoints(place: Path, clean: Call):
    path = place / "runs/one/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))
    assert clean()[1] == "nothing to remove\n"


def test_damaged_and_partial_files(place: Path, clean: Call):
    run = place / "runs/one"
    (run / "checkpoints/step-00000005").rename(run / "checkpoints/damaged-step-00000005")
    (run / "result.json").unlink()
    (run / ".writing-result.json-123").write_text("{")
    (run / "checkpoints/.writing-step").mkdir()
    (place / "runs/.writing-export").mkdir()
    weights = place / "runs/.writing-export/model.safetensors"
    weights.write_text("")  # by a process that may still be at it
    (place / "runs/.writing-notes").write_text("")
    os.utime(place / "runs/.writing-notes", (0, time.time() - 2 * cleanup.RECENT))
    code, out, error = clean("--yes")
    assert code == 0
    assert "runs/.writing-export: has changed within the last hour" in error
    assert weights.exists()
    shutil.rmtree(weights.parent)
    assert listed(out) == [
        *("in all", "runs/.writing-notes", "runs/one/.writing-result.json-123"),
        *("runs/one/checkpoints/.writing-step", "runs/one/checkpoints/damaged-step-00000005"),
    ]
    assert not list(place.rglob(".writing-*"))
    assert list(checkpoints.steps(run / "checkpoints")) == [10, 15, 20]


def test_prepared_data(place: Path, clean: Call):
    (cache,) = (place / "cache").iterdir()
    other = place / "cache/other"
    shutil.copytree(cache, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"fingerprint": "another"}))
    (place / "cache/.half.building").mkdir()
    (place / "cache/.half.building/val.bin").write_bytes(b"12")
    (place / "cache/mine").mkdir()
    (place / "cache/mine/meta.json").write_text("{}")
    _, out, _ = clean("cache")  # the runs in runs/ count all the same
    assert listed(out) == ["cache/.half.building", "cache/other", "in all"]
    with lock_file(place / "cache/.half.lock", "busy"), lock_file(place / "cache/.other.lock", ""):
        _, out, error = clean("cache", "--yes")
        assert out == "nothing to remove\n"
        assert error.count("left alone: ") == 2
        assert "cache/.half.lock: a process is preparing this data" in error
    shutil.rmtree(place / "runs")
    _, out, _ = clean("cache", "--yes")
    assert listed(out) == sorted(
        ["cache/.half.building", f"cache/{cache.name}", "cache/other", "in all"]
    )
    assert [path.name for path in (place / "cache").iterdir()] == ["mine"]


def test_what_is_used_is_left_alone(place: Path, clean: Call):
    before = contents(place)
    with RunDirectory(place / "runs/one").lock():
        code, out, error = clean("--yes")
    assert (code, out) == (0, "nothing to remove\n")
    assert error == "left alone: runs/one: a process is working there\n"
    assert contents(place) == before


def test_what_is_used_since_it_was_listed(
    place: Path, clean: Call, monkeypatch: pytest.MonkeyPatch
):
    before, find = contents(place), cleanup.find
    lock = RunDirectory(place / "runs/one").lock()

    def found(*arguments: Any) -> Any:
        leftovers = find(*arguments)
        lock.__enter__()
        return leftovers

    monkeypatch.setattr(cleanup, "find", found)
    _, out, error = clean("--yes")
    lock.__exit__(None, None, None)
    assert out.endswith("removed 0 of 3, 0.0 MB\n")
    assert "runs/one: a process is working there" in error
    assert contents(place) == before


def test_links_are_not_followed(place: Path, clean: Call):
    shutil.move(place / "runs/one", place / "elsewhere")
    (place / "runs/one").symlink_to(place / "elsewhere")
    (place / "runs/.writing-link").symlink_to(place / "elsewhere")
    assert clean("runs")[1] == "nothing to remove\n"
    assert listed(clean("elsewhere")[1])[:3] == [s.replace("runs/one", "elsewhere") for s in STEPS]
    outside = place / "outside"
    shutil.copytree(place / "elsewhere/checkpoints/step-00000005", outside)
    shutil.rmtree(place / "elsewhere/checkpoints/step-00000005")
    (place / "elsewhere/checkpoints/step-00000005").symlink_to(outside)
    before = contents(place)
    _, out, error = clean("elsewhere", "--yes")
    assert out == "nothing to remove\n"
    assert "left alone: elsewhere/checkpoints/step-00000005: is a symbolic link" in error
    assert contents(place) == before


def test_the_state_that_was_saved_elsewhere(place: Path, clean: Call):
    run, spare = place / "runs/one", place / "spare/tiny-1234"
    shutil.copytree(run, spare)
    (spare / "result.json").unlink()
    shutil.copytree(spare, place / "spare/other-1234")
    assert load(spare / "config.yaml").checkpoint.spare_dir == str(place / "spare")
    result = (run / "result.json").read_text()
    (run / "result.json").write_text(result.replace('"finished"', '"interrupted"'))
    assert clean()[1] == "nothing to remove\n"
    (run / "result.json").write_text(result)
    assert str(spare) in clean()[1]
    metrics = (spare / "metrics.jsonl").read_text()
    (spare / "metrics.jsonl").write_text(metrics.replace('"step_seconds":', '"step_seconds":1'))
    assert str(spare) not in clean()[1]  # of another run with this config
    (spare / "metrics.jsonl").write_text(metrics)
    (spare / "result.json").write_text(result)  # it was resumed there
    assert str(spare) not in clean()[1]
    (spare / "result.json").unlink()
    clean("--yes")
    assert [path.name for path in (place / "spare").iterdir()] == ["other-1234"]


def test_what_is_needed_since_the_question_is_kept(
    place: Path, clean: Call, monkeypatch: pytest.MonkeyPatch
):
    def answer() -> str:
        (place / "runs/one/checkpoints/best").write_text("step-00000005\n")
        return "y\n"

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(terminal, "readline", answer)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "removed 2 of 3" in clean()[1]
    assert list(checkpoints.steps(place / "runs/one/checkpoints")) == [5, 20]


@pytest.mark.parametrize(("answer", "left"), [("y\n", 1), ("YES\n", 1), ("\n", 4), ("", 4)])
def test_it_asks_on_a_terminal(
    place: Path, clean: Call, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    code, _, error = clean()
    assert code == 0
    assert "remove these 3? [y/N]" in error
    assert len(checkpoints.steps(place / "runs/one/checkpoints")) == left


def test_wrong_input(place: Path, clean: Call):
    assert clean("run")[::2] == (2, "steadygpt clean: run: no such directory\n")
    code, _, error = clean("runs/one/config.yaml")
    assert (code, error) == (2, "steadygpt clean: runs/one/config.yaml: is not a folder\n")
    assert clean("--yess")[0] == 2
