"""Several processes of which one fails: all end, nothing is left running, and it is said once."""

from __future__ import annotations

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from gpt.cli.launch import Shared, _reporting
from gpt.config import Config
from gpt.distributed.group import Group
from gpt.errors import InputError, LostProcessError
from gpt.run.recovery import advise_untried

FAULTY = [sys.executable, str(ROOT / "benchmarks/faulty.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN += ["--max-restarts=1", FAULTY[1]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tiny: Callable[..., Config], tmp_path: Path, environment: dict[str, str]) -> Start:
    """Start a run in two processes, of which one fails as the first argument says."""

    def run(
        fault: str,
        *flags: str,
        command: list[str] = FAULTY,
        out_dir: str = "run",
        **streams: int,
    ) -> subprocess.Popen[str]:
        timeout = 3.0 if fault.startswith("stop") else 60.0  # a busy machine is slow, too
        changes = {"steps": 200 if "stdin" in streams else 6, "process_timeout": timeout}
        config = tiny(training=changes, checkpoint={"every": 2}, evaluation={"every": 3})
        (tmp_path / "tiny.yaml").write_text(config.to_yaml())
        return subprocess.Popen(
            [*command, "tiny.yaml", "--out-dir", out_dir, "--processes", "2", *flags],
            cwd=tmp_path,
            env={**environment, "FAULT": fault},
            text=True,
            start_new_session=True,
            **(streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}),
        )

    return run


def running_in(session: int) -> list[str]:
    """The command lines of the processes of a session that have not ended five seconds later."""
    command = ["ps", "-s", str(session), "-o", "args="]
    end = time.monotonic() + 5
    while True:
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        running = [line for line in listed if "defunct" not in line]
        if not running or time.monotonic() > end:
            return running
        time.sleep(0.1)


def test_an_error_of_one_process_is_shown_once_with_its_rank(start: Start):
    process = start("input 1 backward 3")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err.splitlines()[-1] == "train.py: rank 1: data.path: is unreadable there"
    assert err.count("unreadable") == err.count("rank") == 1
    assert not re.search("restart|Traceback|tracker|gloo", err)
    assert running_in(process.pid) == []


def test_the_first_failure_decides_the_exit_code_of_all():
    store = HashStore()
    first, second = (Group(torch.device("cpu"), rank, 2, store) for rank in (1, 0))
    first.fail(2)
    for end in (lambda: second.fail(1), lambda: second.lost(RuntimeError("gloo: closed"))):
        with pytest.raises(SystemExit) as ended:
            end()
        assert ended.value.code == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("[gloo/unbound_buffer.cc:78] Timed out waiting", "within training.process_timeout"),
        ("[gloo/pair.cc:553] Connection closed by peer", "does not respond any more"),
    ],
)
def test_without_a_reason_a_process_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: str, message: str
):
    monkeypatch.setattr("gpt.distributed.group.PATIENCE", 0.0)
    group = Group(torch.device("cpu"), 0, 2, HashStore())
    with pytest.raises(LostProcessError, match=message):
        group.lost(RuntimeError(error))


@pytest.mark.parametrize(
    ("error", "kept", "shown"),
    [
        (InputError("x"), "InputError", ""),
        (OSError(errno.ENOSPC, "No space left"), "OSError", ""),
        (OSError(errno.ECONNRESET, "reset"), "SystemExit", "rank 1:\nTraceback"),
        (KeyError("a bug"), "SystemExit", "rank 1:\nTraceback"),
        (LostProcessError("it is gone"), None, "it is gone"),  # all start again
    ],
)
def test_what_the_parent_hears_of_an_error(
    error: Exception, kept: str | None, shown: str, capsys: pytest.CaptureFixture[str]
):
    heard: list[BaseException] = []
    memory = SimpleNamespace(
        errors=SimpleNamespace(put=heard.append), stop=SimpleNamespace(value=0)
    )
    with pytest.raises(SystemExit), _reporting(1, memory):  # type: ignore[arg-type]
        raise error
    assert [type(each).__name__ for each in heard] == ([] if kept is None else [kept])
    assert capsys.readouterr().err.startswith(shown)


def shared(pids: list[int], done: list[int], error: BaseException | None = None) -> Shared:
    errors = SimpleNamespace(empty=lambda: error is None, get=lambda: error)
    return Shared(SimpleNamespace(value=False), pids, done, errors)  # type: ignore[arg-type]


