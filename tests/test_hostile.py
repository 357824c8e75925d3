"""`benchmarks/hostile.py`: each sort of failure is noticed, and a few inputs of each kind run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("it forks, and reads /proc", allow_module_level=True)

from benchmarks import hostile

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> hostile.Place:
    place = hostile.Place(tmp_path)
    place.work.mkdir()
    place.outside.mkdir()
    (place.work / "config.yaml").write_text("seed: 1\n")
    (place.outside / "other.bin").write_bytes(b"precious")
    return place


def refuses(arguments: list[str]) -> int:
    print("train.py: config.yaml: seed: must be a number", file=sys.stderr)
    return 2


def raises(arguments: list[str]) -> int:
    raise ZeroDivisionError("a fault")


def warns(arguments: list[str]) -> int:
    print("gpt/run/directory.py:3: UserWarning: discards the imaginary part", file=sys.stderr)
    return 0


def hangs(arguments: list[str]) -> int:
    time.sleep(60)
    return 0


def allocates(arguments: list[str]) -> int:
    assert b"x" * (5 * 2**28)
    return 0


def dies(arguments: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def writes_outside(arguments: list[str]) -> int:
    Path("../outside/new").write_text("x")
    return 0


def truncates_outside(arguments: list[str]) -> int:
    Path("../outside/other.bin").write_text("")
    return 0


def loses(arguments: list[str]) -> int:
    Path("config.yaml").write_text("")
    return refuses(arguments)


def mumbles(arguments: list[str]) -> int:
    print("train.py: something is wrong", file=sys.stderr)
    return 2


def rambles(arguments: list[str]) -> int:
    print("train.py: config.yaml: a\n" * 4, file=sys.stderr)
    return 2


def steers(arguments: list[str]) -> int:
    print("\x1b[2J")
    return 0


def writes_markup(arguments: list[str]) -> int:
    Path("fresh").mkdir()
    Path("fresh/report.md").write_text(hostile.SCRIPT)
    return 0


def writes_a_formula(arguments: list[str]) -> int:
    Path("fresh").mkdir()
    Path("fresh/report.md").touch()
    Path("fresh/cells.csv").write_text("id,arm\na,=1+1\n")
    return 0


def has_no_report(arguments: list[str]) -> int:
    return hostile.NO_REPORT


PLANTED = {
    raises: "traceback",
    warns: "traceback",
    hangs: "time",
    allocates: "memory",
    dies: "signal",
    writes_outside: "outside",
    truncates_outside: "outside",
    loses: "lost",
    mumbles: "unclear",
    rambles: "unclear",
    steers: "output",
    writes_markup: "output",
    writes_a_formula: "output",
    has_no_report: "output",
    refuses: None,
}


@pytest.mark.parametrize("command", PLANTED, ids=lambda command: command.__name__)
def test_each_sort_of_failure_is_noticed(
    command: hostile.Command, place: hostile.Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(hostile.COMMANDS, "train.py", command)
    if command is hangs:
        monkeypatch.setattr(hostile, "SECONDS", 0.5)
    outcome = hostile.attempt(hostile.Input("train.py", [], ""), place, {})
    wanted = PLANTED[command]
    assert set(outcome.failures) == ({wanted} if wanted else set()), outcome


def test_every_sort_is_planted():
    assert set(PLANTED.values()) - {None} == set(hostile.SORTS)


def test_a_few_inputs_of_each_kind(environment: dict[str, str]):
    """They run and are counted; whether the program withstands them is the benchmark's to say."""
    number = 4 * len(hostile.KINDS)
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/hostile.py", "--inputs", str(number)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert done.stdout, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["all", str(number)], done.stdout[-3000:]
    assert not done.stderr
