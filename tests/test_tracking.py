"""Trackers show every step of a run once, whatever happens to it, and never affect it."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_cli import called
from test_nonfinite import batch, corrupt  # noqa: F401 (a fixture)
from test_training import power_cut_after, run, stop_after

from gpt import checkpoint as checkpoints
from gpt import tracking
from gpt.config import Config, load, validate
from gpt.errors import InputError
from gpt.run import log
from gpt.tracking.follower import Follower, TrackedRun, Values, to_values

Make = Callable[..., Config]
NAMES = tuple(tracking.TRACKERS)


class Memory:
    """A tracker that keeps what it is given; `runs` has its instances."""

    runs: ClassVar[list[Memory]] = []

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.rows, self.result = run, [], None
        self.rows: list[tuple[int, Values]] = []
        self.finished = False
        Memory.runs.append(self)

    def log(self, step: int, values: Values) -> None:
        self.rows.append((step, values))

    def finish(self, result: dict[str, Any] | None) -> None:
        self.finished, self.result = True, result


@pytest.fixture
def tracked(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with a tracker that is installed everywhere."""
    Memory.runs = []
    monkeypatch.setattr(tracking, "is_installed", lambda package: True)
    monkeypatch.setitem(tracking.TRACKERS, "trackio", Memory)
    monkeypatch.setattr(tracking.follower, "POLL", 0.01)
    return tiny(tracking="trackio", training={"nonfinite": "rollback"}, diagnostics={"every": 5})


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def check(memory: Memory, directory: Path, steps: int = 20) -> None:
    """Every step from 0 is there once, with every number of metrics.jsonl."""
    assert [step for step, _ in memory.rows] == list(range(steps + 1))
    logged = dict(memory.rows)
    count = 0
    for record in lines(directory):
        values = logged[record["step"]]
        if "loss" in record:
            assert values["train/loss"] == record["loss"]
            assert values["train/learning_rate"] == record["learning_rate"]
        count += len(record.keys() - {"step", "layer", "batches"})
    assert sum(map(len, logged.values())) == count
    evaluated = {r["step"]: r["val_loss"] for r in lines(directory) if "val_loss" in r}
    assert {s: v["val/loss"] for s, v in logged.items() if "val/loss" in v} == evaluated
    assert memory.finished


@pytest.mark.parametrize("read_late", [False, True])
def test_a_run_from_start_to_end(
    tracked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_late: bool
):
    if read_late:  # as on a GPU: every training.log_every steps
        monkeypatch.setattr(log, "READ_EVERY", {})
    result = run(tracked, tmp_path / "run")
    (memory,) = Memory.runs
    check(memory, tmp_path / "run")
    assert memory.result["status"] == "finished"
    assert memory.result["val_loss"] == result.val_loss
    described = memory.run.describe()
    assert described["directory"] == str(tmp_path / "run")
    assert described["optimizer"]["learning_rate"] == tracked.optimizer.learning_rate
    assert memory.run.describe_flat()["optimizer.learning_rate"] == tracked.optimizer.learning_rate
    assert memory.run.name == "run"


@pytest.mark.parametrize("updates", [3, 10, 13])
def test_a_run_that_is_stopped_and_resumed(tracked: Config, tmp_path: Path, updates: int):
    run(tracked, tmp_path / "run", **stop_after(updates))
    check(Memory.runs[-1], tmp_path / "run", updates)
    assert Memory.runs[-1].result["status"] == "interrupted"
    run(tracked, tmp_path / "run")
    first, second = Memory.runs
    check(second, tmp_path / "run")
    assert first.run.identity == second.run.identity


def test_a_run_that_resumes_from_an_older_checkpoint(tracked: Config, tmp_path: Path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tracked, tmp_path / "run", **power_cut_after(17))
    run(tracked, tmp_path / "run")
    check(Memory.runs[-1], tmp_path / "run")
    newest = checkpoints.steps(tmp_path / "run/checkpoints")[20]
    (newest / "state.json").write_text("damaged")
    (tmp_path / "run/result.json").unlink()
    run(tracked, tmp_path / "run")
    check(Memory.runs[-1], tmp_path / "run")


