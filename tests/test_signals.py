"""Signals and time limits: a command that is told to stop saves what it has and says so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_cli import called

from gpt.cli import common
from gpt.config import Config
from gpt.trainer import Trainer

Make = Callable[..., Config]


@pytest.mark.parametrize("name", ["train", "sample"])
def test_ctrl_c_before_there_is_anything_to_save(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gpt.cli.{name}.parse", interrupt)
    assert called(capsys, name, "x")[0] == 130


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_can_be_resumed(
    tiny: Make, tmp_path: Path, environment: dict[str, str], number: signal.Signals
):
    long = {
        "training": {"steps": 3000},
        "evaluation": {"every": 3000},
        "checkpoint": {"every": 3000},
    }
    path = tmp_path / "long.yaml"
    path.write_text(tiny(**long).to_yaml())
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", path, "--out-dir", out]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 30,' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f"{number.name}: stopping; a second signal kills the process" in stderr
    assert stdout.startswith("interrupted: stopped after step")
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (out / f"checkpoints/step-{result['step']:08d}/manifest.json").is_file()
    assert len(list((out / "checkpoints").glob("step-*"))) == 1


def test_an_interrupt_ends_sampling_at_once(tiny_run: Path, environment: dict[str, str]):
    command = [sys.executable, ROOT / "sample.py", tiny_run, "--max-new-tokens", "1000000"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "step" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_an_interrupt_is_not_lost_where_an_import_would_swallow_it():
    """As `except:` around an optional import does with KeyboardInterrupt."""
    script = (
        "import os, signal\nfrom gpt.cli.common import command\nwith command('x'):\n    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n    except BaseException:\n        pass"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_callers_own_signal_handlers_come_back(capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGINT)
    called(capsys, "sample", "nowhere")
    assert signal.getsignal(signal.SIGINT) is before


def test_after_max_seconds_it_saves_and_the_run_can_be_resumed(
    capsys: pytest.CaptureFixture[str], tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(tiny().to_yaml())
    made: list[None] = []
    clock, update = time.monotonic, Trainer.update

    def counted(self: Trainer, *args: Any) -> bool:
        made.append(None)
        return update(self, *args)

    monkeypatch.setattr(Trainer, "update", counted)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock() + (100 if len(made) > 4 else 0))
    code, stdout, stderr = called(capsys, "train", path, "--out-dir", out, "--max-seconds", "50")
    monkeypatch.undo()
    assert code == 75
    assert stderr.count("reached the time limit of 50 s: stopping") == 1
    step = json.loads((out / "result.json").read_text())["step"]
    assert 0 < step < 20
    assert stdout.startswith(f"interrupted: stopped after step {step}; state saved")
    assert called(capsys, "train", path, "--out-dir", out, "--max-seconds", "50")[0] == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e301", "inf"])
@pytest.mark.parametrize("name", ["train", "compare"])
def test_max_seconds_is_a_time(
    capsys: pytest.CaptureFixture[str], name: str, seconds: str, tiny_file: Path, tmp_path: Path
):
    file = {"train": tiny_file, "compare": ROOT / "configs/compare/quick.yaml"}[name]
    problem = f"{seconds!r} is not between 0.001 and 1e+09"
    if seconds in ("0", "-1", "inf"):
        problem += "; null switches it off"
    if seconds == "soon":
        problem = "must be a number, found 'soon'"
    command = [name, file, "--out-dir", tmp_path / "run", f"--max-seconds={seconds}"]
    code, _, stderr = called(capsys, *command)
    assert (code, stderr) == (
        2,
        f"{name}.py: --max-seconds: {problem}\n",
    )
    assert not (tmp_path / "run").exists()