@pytest.mark.parametrize("done", [False, True])
def test_the_others_are_killed_when_one_dies_before_it_is_done(done: bool):
    dead, alive = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    dead.kill()
    dead.wait()
    memory = shared([dead.pid, alive.pid], [done, False])
    memory.kill_incomplete()
    if done:
        assert alive.poll() is None
        alive.kill()
    assert alive.wait(5) == -signal.SIGKILL
    assert memory.pids == ([dead.pid, alive.pid] if done else [0, 0])


def test_no_process_starts_after_an_error():
    with pytest.raises(InputError, match="wrong"):
        shared([0], [False], InputError("wrong")).__getstate__()


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [(4, "4 sequences at a time;\ntraining.micro_batch 2 may fit"), (1, "a single sequence")],
)
def test_several_processes_do_not_try_smaller_micro_batches(micro_batch: int, message: str):
    trainer = SimpleNamespace(micro_batch=micro_batch, config=SimpleNamespace(batch_sequences=8))
    assert message in advise_untried(trainer, "no memory")  # type: ignore[arg-type]


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_with_advice(start: Start):
    process = start("memory 1 update 2", "--training.micro-batch", "2")
    err = process.communicate()[1]
    assert process.returncode == 2
    assert err.splitlines()[-2:] == [
        "train.py: rank 1: training.micro_batch: out of memory with 2 sequences at a time;",
        "train.py: --training.micro-batch 1 may fit, and resumes from the last checkpoint",
    ]


@pytest.mark.slow
def test_a_full_disk_is_one_error_of_all_and_the_state_is_saved_elsewhere(
    start: Start, tmp_path: Path
):
    elsewhere = ("--checkpoint.spare-dir", str(tmp_path / "spare"))
    process = start("full 0 checkpoint 1", *elsewhere)
    err = process.communicate()[1]
    assert process.returncode == 2
    assert err.count("No space left on device") == 1
    assert not re.search("rank|restart|Traceback|tracker|gloo", err)
    assert running_in(process.pid) == []
    (saved,) = re.findall("--out-dir (.*) resumes from there", err)
    assert Path(saved).parent == tmp_path / "spare"
    process = start("", *elsewhere, out_dir=saved)
    assert "finished: completed all 6 steps" in process.communicate()[0]


@pytest.mark.slow
def test_a_stop_of_any_process_ends_all_and_resumes_bit_for_bit(start: Start, tmp_path: Path):
    longer = ("--training.steps", "150", "--evaluation.every", "150", "--checkpoint.every", "150")
    process = start("terminate 1 backward 3", *longer)
    assert "interrupted: stopped after step" in process.communicate()[0]
    assert process.returncode == 75
    ended = start("", *longer)
    ended.communicate()
    (tmp_path / "run").rename(tmp_path / "stopped")
    undisturbed = start("", *longer)
    undisturbed.communicate()
    assert (ended.returncode, undisturbed.returncode) == (0, 0)
    for name in ("model", "optimizer"):
        stopped, whole = (
            load_file(tmp_path / run / f"checkpoints/step-00000150/{name}.safetensors")
            for run in ("stopped", "run")
        )
        assert [key for key in whole if not torch.equal(whole[key], stopped[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [FAULTY, TORCHRUN], ids=["train.py", "torchrun"])
def test_a_run_that_required_a_fresh_directory_resumes_after_a_restart(
    start: Start, command: list[str]
):
    process = start("kill 1 backward 5", "--resume", "never", command=command)
    out, err = process.communicate()
    assert process.returncode == 0
    assert err.count("restart 1 of 3") == (command == FAULTY)
    assert "finished: completed all 6 steps" in out


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed_and_killed(start: Start):
    process = start("stop 1 backward 4", "--max-restarts", "0")
    err = process.communicate()[1]
    assert process.returncode == 1
    assert err.count("does not respond within --training.process-timeout") == 1
    assert running_in(process.pid) == []


@pytest.mark.slow
def test_a_terminal_s_interrupt_saves_and_says_how_to_resume(start: Start, tmp_path: Path):
    leader, follower = pty.openpty()
    process = start("", stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = ""
    while chunk := _read(leader):
        shown += chunk
        if "step 3:" in shown and process.returncode is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            process.returncode = -1
    process.returncode = None
    assert process.wait() == 75
    end = shown.replace("\r", "").split("SIGINT")[1]
    assert re.search("interrupted: stopped after step .*\n  to resume:\n.* --processes 2\n$", end)
    assert not re.search("restart|Traceback|tracker|gloo", shown)
    assert running_in(process.pid) == []


def _read(handle: int) -> str:
    try:
        return os.read(handle, 4096).decode()
    except OSError:  # nothing has the other end open
        return ""