@pytest.mark.parametrize("fails", [13, 3])
def test_a_run_that_is_rolled_back(tracked: Config, tmp_path: Path, request: Any, fails: int):
    bad = batch(tracked, fails)
    request.getfixturevalue("corrupt")(lambda x: torch.equal(x, bad))
    assert run(tracked, tmp_path / "run").rollbacks == 1
    check(Memory.runs[-1], tmp_path / "run")
    assert all(memory.finished for memory in Memory.runs)


class Broken(Memory):
    """Fails where `at` says; `waits` blocks instead of failing."""

    at = ""
    waits: threading.Event | None = None

    def _fail(self, at: str) -> None:
        if at == self.at:
            if self.waits is not None:
                self.waits.wait()
            raise RuntimeError("no\x1b[2J space\nmore")

    def __init__(self, run: TrackedRun) -> None:
        self._fail("start")
        super().__init__(run)

    def log(self, step: int, values: Values) -> None:
        self._fail("log")

    def finish(self, result: dict[str, Any] | None) -> None:
        self._fail("finish")


def essence(directory: Path) -> list[Any]:
    """What must be the same with and without trackers."""
    timed = ("tokens_per_second", "step_seconds")
    records = [{k: v for k, v in line.items() if k not in timed} for line in lines(directory)]
    path = directory / "checkpoints/step-00000020"
    return [records, *((path / n).read_bytes() for n in checkpoints.FILES if "tensors" in n)]


@pytest.fixture(scope="module")
def untracked(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untracked") / "run"
    run(tiny(training={"nonfinite": "rollback"}, diagnostics={"every": 5}), path)
    assert not (path / "tracking.json").exists()
    return path


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_tracker_that_fails_or_hangs(
    tracked: Config,
    untracked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
    hangs: bool,
):
    waits = threading.Event() if hangs else None
    monkeypatch.setattr(Broken, "at", at)
    monkeypatch.setattr(Broken, "waits", waits)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.3)
    monkeypatch.setitem(tracking.TRACKERS, "trackio", Broken)
    from gpt import training

    assert training.train(tracked, tmp_path / "run").status == "finished"
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "tracking" in line]
    assert "trackio" in warning
    assert ("not finished in 0.3 s" if hangs else r"RuntimeError: no\x1b[2J space)") in warning
    assert essence(tmp_path / "run") == essence(untracked)
    if waits is not None:
        waits.set()
        for thread in threading.enumerate():
            if thread.name == "trackio":
                thread.join(9)


def test_a_line_is_read_when_it_is_complete(
    tracked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = (tmp_path / "metrics.jsonl").open("a")
    file.write('{"step": 1, "val_loss": 1.5}\n{"step": 2, "val')
    file.flush()
    warnings: list[str] = []
    follower = Follower("name", Memory, TrackedRun(tracked, tmp_path, None), warnings.append)
    polled = threading.Semaphore(0)
    wait = follower.ended.wait
    monkeypatch.setattr(follower.ended, "wait", lambda t: (polled.release(), wait(t))[1])
    follower.start()
    for _ in range(3):
        assert polled.acquire(timeout=9)
    file.write('_loss": null}\n')
    file.close()
    follower.ended.set()
    follower.join(9)
    (one, two) = Memory.runs[0].rows
    assert one == (1, {"val/loss": 1.5})
    assert two[0] == 2
    assert math.isnan(two[1]["val/loss"])
    assert warnings == []


def test_the_names_of_numbers():
    training = {"step": 1, "loss": 2.0, "batches": "abc", "skipped": True, "grad_norm": None}
    values = to_values(training)
    assert math.isnan(values.pop("train/grad_norm"))
    assert values == {"train/loss": 2.0, "train/skipped": 1.0}
    evaluation = {"step": 1, "val_loss": 2.0, "val_bits_per_byte": 3}
    assert to_values(evaluation) == {"val/loss": 2.0, "val/bits_per_byte": 3.0}
    assert to_values({"step": 1, "layer": 3, "grad_rms": 2.0}) == {"grad_rms/layer-03": 2.0}
    assert to_values({"step": 1, "sharpness": 2.0}) == {"model/sharpness": 2.0}


def test_a_damaged_identity_is_named(tracked: Config, tmp_path: Path):
    (tmp_path / "tracking.json").write_text("{}")
    with pytest.raises(InputError, match=r"tracking\.json: is damaged; delete it"):
        tracking.Tracking(tracked, tmp_path, print)


# -- Options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [("wandb", ("wandb",)), (["wandb", "wandb"], ("wandb",)), (NAMES, NAMES), (None, ())],
)
def test_names_in_a_config(given: object, names: tuple[str, ...]):
    assert validate(Config, {"tracking": given}).tracking == names


