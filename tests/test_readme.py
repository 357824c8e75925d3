"""The README is true: its commands run, its numbers are the measured ones, its files exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, few_probes

from gpt import cli
from gpt.compare import estimate
from gpt.model.placement import PLACEMENTS
from gpt.plan import report

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
START = BLOCKS[0].splitlines()
EVERYDAY = [
    *re.findall(r"^\| .* \| `(steadygpt .*)` \|$", README, re.MULTILINE),
    *(line for block in BLOCKS[1:] for line in block.splitlines()),
]


def section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    return text


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900  # as `wc -w` counts


def test_ci_and_contributors_run_its_test_command():
    train, test = START
    assert train == "./install && .venv/bin/steadygpt train quickstart"
    assert test == "./install dev && .venv/bin/python -m pytest"
    assert test in (ROOT / ".ci/run").read_text().splitlines()
    assert test in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()


# -- Commands --------------------------------------------------------------------------------------

SIZE = shlex.split("--data.tokenizer bytes --model.layers 1 --model.heads 1 --model.width 8")
CONTEXT = ["--model.context", "256"]  # as the command that fine-tunes says
LENGTH = shlex.split(
    "--training.batch-sequences 2 --evaluation.sequences 2 --sampling.tokens 2 "
    "--training.device cpu"
)
WARMUP = ["--schedule.warmup-steps", "1"]
STEPS = ["--training.steps", "2", *WARMUP]
SMALL: dict[str, list[str]] = {  # flags that make a command small, by how it begins
    "train quickstart --training.steps 1000": [*SIZE, *CONTEXT, *LENGTH, *WARMUP],
    "train quickstart": [*SIZE, *CONTEXT, *LENGTH, *STEPS],
    "train own-text": [*SIZE, *CONTEXT, *LENGTH, *STEPS],
    "train finetune": [*LENGTH, *STEPS],
    "compare": [*SIZE, *LENGTH, "--training.steps", "4", "--seeds", "1", "--model.context", "16"],
    "sample": ["--max-new-tokens", "3"],
}
WRITTEN = {  # what a command leaves behind, or prints
    "train quickstart --training.steps 1000": "runs/quickstart/result.json",
    "train quickstart --processes 2": "runs/shared/result.json",
    "train own-text": "runs/mine/result.json",
    "train finetune": "runs/finetune/result.json",
    "sample runs/quickstart": "class Stack:",
    "sample runs/mine": "Once upon a time",
    "eval": "bits per byte",
    "export": "exported/model.safetensors",
    "plan": "FLOPs",
    "plot": "curves.png",
    "compare": "SHA-256 of the contrasts",
}


def of(table: dict[str, Any], command: str) -> Any:
    """What the table has for the first of its keys with which the command begins."""
    return next((value for begins, value in table.items() if command.startswith(begins)), None)


def small(command: str, corpus: Path) -> list[str]:
    """The words of a command, with flags that make it small."""
    words = shlex.split(command, comments=True)
    flags = of(SMALL, command) or []
    if words[:2] in (["train", "quickstart"], ["compare", "quick"], ["compare", "norms"]):
        flags = [*flags, "--data.source", "text", "--data.path", str(corpus)]
    return [word.replace("1000", "4") for word in [*words, *flags]]


def prepare(folder: Path, corpus: Path) -> None:
    """What the commands read: texts of the user's, and GPT-2 in a folder of its name."""
    (folder / "README.md").write_text("A short text. " * 50)
    if (folder / "my-texts").is_dir():
        shutil.copytree(corpus, folder / "my-texts", dirs_exist_ok=True)
    if (folder / "exported").is_dir():
        shutil.copytree(folder / "exported", folder / "gpt2", dirs_exist_ok=True)


