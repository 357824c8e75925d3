"""A test that crashes or hangs ends the run as a failure that names it, and soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("xdist")
pytestmark = pytest.mark.slow
CRASH = "import os, signal\ndef test_bad(): os.kill(os.getpid(), signal.SIGSEGV)\n"
HANG = "import re\ndef test_bad(): re.match('(a*)*b', 'a' * 40)\n"  # keeps the interpreter's lock
FINE = "def test_fine(): pass\n"
SLOW = "import time\ndef test_slow(): time.sleep(100)\ndef test_slower(): time.sleep(100)\n"


@pytest.mark.parametrize(
    ("bad", "limit", "workers", "beside"),
    [(CRASH, "300", 2, SLOW), (HANG, "3", 1, FINE)],
    ids=["crash", "hang"],
)
def test_a_crash_or_a_hang_ends_the_run_and_is_named(
    bad: str, limit: str, workers: int, beside: str, tmp_path: Path
):
    (tmp_path / "test_a.py").write_text(FINE + bad + FINE.replace("fine", "later"))
    (tmp_path / "test_b.py").write_text(beside)
    options = ["-c", ROOT / "pyproject.toml", "-o", f"faulthandler_timeout={limit}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "conftest", f"-n{workers}", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"},
        timeout=60,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "test_a.py::test_bad crashed" in ran.stdout
    if bad == HANG:
        assert "Timeout" in ran.stderr
        assert "in test_bad" in ran.stderr