def test_an_unknown_name(tiny: Make):
    with pytest.raises(InputError, match=r"tracking\.0: 'tensorbord' is .* meant tensorboard$"):
        tiny(tracking=["tensorbord"])


def test_an_unknown_name_after_a_flag(tiny_file: Path, capsys: pytest.CaptureFixture[str]):
    code, _, error = called(capsys, "train", tiny_file, "--tracking", "wandb", "trackia")
    assert code == 2
    assert error.startswith("train.py: --tracking: 'trackia' is not one of ")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_missing_package_is_named_before_anything_is_written(
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
):
    monkeypatch.setattr(tracking, "is_installed", lambda package: package == "trackio")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # can be imported, but is not the package
    out, cache = tmp_path / "run", tmp_path / "cache"
    where = ["--out-dir", out, "--data.cache-dir", cache, *flags]
    code, _, error = called(capsys, "train", tiny_file, *where, "--tracking", *NAMES)
    assert code == 2
    assert error.splitlines() == [
        "train.py: tracking: tensorboard and wandb are not installed: "
        "pip install 'steadygpt[tensorboard,wandb]'"
    ]
    config = load(tiny_file, {"tracking": ["wandb"]})
    with pytest.raises(InputError, match=r"is not installed: pip install 'steadygpt\[wandb\]"):
        run(config, out)
    assert not out.exists()
    assert not cache.exists()
    code, printed, _ = called(capsys, "train", tiny_file, "--print-config", "--tracking", "wandb")
    assert (code, printed.count("- wandb")) == (0, 1)


def test_a_package_thatis_installed_is_found():
    assert tracking.is_installed("pytest")
    assert not tracking.is_installed("steadygpt-no-such-package")


def test_a_finished_run_needs_no_package(tiny_run: Path, tiny: Make, monkeypatch: Any):
    monkeypatch.setattr(tracking, "is_installed", lambda package: False)
    assert run(tiny(tracking="wandb"), tiny_run).status == "finished"


def test_cells_of_a_comparison_are_not_tracked(run_grid: Any):
    code, _, error = run_grid("--tracking", "wandb")
    assert code == 2
    assert "tracking: the cells of a comparison are not tracked" in error


# -- Real trackers -----------------------------------------------------------------------------


def scalars(directory: Path) -> Any:
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module, reason="tensorboard is not installed")
    return accumulator.EventAccumulator(str(directory), {"scalars": 0})


