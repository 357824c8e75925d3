"""What machines do to a run, and what becomes of it: nothing is lost, nothing is overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import vouch
from safetensors.torch import load_file, save_file
from test_training import assert_same_run, records, run, stop_after, tensors

from gpt import checkpoint as checkpoints
from gpt.checkpoint import store
from gpt.config import Config
from gpt.errors import InputError
from gpt.io.files import lock_directory
from gpt.metrics import MetricsLog
from gpt.run import plot
from gpt.run.directory import RunDirectory
from gpt.run.loading import load_run
from gpt.trainer import Trainer

Make = Callable[..., Config]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def later(step: int, then: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """Options of `train` that call `then` after that update."""
    updates = [0]

    def made() -> None:
        updates[0] += 1
        if updates[0] == step:
            then()

    return {"on_update": made}


def power_cut(*args: Any, **options: Any) -> None:
    raise RuntimeError("power cut")


@contextlib.contextmanager
def cut_off_at(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, cut: Callable[..., None] = power_cut
) -> Iterator[None]:
    """What is run within ends where it calls that function."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(RuntimeError, match="power cut"):
            yield


# -- Disks -------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written when they are begun, so that a test knows what is on disk when."""
    monkeypatch.setattr(checkpoints.BackgroundWriter, "start", lambda self, write: write())


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`full(folder)` lets no checkpoint and no metrics be written below a folder any more."""
    write, hand_over = store._write, MetricsLog._write_waiting

    def install(below: Path) -> None:
        def refuse(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
            if folder.is_relative_to(below):
                (folder / "model.safetensors").write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            write(folder, checkpoint)

        def refuse_lines(self: MetricsLog) -> None:
            if self._path.is_relative_to(below):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            hand_over(self)

        monkeypatch.setattr(store, "_write", refuse)
        monkeypatch.setattr(MetricsLog, "_write_waiting", refuse_lines)

    return install


@pytest.mark.usefixtures("at_once")
def test_on_a_full_disk_the_state_is_saved_elsewhere(tiny: Make, tmp_path: Path, full: Any):
    spare, out = tmp_path / "spare", tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(spare), "every": 5}, model={"dropout": 0.1})
    run(config, tmp_path / "whole")
    saved: dict[str, str] = {}

    def fill() -> None:
        saved.update(contents(out / "checkpoints"))
        full(out)

    with pytest.raises(InputError, match="No space left on device") as raised:
        run(config, out, **later(12, fill))
    assert contents(out / "checkpoints") == saved != {}
    (place,) = spare.iterdir()
    assert f"the state of step 15 is in {place}" in str(raised.value)
    assert f"out_dir {place} resumes" in str(raised.value)
    assert run(config, place).status == "finished"
    assert_same_run(tmp_path / "whole", place)


@pytest.mark.usefixtures("at_once")
def test_a_directory_that_is_lost_is_made_again_elsewhere(tiny: Make, tmp_path: Path):
    spare, out = tmp_path / "spare", tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(spare)})
    run(config, tmp_path / "whole")
    with pytest.raises(InputError, match=r"run: was deleted or moved during training"):
        run(config, out, **later(14, lambda: shutil.rmtree(out)))
    assert not out.exists()
    (place,) = spare.iterdir()
    result = run(config, place)  # the last step was saved: nothing is left to train
    assert (result.status, result.step) == ("finished", 20)
    assert_same_run(tmp_path / "whole", place)


@pytest.mark.usefixtures("at_once")
def test_a_directory_that_was_moved_is_not_made_again_in_its_place(tiny: Make, tmp_path: Path):
    spare, out = tmp_path / "spare", tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(spare)})
    with pytest.raises(InputError, match="deleted or moved"):
        run(config, out, **later(14, lambda: (out.rename(tmp_path / "moved"), None)[1]))
    assert not out.exists()
    assert list(checkpoints.steps(tmp_path / "moved/checkpoints")) == [10]


@pytest.mark.usefixtures("at_once")
def test_with_nowhere_to_go_it_says_so(tiny: Make, tmp_path: Path, full: Any):
    config = tiny(checkpoint={"spare_dir": str(tmp_path / "spare"), "every": 5})
    with pytest.raises(InputError, match="the state of step 15 cannot be saved") as raised:
        run(config, tmp_path / "run", **later(12, lambda: full(tmp_path)))
    assert len(str(raised.value).splitlines()) <= 3
    assert list((tmp_path / "spare").iterdir()) == []
    assert list(checkpoints.steps(tmp_path / "run/checkpoints")) == [5, 10]


def test_a_checkpoint_is_written_while_training_continues(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And is of the step that it was begun at, whatever was trained meanwhile."""
    run(tiny(), tmp_path / "whole")
    write, trained = store._write, threading.Event()

    def held_up(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
        assert trained.wait(60)
        write(folder, checkpoint)

    monkeypatch.setattr(store, "_write", held_up)
    run(tiny(), tmp_path / "run", **later(15, trained.set))
    for step in (10, 20):
        assert_same_run(tmp_path / "whole", tmp_path / "run", step)


@pytest.mark.parametrize(("failing", "seen"), [(10, 20), (20, 20)])
def test_a_write_that_fails_behind_is_reported_at_the_next_save_or_the_end(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, seen: int
):
    spare, out = tmp_path / "spare", tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(spare)})
    run(config, tmp_path / "whole")
    write = store._write

    def fail(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
        if checkpoint.step == failing and folder.is_relative_to(out):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        write(folder, checkpoint)

    monkeypatch.setattr(store, "_write", fail)
    with pytest.raises(InputError, match="Input/output error") as raised:
        run(config, out)
    monkeypatch.undo()
    (place,) = spare.iterdir()
    assert f"the state of step {seen} is in {place}" in str(raised.value)
    assert run(config, place).status == "finished"
    assert_same_run(tmp_path / "whole", place)
    assert run(config, out).status == "finished"  # from what is whole there
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_that_is_full_for_a_while_loses_no_line(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tiny(), tmp_path / "whole")
    hand_over = MetricsLog._write_waiting
    calls = [0]

    def sometimes(self: MetricsLog) -> None:
        calls[0] += 1
        if 5 < calls[0] < 12:
            self._file.write(self._waiting[:7])  # as much as there was room for
            self._waiting = self._waiting[7:]
            raise OSError(errno.ENOSPC, "No space left on device")
        hand_over(self)

    monkeypatch.setattr(MetricsLog, "_write_waiting", sometimes)
    run(tiny(), tmp_path / "full")
    assert calls[0] > 20
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny: Make, tmp_path: Path, small_disk: Path):
    options = {"checkpoint": {"spare_dir": str(tmp_path / "spare"), "every": 5, "keep": 9}}
    config = tiny(**options)
    run(config, tmp_path / "whole")
    with pytest.raises(InputError, match="No space left on device"):
        run(config, small_disk / "run")
    steps = checkpoints.steps(small_disk / "run/checkpoints")
    assert steps
    assert all(map(checkpoints.is_intact, steps.values()))
    (place,) = (tmp_path / "spare").iterdir()
    assert run(config, place).status == "finished"
    assert records(place) == records(tmp_path / "whole")


