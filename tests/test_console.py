"""Output is escaped, and in UTF-8 where it is redirected."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from gpt.errors import printable
from gpt.io import console
from gpt.io.console import Console, show, write_result

CONTROLLING = [
    "\x1b[2J",
    "\r",
    "\x07",
    "\x9b",
    "\u202e",
    "\u200b",
    "\u2028",
    "\uffff",
    "\udcff",
    "\x7f",
]


@pytest.mark.parametrize("text", CONTROLLING)
def test_characters_that_control_a_terminal_are_escaped(
    text: str, capsys: pytest.CaptureFixture[str]
):
    show(f"a{text}b\n\tc")
    Console().say(f"a{text}b\n\tc")
    out, err = capsys.readouterr()
    assert out == err
    assert out.removesuffix("\n").replace("\n\t", "").isprintable()
    assert "\n\tc" in out


@pytest.mark.parametrize(
    "text", ["naïve", "日本\u3000語", "a\u00a0b", "👍", "e\u0301", "ש", "%s{}$"]
)
def test_letters_of_every_script_are_shown(text: str):
    assert printable(text) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_result_is_exact_unless_a_terminal_shows_it(monkeypatch: pytest.MonkeyPatch):
    text = "a\x1b[31mb\r\n\tc"
    for stream, expected in ((io.StringIO(), text), (Terminal(), "a\\x1b[31mb\\r\n\tc")):
        monkeypatch.setattr(sys, "stdout", stream)
        write_result(text)
        assert stream.getvalue() == expected


def test_a_terminal_keeps_its_encoding_and_escapes_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    for is_terminal, expected in ((True, b"\\u65e5"), (False, "日".encode())):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(stream.buffer, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stdout", stream)
        console.set_encoding()
        show("日")
        assert stream.buffer.getvalue().strip() == expected


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}])
def test_redirected_output_is_utf8(variables: dict[str, str], tmp_path: Path):
    tree = {"sampling": {"prompt": "日本 ł \u202e\x1b\u2028"}, "data": {"cache_dir": "käse \u0141"}}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    command = [sys.executable, str(ROOT / "train.py"), str(path), "--print-config"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONUTF8")}
    done = subprocess.run(command, capture_output=True, env={**plain, **variables}, timeout=60)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout.decode("utf-8"))
    assert printed["sampling"]["prompt"] == tree["sampling"]["prompt"]
    assert printed["data"]["cache_dir"] == tree["data"]["cache_dir"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.6, "1:00"),
        (3723, "1:02:03"),
        (172_799, "47:59:59"),
        (2e5, "2.3 days"),
        (1.2e8, "1,389 days"),
    ],
)
def test_a_duration_is_in_the_units_of_its_size(seconds: float, text: str):
    assert console.duration(seconds) == text
