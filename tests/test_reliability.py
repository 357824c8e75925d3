"""The short form of `benchmarks/reliability.py`: the same script with small numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and reads /proc")
@pytest.mark.parametrize(
    ("part", "number", "promises"),
    [
        ("kills", 2, ["kills {} of {} survived"]),
        ("stages", 10, ["stages {} of {} survived"]),
        ("processes", 1, ["processes {} of {} survived"]),
        ("damage", 6, ["damage {} of {} detected", "damaged runs {} of {} recovered"]),
    ],
)
def test_whatever_is_done_to_it_a_run_ends_as_the_undisturbed_one(
    part: str, number: int, promises: list[str], environment: dict[str, str]
):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/reliability.py", part, "--number", str(number)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for promise in promises:
        assert re.search(promise.format(r"(\d+)", r"\1"), done.stdout), done.stdout
