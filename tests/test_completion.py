"""What Tab offers in a shell."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.cli import COMMANDS, tab
from gpt.config.shipped import names

pytest.importorskip("argcomplete")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs/one").mkdir(parents=True)
    for name in ("my.yaml", "notes.txt", ".hidden.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def offered(line: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """What the program writes for a shell when Tab is pressed at the end of the line."""
    out = folder / ".completions"
    typed = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    typed |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_IFS": "\n"}
    done = subprocess.run(
        [sys.executable, "-m", "gpt"], env={**environment, **typed}, cwd=folder, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    return [word.strip() for word in out.read_text().splitlines()]


def test_commands_their_arguments_and_options(folder: Path, environment: dict[str, str]):
    assert offered("steadygpt ", folder, environment) == [*COMMANDS]
    line = "steadygpt train quickstart --seed 1 --schedule.wa"
    assert offered(line, folder, environment) == ["--schedule.warmup", "--schedule.warmup-steps"]


@pytest.mark.slow
def test_the_start_of_a_line(folder: Path, environment: dict[str, str]):
    files = ["my.yaml", "runs/"]
    expected = {"train ": [*names("config"), *files], "trian ": [], "--": ["--help", "--version"]}
    assert {typed: offered(f"steadygpt {typed}", folder, environment) for typed in expected} == (
        expected
    )


def values(placeholder: str, prefix: str = "") -> list[str]:
    """What is offered for an argument, given what the help calls it."""
    action = argparse.ArgumentParser().add_argument("--option", metavar=placeholder)
    return list(tab._values(prefix, action))


def test_values_are_those_of_the_help(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    expected = {
        "{adamw,muon}": ["adamw", "muon"],
        "auto|INT": ["auto"],
        "{true,false}|null": ["true", "false", "null"],
        "FLOAT": [],
        "RUN_DIR": ["runs/"],
        "auto|never|CHECKPOINT": ["auto", "never", "runs/"],
        "FILE": ["my.yaml", "notes.txt", "runs/"],
        "CONFIG.yaml": [*names("config"), "my.yaml", "runs/"],
        "GRID.yaml": [*names("grid"), "my.yaml", "runs/"],
        "LADDER.yaml": [*names("ladder"), "my.yaml", "runs/"],
    }
    assert {placeholder: values(placeholder) for placeholder in expected} == expected
    assert values("RUN_DIR", "runs/") == ["runs/one/"]
    assert ".hidden.yaml" in values("FILE", ".h")
    assert values("FILE", "nowhere/") == []


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_for_the_shell(shell: str, folder: Path, environment: dict[str, str]):
    """It is read without an error; bash calls the program through it."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = folder / "bin/steadygpt"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nfrom gpt.__main__ import main\nraise SystemExit(main())\n"
    )
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{environment['PATH']}"
    environment = {**environment, "PATH": path, "PYTHONPATH": str(ROOT)}
    script = {
        "bash": 'eval "$(steadygpt completion bash)"; COMP_LINE="steadygpt sam"; COMP_POINT=13; '
        '_python_argcomplete steadygpt; echo "${COMPREPLY[@]}"',
        "zsh": 'autoload -U compinit; compinit -u; eval "$(steadygpt completion zsh)"; echo sample',
        "fish": 'steadygpt completion fish | source; complete -C "steadygpt sam"',
    }[shell]
    done = subprocess.run(
        [shell, "-c", script], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert (done.stdout.split(), done.stderr) == (["sample"], "")