def test_a_folder_that_may_not_be_written_is_wrong_input(tiny: Make, tmp_path: Path):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o555)
        run(tiny(), tmp_path / "first")  # imports what another user may not read
        root = os.geteuid() == 0  # who may write anywhere
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="run: cannot be created: Permission denied"):
                run(tiny(), place / "run")
        finally:
            if root:
                os.seteuid(0)
            place.chmod(0o755)


# -- Two at once -------------------------------------------------------------------------------


def test_two_runs_in_one_directory_are_refused(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run", **stop_after(5))
    before = contents(tmp_path / "run")
    with lock_directory(tmp_path / "run", "held"):
        held = contents(tmp_path / "run")
        assert held == {**before, ".lock": held[".lock"]}
        with pytest.raises(InputError, match="another process is training there"):
            run(tiny(), tmp_path / "run")
        assert contents(tmp_path / "run") == held
    assert run(tiny(), tmp_path / "run").status == "finished"


def test_a_finished_run_returns_its_result_whoever_holds_it(tiny: Make, tmp_path: Path):
    done = run(tiny(), tmp_path / "run")
    with lock_directory(tmp_path / "run", "held"):
        assert run(tiny(), tmp_path / "run") == done


def test_the_lock_dies_with_its_process(tiny: Make, tmp_path: Path, environment: dict[str, str]):
    hold = (
        "import sys, time; from pathlib import Path; from gpt.io.files import lock_directory\n"
        "with lock_directory(Path(sys.argv[1]), 'held'): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is training there"):
            run(tiny(), tmp_path / "run")
        other.kill()
    assert run(tiny(), tmp_path / "run").status == "finished"


def test_what_cannot_start_leaves_no_directory(tiny: Make, tmp_path: Path):
    with pytest.raises(InputError):
        run(tiny(data={"path": [str(tmp_path / "none")]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- Changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"width": 32}},
        {"model": {"norm": {"placement": "post"}}},
        {"data": {"tokenizer": "chars"}},
        {"data": {"val_fraction": 0.3}},
        {"optimizer": {"learning_rate": 0.5}},
        {"schedule": {"warmup": "none"}},
        {"training": {"batch_sequences": 8}},
        {"training": {"precision": "bf16"}},
        {"evaluation": {"sequences": 4}},
        {"seed": 1},
    ],
)
def test_what_makes_it_another_run_is_refused(tiny: Make, tmp_path: Path, change: dict[str, Any]):
    run(tiny(), tmp_path / "run", **stop_after(5))
    before = contents(tmp_path / "run")
    ((section, value),) = change.items()
    option = next(iter(value)) if isinstance(value, dict) else section
    with pytest.raises(InputError, match=rf"different config \(.*{option}.* -> ") as raised:
        run(tiny(**change), tmp_path / "run")
    assert "choose another out_dir" in str(raised.value)
    assert contents(tmp_path / "run") == before