def test_the_commands_run_in_their_order(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for timed in (estimate, report):  # otherwise a second of updates each
        monkeypatch.setattr(timed, "TIMED_SECONDS", 0.01)
    assert len(EVERYDAY) == 14
    for line in (START[0].replace("./install && .venv/bin/", ""), *EVERYDAY):
        program, _, command = line.partition(" ")
        if program == "mkdir":
            Path(command.partition(" ")[0]).mkdir()
            continue
        prepare(tmp_path, corpus)
        name, *words = small(command.replace("--processes 2 ", ""), corpus)
        if name == "compare":  # it trains in the second tier
            words += ["--dry-run"]
        assert program == "steadygpt"
        capsys.readouterr()
        assert cli.run(name, words, f"steadygpt {name}") == 0, line
        out, left = capsys.readouterr().out, of(WRITTEN, command)
        assert left is None or Path(left).is_file() or left in out, line
        if command == "train quickstart":
            (ending,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
            labels = re.findall(r"^(finished:|  [a-z ]+?  )", ending, re.MULTILINE)
            assert len(labels) == 6
            assert [label for label in labels if f"\n{label}" not in f"\n{out}"] == []
    assert json.loads(Path("runs/quickstart/result.json").read_text())["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["quick", "norms"])
def test_the_comparisons_run(
    grid: str, corpus: Path, tmp_path: Path, in_this_process: None, no_pictures: None, monkeypatch
):
    assert f"steadygpt compare {grid}" in EVERYDAY
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    with few_probes():
        assert cli.run("compare", small(f"compare {grid}", corpus)[1:]) == 0
    summary = json.loads(Path(f"runs/{grid}/summary.json").read_text())
    assert summary["with_result"] == summary["planned"] > 0


@pytest.mark.slow
def test_several_processes_run(corpus: Path, tmp_path: Path, environment: dict[str, str]):
    (command,) = [line for line in EVERYDAY if "--processes" in line]
    words = small(command.partition(" ")[2], corpus)
    done = subprocess.run(
        [sys.executable, "-m", "gpt", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert (tmp_path / "runs/shared/result.json").is_file()


def test_every_command_is_named():
    named = set(re.findall(r"`(?:steadygpt )?(\w+)", section("Everyday commands")))
    named |= {command.split()[1] for command in EVERYDAY if command.startswith("steadygpt")}
    assert named >= set(cli.COMMANDS)


# -- The script that installs ----------------------------------------------------------------------

TOOLS = (
    "sh",
    "basename",
    "cp",
    "cut",
    "dirname",
    "du",
    "grep",
    "mkdir",
    "sed",
    "touch",
    "tr",
    "uname",
)
FAKE = """#!/bin/sh
# Stands for Python: prints its arguments, and makes the environment.
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
    *version_info*) exit $OLD ;;
    "-m venv .venv")
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        cp "$0" .venv/bin/steadygpt
        ;;
    "--version") echo Python 3.9.6 ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("install", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / "programs").mkdir()
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (tmp_path / "programs" / name).write_text(FAKE)
        (tmp_path / "programs" / name).chmod(0o755)
    for name in TOOLS:
        (tmp_path / "programs" / name).symlink_to(shutil.which(name) or "")
    return tmp_path


def install(clone: Path, *arguments: str, old: int = 0) -> tuple[int, str, str]:
    """Exit code, messages, and the calls of Python but those that ask for its version."""
    log = clone / "log"
    log.write_text("")
    here = {"PATH": str(clone / "programs"), "LOG": str(log), "OLD": str(old)}
    command = [clone / "install", *arguments]
    done = subprocess.run(command, env=here, cwd="/", capture_output=True, text=True)
    calls = [line for line in log.read_text().splitlines() if "version_info" not in line]
    assert done.stdout == "" or "-h" in arguments
    return done.returncode, done.stdout + done.stderr, "\n".join(calls)


def test_install_is_complete_and_then_does_nothing(clone: Path):
    code, messages, calls = install(clone)
    assert code == 0
    assert "into .venv, which takes minutes" in messages
    assert "MB; to use the command steadygpt: source .venv/bin/activate" in messages
    assert calls.startswith("python3 -m venv .venv\npython -m pip install -q")
    assert calls.endswith(" -c constraints.txt -e .")
    assert install(clone) == (0, "", "steadygpt --version")

    code, _, calls = install(clone, "dev,ray")
    assert code == 0
    assert calls.endswith(" -c constraints.txt -e .[dev,ray]")
    assert "venv" not in calls.replace(".venv", "")  # the environment is kept
    assert install(clone, "dev", "ray")[2] == install(clone)[2] == "steadygpt --version"

    os.utime(clone / "constraints.txt")
    assert "-e ." in install(clone)[2]


def test_install_needs_a_new_python(clone: Path):
    code, messages, calls = install(clone, old=1)
    assert (code, calls) == (2, "python3 --version")  # for the message
    assert messages == "install: Python 3.11 or later is needed; python3 is Python 3.9.6\n"
    assert not (clone / ".venv").exists()


def test_install_that_failed_begins_again(clone: Path):
    python = clone / "programs/python3"
    python.write_text(FAKE.replace('"--version"', "*'-e .'*) exit 1 ;; \"--version\""))
    assert install(clone)[0] == 1
    shutil.rmtree(clone / ".venv/bin")
    python.write_text(FAKE)
    assert "-m venv .venv" in install(clone)[2]


def test_install_explains_itself(clone: Path):
    code, usage, _ = install(clone, "-h")
    assert code == 0
    for line in ("./install dev", "does nothing until", "delete that folder"):
        assert line in usage


def test_install_on_windows_refers_to_the_readme(clone: Path):
    (clone / "programs/uname").unlink()
    (clone / "programs/uname").write_text("#!/bin/sh\necho MINGW64_NT-10.0")
    (clone / "programs/uname").chmod(0o755)
    message = "install: on Windows, use the line for PowerShell in README.md, or WSL\n"
    assert install(clone) == (2, message, "")
    assert "Windows (PowerShell): `py -m venv .venv; " in README


def test_install_refuses_unknown_extras(clone: Path):
    code, messages, calls = install(clone, "dev,devv")
    assert (code, calls) == (2, "")
    for name in ("devv: no such extra", " dev ", " tensorboard "):
        assert name in messages


# -- Numbers and files -----------------------------------------------------------------------------


def test_the_finding_is_the_committed_one():
    (path,) = ROOT.glob("docs/**/quick/summary.json")
    summary = json.loads(path.read_text())
    finding = README.partition("**The finding**")[2].partition("## ")[0].replace("\u2212", "-")
    difference, _, post, pre = summary["contrasts"]
    for contrast in (difference, post, pre):
        value, low, high = contrast["value"], *contrast["interval"].values()
        numbers = rf"\b{value:.3f}\b[^.]*\({'(95% interval: )?'}{low:.3f} to {high:.3f}[;)]"
        assert len(re.findall(numbers, finding)) == 1, numbers
    assert f"p = {difference['p']:.4f}" in finding
    assert f"({summary['planned']} runs with Xavier initialization; " in finding
    (arm,) = [arm for arm in summary["arms"] if arm["arm"] == "post, no warm-up"]
    usual = [at for at in arm["by_rate"] if at["rate"] in (0.003, 0.004)]
    stuck, runs = (sum(at[key] for at in usual) for key in ("stuck", "n"))
    assert f"{stuck} of its {runs} runs learn frequencies only" in finding


def test_the_evening_is_as_long_as_it_says():
    text = section("Read the code")
    files = re.findall(r"\[([\w./]+\.py)\]\(\1\) \((\d+)\)", text)
    assert len(files) == 11
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name, _ in files}
    assert {name: int(length) for name, length in files} == lengths
    assert f"{sum(lengths.values()):,} lines" in text
    evening = (ROOT / "docs/architecture.md").read_text("utf-8").partition("together")[0]
    assert [name for name, _ in files] == re.findall(r"^\| \[([\w./]+\.py)\]", evening, re.M)


def test_its_own_column_beside_others():
    rows = dict(re.findall(r"^\| ([\w ,]+) \| ([^|]+) \|", section("Beside others"), re.MULTILINE))
    assert int(rows["placements of the norm, by an option"]) == len(PLACEMENTS)
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in ROOT.glob("gpt/**/*.py"))
    assert int(rows["lines of Python"].replace(",", "")) == pytest.approx(lines, rel=0.05)
    peers = (ROOT / "docs/peers.md").read_text("utf-8")
    assert [row.lower() for row in rows if row.strip("- ")] == [
        heading.lower() for heading in re.findall(r"^## (.*)$", peers, re.MULTILINE)[2:]
    ]


def test_files_that_it_names_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