def test_tensorboard_shows_every_step_once(tracked: Config, tmp_path: Path, request: Any):
    """Also a TensorBoard that has been open since before the cut."""
    path = tmp_path / "run"
    opened = scalars(path)
    config = tracked.model_copy(update={"tracking": ("tensorboard",)})
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, path, **power_cut_after(17))
    opened.Reload()
    bad = batch(config, 19)
    request.getfixturevalue("corrupt")(lambda x: torch.equal(x, bad))
    assert run(config, path).rollbacks == 1
    assert sum(file.stat().st_size > 0 for file in path.glob("events.*")) == 1
    fresh = scalars(path)
    losses = {r["step"]: r["loss"] for r in lines(path) if "loss" in r}
    for each in (opened, fresh):
        each.Reload()
        events = each.Scalars("train/loss")
        assert [event.step for event in events] == list(range(1, 21))
        assert all(event.value == pytest.approx(losses[event.step], rel=1e-6) for event in events)
        assert [event.step for event in each.Scalars("val/loss")] == [0, 10, 20]
    times = [event.wall_time for event in fresh.Scalars("train/loss")]
    assert times == sorted(times)
    texts = {tag: fresh.Tensors(tag)[0].tensor_proto.string_val for tag in fresh.Tags()["tensors"]}
    assert b"placement: pre" in texts["config"][0]
    assert b'"status": "finished"' in texts["result"][0]
    assert str(path).encode() in texts["directory"][0]
    assert "_hparams_/session_end_info" in texts


@pytest.mark.slow
def test_wandb_shows_every_step_once(
    tracked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "STOP_SECONDS", 60.0)
    path, config = tmp_path / "run", tracked.model_copy(update={"tracking": ("wandb",)})
    for options in (stop_after(13), {}):
        run(config, path, **options)
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        (file,) = folder.glob("*.wandb")
    records = list(wandb_records(file))
    steps = [each.history.step.num for each in records if each.HasField("history")]
    assert steps == list(range(21))
    (started,) = [each.run for each in records if each.HasField("run")]
    assert (started.project, started.display_name) == ("steadygpt", "run")
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert settings["directory"] == str(path)
    assert settings["model"]["layers"] == 2
    summary = {
        item.key: json.loads(item.value_json)
        for each in records
        for item in each.summary.update
        if item.key
    }
    assert summary["status"] == "finished"


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: protocol buffers in LevelDB's log format.

    After a header of 7 bytes come blocks of 32 KiB with pieces: checksum, length, type (1: whole,
    2: first, 3: middle, 4: last), data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, data = path.read_bytes(), 7, b""
    while at < len(raw):
        if -at % 2**15 in range(1, 7):  # too little is left of the block for a piece
            at += -at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        piece, at = raw[at + 7 : at + 7 + length], at + 7 + length
        data = piece if kind in (1, 2) else data + piece
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(data)
            yield record


@pytest.mark.slow
def test_trackio_shows_every_step_once(
    tracked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()  # the stand-in of this name
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr(tracking, "STOP_SECONDS", 60.0)
    for options in (stop_after(13), {}):
        run(tracked, tmp_path / "run", **options)
    run(tracked, tmp_path / "other")
    with sqlite3.connect(tmp_path / "trackio/steadygpt.db") as database:
        rows = database.execute("SELECT run_name, step FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs WHERE run_name = 'run'")
    assert rows == [(name, step) for name in ("run", "other") for step in range(21)]
    assert json.loads(config)["directory"] == str(tmp_path / "run")


def test_tensorboard_on_a_full_disk(
    tracked: Config, untracked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from gpt import training
    from gpt.tracking.tensorboard import TensorBoard

    class Full(TensorBoard):
        def log(self, step: int, values: Values) -> None:
            if step == 7:
                self._file = open("/dev/full", "wb")  # noqa: SIM115
                self._records = type(self._records)(self._file)
            super().log(step, values)

    tracking.TRACKERS["trackio"] = Full  # restored by `tracked`
    assert training.train(tracked, tmp_path / "run").status == "finished"
    error = capfd.readouterr().err
    (warning,) = [line for line in error.splitlines() if "tracking" in line]
    assert "No space left on device" in warning
    assert "Traceback" not in error
    assert essence(tmp_path / "run") == essence(untracked)