def test_length_logging_and_paths_may_change(tiny: Make, tmp_path: Path, corpus: Path):
    constant = {"body": "constant"}
    run(tiny(schedule=constant), tmp_path / "whole")
    first = tiny(schedule=constant, training={"steps": 9})
    run(first, tmp_path / "run")
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    second = tiny(
        schedule=constant,
        data={"path": [str(copy)]},
        training={"log_every": 3},
        checkpoint={"every": 7},
        sampling={"tokens": 4},
    )
    assert run(second, tmp_path / "run").step == 20
    (event,) = history(tmp_path / "run")
    assert (event["event"], event["step"]) == ("resumed", 9)
    assert "training.steps: 9 -> 20" in event["changes"]
    assert len(event["changes"]) == 5
    assert f"steps: {20}" in (tmp_path / "run/config.yaml").read_text()
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_run_is_not_made_shorter_than_it_is(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run", **stop_after(12))
    before = contents(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"already at step 12; to train longer, training.steps \(11\) must"
    ):
        run(tiny(training={"steps": 11}), tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_run_without_checkpoints_is_not_made_longer(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        run(tiny(training={"steps": 30}), tmp_path / "run")
    assert contents(tmp_path / "run") == before


# -- Damage ------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_skipped_and_set_aside(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from gpt.training import train

    config = tiny(checkpoint={"every": 4, "keep": 9})
    run(config, tmp_path / "whole")
    out = tmp_path / "run"
    run(config, out, **stop_after(14))
    for step, name in ((14, "model.safetensors"), (12, "state.json")):
        path = out / f"checkpoints/step-{step:08d}/{name}"
        path.write_bytes(path.read_bytes()[:-1])
    assert train(config, out).status == "finished"
    said = capsys.readouterr().err
    for step, name in ((14, "model.safetensors"), (12, "state.json")):
        path = out / f"checkpoints/step-{step:08d}/{name}"
        assert f"skipped: {path}: is damaged: it has changed since it was written" in said
        assert path.parent.with_name(f"damaged-step-{step:08d}").is_dir()
    assert "resuming from step 8\n" in said
    assert len(history(out)[0]["skipped"]) == 2
    assert list(checkpoints.steps(out / "checkpoints")) == [4, 8, 12, 16, 20]
    assert_same_run(tmp_path / "whole", out)


def test_with_no_whole_checkpoint_it_is_not_trained_over(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(12))
    for path in checkpoints.steps(out / "checkpoints").values():
        (path / "state.json").unlink()
    before = contents(out)
    with pytest.raises(InputError, match=r"none of the 2 checkpoints in .* is intact"):
        run(tiny(), out)
    assert contents(out) == before


def test_damaged_metrics_are_refused_before_anything_is_changed(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(12))
    (out / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    before = contents(out)
    with pytest.raises(InputError, match=r"metrics.jsonl: line 2 is damaged"):
        run(tiny(training={"log_every": 2}), out)
    assert contents(out) == before


def test_corrupted_weights_are_not_saved(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An update may corrupt them although its loss and its gradients are finite."""
    update, updates = Trainer.update, itertools.count(1)

    def spoiling(self: Trainer, *arguments: Any) -> bool:
        skipped = update(self, *arguments)
        if next(updates) == 5:
            with torch.no_grad():
                self.model.token_embedding.weight.fill_(math.inf)
        return skipped

    monkeypatch.setattr(Trainer, "update", spoiling)
    config = tiny(checkpoint={"every": 5}, evaluation={"every": 20})
    result = run(config, tmp_path / "run")
    assert result.failure is not None
    assert (result.status, result.failure.quantity, result.step) == ("diverged", "weight", 5)
    assert not checkpoints.steps(tmp_path / "run/checkpoints")


def test_a_checkpoint_of_an_earlier_version_is_refused_in_plain_words(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(5))
    folder = out / "checkpoints/step-00000005"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 4}))
    vouch(folder)
    before = contents(out)
    with pytest.raises(InputError, match="earlier version of steadygpt, and this one cannot"):
        run(tiny(), out)
    assert contents(out) == before
    load_run(out, "5")  # but its weights are still read


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("progress", []),
        ("progress", {"step": "x"}),
        ("progress", {"stop": 1}),
        ("scaler", 5),
        ("micro_batch", 0),
        ("micro_batch", 10**30),
        ("micro_batch", 5),
        ("best", 1),
        ("micro_batch", "all"),
        ("data_fingerprint", None),
        ("format", [5]),
    ],
)
def test_a_state_of_the_wrong_types_is_refused(tiny: Make, tmp_path: Path, key: str, value: object):
    """With a manifest that vouches for it, as a stranger would write."""
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(5))
    folder = out / "checkpoints/step-00000005"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    vouch(folder)
    before = contents(out)
    with pytest.raises(InputError, match=r"^step-00000005: "):
        run(tiny(), out)
    assert contents(out) == before


@pytest.mark.parametrize("link", ["samples", "checkpoints/step-00000005", "metrics.jsonl"])
def test_a_link_out_of_the_directory_is_not_written_through(tiny: Make, tmp_path: Path, link: str):
    out, outside = tmp_path / "run", tmp_path / "outside"
    run(tiny(), out, **stop_after(5))
    (out / link).rename(outside)
    (out / link).symlink_to(outside)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is a symbolic link"):
        run(tiny(), out)
    assert contents(tmp_path) == before


# -- Killed before it was a run ------------------------------------------------------------------


def test_a_start_that_was_killed_at_once_can_be_made_again(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    for name in ("samples", "checkpoints/.writing-x"):
        (out / name).mkdir(parents=True)
    for name in (".lock", ".writing-config.yaml-7"):
        (out / name).touch()
    assert run(tiny(), out).status == "finished"
    assert sorted(path.name for path in out.glob(".*")) == []
    assert sorted(path.name for path in (out / "checkpoints").glob(".*")) == []


def test_a_fork_that_was_killed_at_once_can_be_made_again(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "origin")
    origin = tmp_path / "origin/checkpoints/step-00000010"
    out = tmp_path / "run"
    shutil.copytree(origin, out / "checkpoints" / origin.name)
    (out / "checkpoints/latest").write_text(f"{origin.name}\n")
    before = contents(out)
    with pytest.raises(InputError, match="exists and is not a run"):
        run(tiny(), out)
    assert contents(out) == before
    assert run(tiny(), out, resume=str(origin)).step == 20
    assert records(out)[0]["step"] == 11


def test_a_fork_starts_from_a_link_to_a_checkpoint_as_well(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "origin")
    link = tmp_path / "favourite"
    link.symlink_to(tmp_path / "origin/checkpoints/step-00000010")
    assert run(tiny(), tmp_path / "run", resume=str(link)).step == 20
    assert records(tmp_path / "run")[0]["step"] == 11


@pytest.mark.parametrize("stranger", ["notes.txt", "samples/mine.txt", "checkpoints/mine.pt"])
def test_a_strangers_directory_is_left_alone(tiny: Make, tmp_path: Path, stranger: str):
    path = tmp_path / "run" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match="exists and is not a run"):
        run(tiny(), tmp_path / "run")
    assert path.read_text() == "mine"


def test_a_picture_that_a_kill_prevented_is_drawn_at_the_next_start(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*args: Any, **options: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(plot, "plot_run", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny(), tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()
    monkeypatch.undo()
    assert run(tiny(), tmp_path / "run").status == "finished"
    assert (tmp_path / "run/loss.png").is_file()


# -- Between two lines -----------------------------------------------------------------------------


def test_a_run_that_is_made_longer_survives_a_kill(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    run(tiny(training={"steps": 10}), out)

    for place in ("note", "write_result"):
        with cut_off_at(monkeypatch, RunDirectory, place):
            run(tiny(), out)
    assert run(tiny(), out).step == 20
    assert "training.steps: 10 -> 20" in history(out)[0]["changes"]


def test_a_run_that_another_process_has_just_finished_is_reported(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, lock = tmp_path / "run", RunDirectory.lock

    def late(directory: RunDirectory) -> Any:
        monkeypatch.setattr(RunDirectory, "lock", lock)
        run(tiny(), out)
        return lock(directory)

    monkeypatch.setattr(RunDirectory, "lock", late)
    assert run(tiny(), out, stop=power_cut).status == "finished"  # it does not train
    assert len(records(out)) == 23
    assert (out / "result.json").is_file()


def test_a_run_that_gave_up_and_was_killed_gives_up(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(
        optimizer={"learning_rate": 1e-9},
        evaluation={"every": 4, "give_up_after": 2},
        checkpoint={"every": 5},
    )
    whole = run(config, tmp_path / "whole")
    assert (whole.step, whole.reason.split(":")[0]) == (8, "given up at step 8")
    assert 8 in checkpoints.steps(tmp_path / "whole/checkpoints")

    with cut_off_at(monkeypatch, RunDirectory, "write_result"):
        run(config, tmp_path / "parts")
    assert run(config, tmp_path / "parts").reason == whole.reason
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=8)


def test_a_fork_that_was_killed_while_it_began_is_whole_in_the_end(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tiny(), tmp_path / "origin")
    origin = str(tmp_path / "origin/checkpoints/step-00000010")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny(), whole, resume=origin)

    with cut_off_at(monkeypatch, RunDirectory, "write_environment"):
        run(tiny(), parts, resume=origin)
    (parts / "tokenizer.json").unlink()
    run(tiny(), parts)
    assert_same_run(whole, parts)
    whole_facts, facts = (
        json.loads((each / "environment.json").read_text()) for each in (whole, parts)
    )
    assert {*facts, "started_from"} == whole_facts.keys()  # the second start did not name it
    assert (parts / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_pointers_that_a_kill_left_behind_are_set(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(checkpoint={"every": 5, "keep": 9}, evaluation={"every": 5})
    run(config, tmp_path / "whole")
    write_pointers = store.write_pointers

    def killed(folder: Path, name: str, *, best: bool) -> None:
        if name == "step-00000010":
            power_cut()
        write_pointers(folder, name, best=best)

    with cut_off_at(monkeypatch, store, "write_pointers", killed):
        run(config, tmp_path / "parts")
    assert (
        checkpoints.read_pointer(tmp_path / "parts/checkpoints", "latest").name == "step-00000005"
    )
    run(config, tmp_path / "parts", **stop_after(0))
    for pointer in ("latest", "best"):
        named = checkpoints.read_pointer(tmp_path / "parts/checkpoints", pointer)
        assert named.name == "step-00000010"
    run(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("at_once")
def test_a_run_in_the_place_of_one_that_was_moved_is_left_alone(tiny: Make, tmp_path: Path):
    out = tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(tmp_path / "spare")})
    other = tiny(seed=5, training={"steps": 3})

    def replace() -> None:
        out.rename(tmp_path / "moved")
        run(other, out)

    with pytest.raises(InputError, match=r"metrics.jsonl: was deleted or moved while in use"):
        run(config, out, **later(14, replace))
    assert list(checkpoints.steps(out / "checkpoints")) == [3]
    assert run(other, out).step == 3


@pytest.mark.usefixtures("at_once")
def test_a_later_state_elsewhere_is_reported(
    tiny: Make, tmp_path: Path, full: Any, capsys: pytest.CaptureFixture[str]
):
    from gpt.training import train

    out = tmp_path / "run"
    config = tiny(checkpoint={"spare_dir": str(tmp_path / "spare"), "every": 5})
    with pytest.raises(InputError, match="No space left"):
        run(config, out, **later(12, lambda: full(out)))
    (place,) = (tmp_path / "spare").iterdir()
    with pytest.raises(InputError, match="No space left"):
        train(config, out)
    assert f"a later state of this run is in {place}: resume it with out_dir {place}" in (
        capsys.readouterr().err
    )


def test_checkpoints_that_other_options_kept_stay(tiny: Make, tmp_path: Path):
    kept = {"every": 2, "keep": 1, "keep_every": 4}
    run(tiny(checkpoint=kept, evaluation={"every": 30}), tmp_path / "run", **stop_after(11))
    config = tiny(checkpoint={"every": 2, "keep": 1}, evaluation={"every": 30})
    for _ in range(2):  # the second time no option has changed
        run(config, tmp_path / "run", **stop_after(3))
    run(config, tmp_path / "run")
    assert list(checkpoints.steps(tmp_path / "run/checkpoints")) == [4, 8, 10, 20]


def test_what_is_kept_is_also_saved(tiny: Make):
    with pytest.raises(InputError, match=r"keep_every \(7\) must be a multiple of the 5 steps"):
        tiny(checkpoint={"every": 5, "keep_every": 7})


def test_where_it_is_already_is_no_length(tiny: Make, tmp_path: Path):
    run(tiny(), tmp_path / "run", **stop_after(7))
    with pytest.raises(
        InputError, match=r"already at step 7; to train longer, training.steps \(7\) must"
    ):
        run(tiny(training={"steps": 7}), tmp_path / "run")


@pytest.mark.parametrize("link", ["checkpoints", "samples", ".lock"])
def test_a_link_in_a_new_directory_is_not_followed(tiny: Make, tmp_path: Path, link: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="exists and is not a run"):
        run(tiny(), tmp_path / "run")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_strangers_lock_is_left_alone(tiny: Make, tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "theirs.txt"):
        (tmp_path / "run" / name).write_text("theirs")
    with pytest.raises(InputError, match="exists and is not a run"):
        run(tiny(), tmp_path / "run")
    assert (tmp_path / "run/.lock").read_text() == "theirs"


HOSTILE: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a number for moments": lambda t: t.update({key(t, "exp_avg_sq"): torch.tensor(1.0)}),
    "a column for moments": lambda t: t.update(
        {key(t, "exp_avg_sq"): t[key(t, "exp_avg_sq")][..., :1].clone()}
    ),
    "no second moment": lambda t: t.pop(key(t, "exp_avg_sq")),
    "steps for a step": lambda t: t.update({key(t, "step"): torch.ones(3)}),
    "one parameter": lambda t: [t.pop(k) for k in list(t) if not k.startswith("token_embedding")],
    "whole numbers": lambda t: t.update({key(t, "exp_avg"): t[key(t, "exp_avg")].long()}),
    "nothing": lambda t: t.clear(),
}


def key(tensors: dict[str, torch.Tensor], quantity: str) -> str:
    return f"token_embedding.weight|{quantity}"


@pytest.mark.parametrize("what", HOSTILE)
def test_optimizer_state_of_another_shape_is_refused(tiny: Make, tmp_path: Path, what: str):
    """torch's fused kernels would read and write beyond it."""
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(5))
    path = out / "checkpoints/step-00000005/optimizer.safetensors"
    found = load_file(path)
    HOSTILE[what](found)
    save_file(found, path)
    vouch(path.parent)
    before = contents(out)
    with pytest.raises(InputError, match=r"^step-00000005: does not fit the config: "):
        run(tiny(), out)
    assert contents(out) == before


@pytest.mark.parametrize(
    "progress",
    [
        {"step": -5},
        {"step": 15},
        {"skipped_batches": -100},
        {"skipped_batches": 10**30},
        {"seconds": float("inf")},
        {"update_seconds": -1e9},
        {"skipped": 6},
        {"val_loss": float("nan")},
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused(tiny: Make, tmp_path: Path, progress: dict[str, float]):
    out = tmp_path / "run"
    run(tiny(), out, **stop_after(5))
    path = out / "checkpoints/step-00000005/state.json"
    state = json.loads(path.read_text())
    state["progress"] |= progress
    path.write_text(json.dumps(state))
    vouch(path.parent)
    with pytest.raises(InputError, match=r"^step-00000005: state.json: "):
        run(tiny(), out)
