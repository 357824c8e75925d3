"""`benchmarks/start.py`: how it reads a report of imports, and that it runs at small size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import start
from gpt.config import Config

ROOT = Path(__file__).parents[1]

REPORT = """\
something else on stderr
import time: self [us] | cumulative | imported package
import time:      2000 |       2000 |     sympy
import time:      3000 |       5000 |   torch._dynamo
import time:     40000 |      45000 | torch
import time:       500 |        500 |     matplotlib.figure
import time:        70 |        570 |   gpt.run.plot
import time:         8 |          8 |   json
import time:         1 |        579 | gpt.training
import time:       600 |        600 | torch._dynamo.late
"""


def test_imports_are_counted_to_what_asked_for_them():
    seconds = {name: s for name, s in start.seconds_of_imports(REPORT).items() if s}
    assert seconds == pytest.approx(
        {
            "torch": 45000e-6,
            "matplotlib": 500e-6,
            "gpt": (70 + 8 + 1) * 1e-6,
            "torch._dynamo": 600e-6,
        }
    )


@pytest.mark.slow
def test_it_runs_at_small_size(
    tiny: Callable[..., Config], tmp_path: Path, environment: dict[str, str]
):
    config, found = tmp_path / "tiny.yaml", tmp_path / "start.json"
    config.write_text(tiny().to_yaml())
    options = ["--config", config, "--json", found, "--rounds", "1", "--steps", "20", "25"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/start.py", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())
    (at,) = figures["starts"]
    assert 0 < at[0] <= at[1] <= at[2]
    assert 0 < figures["imports"]["torch"] < at[0] * 3
    for run, steps, evaluations in zip(figures["runs"], (20, 25), (3, 4), strict=True):
        assert run["steps"] == steps == run["calls"]["gpt.run.run.Run._count_updates"]
        assert run["calls"]["gpt.run.run.Run._evaluate"] == evaluations
        parts = sum(seconds for name, seconds in run["seconds"].items() if name != start.WHOLE)
        assert 0 < parts < run["seconds"][start.WHOLE]
    assert "| **command to first step** |" in done.stdout
