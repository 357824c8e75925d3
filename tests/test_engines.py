"""Engines that run cells on other machines: their flags, and what a machine checks and writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from comparing import Make, TwoCells
from test_cli import called

from gpt.cli import cells
from gpt.compare import estimate
from gpt.compare.execution import local, remote, slurm
from gpt.compare.execution.cell_runs import CellError
from gpt.compare.execution.engine import Engine, Work
from gpt.compare.execution.engines import ENGINES
from gpt.compare.execution.ray import _probe
from gpt.compare.execution.runner import run_tasks
from gpt.compare.execution.tasks import Task
from gpt.compare.grid import Cell
from gpt.errors import InputError
from gpt.hardware.processes import cores
from gpt.io.console import Console
from gpt.io.files import LOCK, lock_directory, lock_file
from gpt.run.directory import RunDirectory

# -- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compare", "scaling"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--address auto", "--address: belongs to --engine ray, not to local"),
        ("--engine ray --sbatch time=1", "--sbatch: belongs to --engine slurm, not to ray"),
        ("--engine slurm --gpus-per-task 1", "--gpus-per-task: belongs to --engine ray"),
        ("--engine slrum", "is not one of local, ray, slurm; perhaps you meant slurm"),
        ("--engine ray --gpus-per-task 1.5", "1.5 is above 1 and not a whole number"),
        ("--engine ray --cpus-per-task 0", "0 needs --gpus-per-task"),
        ("--engine ray --cpus-per-task -1", "is not between 0 and 10000"),
    ],
)
def test_wrong_flags(command: str, given: str, message: str, capsys: pytest.CaptureFixture[str]):
    name = {"compare": "quick", "scaling": "tiny"}[command]
    code, _, err = called(capsys, command, name, *given.split())
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_command(
    engine: str,
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cells, "is_installed", lambda name: False)
    code, _, err = called(capsys, "compare", "quick", "--engine", engine)
    assert code == 2
    assert f"{package} is not installed: pip install 'steadygpt[{engine}]'" in err


def test_every_engine_has_the_fields_of_its_flags():
    for name, engine in ENGINES.items():
        assert set(engine.__dataclass_fields__) == set(cells.FLAGS.get(name, ()))


def test_slurm_without_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(cells, "is_installed", lambda name: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ("quick", "--engine", "slurm", "--sbatch", "time=1")
    code, _, err = called(capsys, "compare", *arguments, "--out-dir", tmp_path / "x")
    assert code == 2
    assert "sbatch and squeue and srun and scontrol cannot be found" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "address", ["node7", "local", "ray://node7:1", "node7:x", ":1", "node7:99999"]
)
def test_an_address_of_another_form(address: str):
    with pytest.raises(InputError, match="is neither auto nor HOST:PORT"):
        _probe(address)


def test_a_port_where_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _probe(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match="cannot be reached"):
        _probe(f"127.0.0.1:{port}")


def test_cells_that_may_run_in_slurm_do_not_run_elsewhere(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    two = TwoCells(tiny, tmp_path, steps=2)
    (two.directory / remote.FOLDER).mkdir(parents=True)
    (two.directory / "grid.yaml").write_text(two.grid.to_yaml())
    jobs = two.directory / remote.FOLDER / "jobs.json"
    jobs.write_text(json.dumps({"100_0": [two.cells[0].id]}))
    with pytest.raises(InputError, match="may still run in Slurm; continue with --engine slurm"):
        two.run()


# -- what an engine is given, and what becomes of it -------------------------------------------


class Stub(Engine):
    """An engine that trains nothing."""

    def run(self, work: Work) -> bool:
        return True


def run_stub(directory: Path, tasks: Sequence[Task]) -> bool:
    return run_tasks(
        tasks,
        [cell for task in tasks for cell in task.cells],
        directory,
        workers=1000,
        keep_checkpoints=False,
        console=Console(quiet=True),
        stop=lambda: False,
        describe=lambda cell: "",
        engine=Stub(),
    )


def test_pictures_are_drawn_by_the_cores_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    processes: list[int] = []
    monkeypatch.setattr(local.Pool, "run", lambda pool, jobs, workers: processes.append(workers))
    run_stub(tmp_path, [])
    assert processes == [min(1000, cores())]


def test_a_result_that_cannot_be_seen_is_not_left_out(tmp_path: Path, cell: Cell):
    with pytest.raises(InputError, match=r"cell has ended, but its result cannot be seen"):
        run_stub(tmp_path, [Task((cell,), batched=False)])


# -- slurm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("time=60 nodes=2", "nodes=2: nodes cannot be changed"),
        ("time=60 ntasks-per-node=2", "ntasks-per-node cannot be changed"),
        ("time=60 parsable", "parsable cannot be changed"),
        ("time=60 signal=B:USR2@300", "signal=B:USR2@300 is not USR2@SECONDS"),
        ("time=60 signal=USR1@300", "signal=USR1@300 is not USR2@SECONDS"),
        ("time=0", "time=0 is too short: .* 90 seconds before .* at least 3 minutes"),
        ("time=0:01:59", "time=0:01:59 is too short"),
        ("time=9 signal=USR2@300", "time=9 is too short: .* 300 seconds .* at least 10 minutes"),
    ],
)
def test_options_of_sbatch_that_do_not_fit(options: str, message: str):
    with pytest.raises(InputError, match=message):
        slurm.Slurm(tuple(options.split()))._options()


def test_options_of_sbatch_that_fit():
    for options in (("time=3",), ("time=10", "signal=USR2@300")):
        slurm.Slurm(options)._options()


def named(cell: Cell, *ids: str) -> list[Task]:
    return [Task((replace(cell, id=name),), batched=False) for name in ids]


def write_refusal(session: remote.Session) -> None:
    ending = slurm.Ending(refused="node7 has torch 1")
    (session.folder / "ended/a").write_text(json.dumps(asdict(ending)))


@pytest.fixture
def refused(session: remote.Session, monkeypatch: pytest.MonkeyPatch) -> slurm._Queue:
    """Two elements, of which a node has refused the first."""
    jobs = {"100_0": ["a"], "100_1": ["b"]}
    (session.folder / slurm.JOBS).write_text(json.dumps(jobs))
    write_refusal(session)
    monkeypatch.setattr(slurm, "_query", lambda: {"100_0", "100_1"})
    return slurm._Queue(session)


def test_a_refusal_says_what_is_still_queued(refused: slurm._Queue, cell: Cell):
    waiting, rest = refused.split(named(cell, "a", "b"))
    (a,) = rest
    waiting["100_0"] = slurm.Waiting("a", a)
    write_refusal(refused.session)
    work = Work([], Path(), 1, False, lambda: False, print, print, print)
    with pytest.raises(InputError) as error:
        slurm._wait(work, refused.session, refused, waiting)
    assert str(error.value) == (
        "node7 has torch 1;\n1 task is still queued or running in Slurm (scancel 100 ends it)"
    )


def test_a_task_that_a_node_has_refused_is_submitted_again(refused: slurm._Queue, cell: Cell):
    a, b = named(cell, "a", "b")
    assert refused.split([a, b]) == ({"100_1": slurm.Waiting("b", b)}, [a])
    assert remote.names(refused.session.folder / "ended") == set()
    assert refused.jobs == {"100_1": ["b"]}


def test_a_submission_that_was_cut_off_is_not_repeated(session: remote.Session, cell: Cell):
    (session.folder / slurm.JOBS).write_text(json.dumps({slurm.SUBMITTING: ["a"]}))
    with pytest.raises(InputError, match="a submission to Slurm was cut off"):
        slurm._Queue(session).split(named(cell, "a"))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="needs SIGUSR2")
@pytest.mark.parametrize(
    ("signals", "code"),
    [(["SIGUSR2"], 144), (["SIGUSR2", "SIGTERM"], 144), (["SIGTERM"], 75), ([], None)],
)
def test_which_signal_comes_first_decides(
    session: remote.Session,
    cell: Cell,
    signals: list[str],
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    """SIGTERM comes first if a job is canceled, and after the warning at the time limit."""

    def train(session: remote.Session, task: Task, stop: Any) -> list[CellError | None]:
        for name in signals:
            signal.raise_signal(signal.Signals[name])
        assert stop() == bool(signals)
        return [None if signals else CellError("error", "it failed")]

    monkeypatch.setattr(remote.Session, "train", train)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]
    try:
        signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(144))  # as submitit's
        with pytest.raises(SystemExit) as end:
            slurm.Element(session, Task((cell,), batched=False))()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert end.value.code == code
    assert remote.names(session.folder / "ended") == (set() if signals else {"cell"})


# -- a task on another machine -----------------------------------------------------------------


@pytest.fixture
def cell(tiny: Make) -> Cell:
    config = tiny(checkpoint={"every": 5}, sampling={"tokens": 0})
    return Cell("cell", "arm", {}, {}, config)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> remote.Session:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "comparison").mkdir()
    return remote.begin(Path("comparison"), keep_checkpoints=False, threads=1, attended=True)


def test_it_trains_and_counts_its_updates(
    session: remote.Session, cell: Cell, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "SECONDS_BETWEEN_UPDATES", 0.0)
    task = Task((cell,), batched=False)
    assert session.begun() == set()
    with lock_directory(session.directory, "held"):
        assert session.train(task) == [None]
    assert session.unlocked() is None
    assert session.updates(task.name) == {"cell": 20}
    assert session.begun() == {"cell"}
    run = RunDirectory(session.directory / "cells/cell")
    result = run.read_result()
    assert result is not None
    assert result.status == "finished"
    assert not (run.path / "checkpoints").exists()
    session.close()
    assert not session.folder.exists()


@pytest.mark.parametrize("batched", [False, True])
def test_it_saves_once_the_token_is_deleted_and_resumes(
    session: remote.Session, cell: Cell, batched: bool, monkeypatch: pytest.MonkeyPatch
):
    task = Task((cell,), batched=batched)
    count = remote._Counter.__call__

    def stop_after_seven(self: remote._Counter, index: int) -> None:
        count(self, index)
        if self.updates["cell"] == 7:
            session.stop()

    with monkeypatch.context() as patch:
        patch.setattr(remote._Counter, "__call__", stop_after_seven)
        patch.setattr(remote, "SECONDS_BETWEEN_CHECKS", 0.0)
        assert session.train(task) == [None]
    run = RunDirectory(session.directory / "cells/cell")
    result = run.read_result()
    assert result is not None
    assert (result.status, result.step) == ("interrupted", 7)

    again = remote.begin(session.directory, keep_checkpoints=False, threads=1, attended=True)
    assert again.token != session.token
    assert again.train(task) == [None]
    result = run.read_result()
    assert result is not None
    assert (result.status, result.step) == ("finished", 20)


def test_a_batch_that_dies_resumes_from_its_last_save(
    session: remote.Session, cell: Cell, monkeypatch: pytest.MonkeyPatch
):
    task = Task((cell,), batched=True)

    def die(self: remote._Counter, index: int) -> None:
        self.updates["cell"] += 1
        if self.updates["cell"] == 13:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(remote._Counter, "__call__", die)
        with pytest.raises(SystemExit):
            session.train(task)
    assert session.train(task) == [None]
    history = (session.directory / "cells/cell/history.jsonl").read_text()
    assert json.loads(history.splitlines()[-1])["step"] == 10


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": Path("/no/such")}, f"node {HOST} cannot see "),
        ({"working": Path("/no/such")}, f"node {HOST} cannot see "),
        ({"token": "another"}, f"node {HOST} has another directory at "),
        ({"code": {**remote.versions(), "torch": "1.0"}}, f"node {HOST} has torch "),
        ({"code": {**remote.versions(), "steadygpt": "1"}}, "install the same on every node"),
    ],
)
def test_a_machine_that_cannot_train_says_why(
    session: remote.Session, cell: Cell, changes: dict[str, object], message: str
):
    with pytest.raises(InputError, match=message) as error:
        replace(session, **changes).train(Task((cell,), batched=False))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (session.directory / "cells").exists()


def test_a_lock_that_does_not_hold_is_noticed(session: remote.Session, cell: Cell):
    (session.directory / LOCK).touch()  # as another machine sees it if its locks are its own
    session.train(Task((cell,), batched=False))
    assert session.unlocked() == HOST


def test_it_waits_for_a_lock_that_a_dead_machine_has_left(
    session: remote.Session, cell: Cell, monkeypatch: pytest.MonkeyPatch
):
    path = session.directory / "cells/cell"
    held = lock_directory(path, "held")
    held.__enter__()
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    assert session.train(Task((cell,), batched=False)) == [None]


@pytest.mark.skipif(sys.platform == "win32", reason="a locked file cannot be written")
def test_a_lock_names_its_process_on_another_machine(tmp_path: Path):
    lock = tmp_path / "lock"
    with lock_file(lock, "busy"):
        assert lock.read_text() == f"{os.getpid()}\n{HOST}\n"
        with pytest.raises(InputError, match=r"^busy$"), lock_file(lock, "busy"):
            pass
        lock.write_text("7\nanother-host\n123\n")
        with (
            pytest.raises(InputError, match=r"^busy \(process 7 on another-host\)$"),
            lock_file(lock, "busy"),
        ):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_flock_a_lock_of_a_dead_process_is_taken_but_not_one_of_a_live_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import fcntl

    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = tmp_path / "lock"
    with lock_file(lock, "busy"):
        written = lock.read_text()
        with (
            pytest.raises(InputError, match=r"^busy$"),
            lock_file(lock, "busy", wait=2.5),  # filelock takes malformed ones after 2 s
        ):
            pass
    with subprocess.Popen(["true"]) as dead:
        pass
    lock.write_text(written.replace(str(os.getpid()), str(dead.pid)))
    os.utime(lock, (0, 0))
    with lock_file(lock, "busy"):
        pass


def test_a_lock_that_is_a_hard_link_keeps_its_contents(tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").hardlink_to(tmp_path / "mine")
    with lock_file(tmp_path / "lock", "busy"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"
