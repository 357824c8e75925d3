"""The documents: their links lead somewhere, their commands are understood, their configs load."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from gpt import cli
from gpt.compare import grid as grids
from gpt.config import load
from gpt.errors import InputError

PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.name != "report.md" or path.parent.name == "quick"  # they are made alike
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [body for _, kind, body in FENCE.findall(text) if kind == language]


# -- Links -------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page: lower case, without marks, with hyphens."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str):
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", TEXTS[page]))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text("utf-8")), link


def test_anchors_are_those_of_github():
    text = (
        "# A `b_c` d\n\n```bash\n# not a heading\n```\n\n## It's [x](y.md), 1.5!\n\n## It's x, 15\n"
    )
    assert anchors(text) == {"a-b_c-d", "its-x-15", "its-x-15-1"}


# -- Commands ----------------------------------------------------------------------------------


class UnderstoodError(Exception):
    """The command line was parsed."""


OF_MODULES = {  # `python -m`
    "gpt.data": "prepare",
    "gpt.checkpoint": "checkpoint",
    "gpt.diagnostics": "diagnose",
}
FOLDERS = {  # of the files that a command is given by name
    **dict.fromkeys(("train", "prepare", "plan", "coordcheck"), "configs"),
    "compare": "configs/compare",
    "scaling": "configs/scaling",
}
OTHERS = {"cd", "curl", "echo", "eval", "export", "git", "head", "mkdir", "pip", "ray", "scancel"}
OTHERS |= {"source", "squeue", "tail", "tensorboard", "wandb", "trackio", "wget", "lm_eval", "mypy"}
OTHERS |= {
    "ruff",
    "mkdocs",
    "pytest",
    "py",
    "sbatch",
    "scontrol",
    "jupyter",
    "rsync",
    "for",
    "done",
}


def commands(text: str) -> Iterator[str]:
    """The simple commands in a page's bash blocks, without redirections."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip(), comments=True)
            command: list[str] = []
            for word in [*words, "&&"]:
                if word in ("&&", "|", ";", "||", "&"):
                    if command:
                        yield shlex.join(command)
                    command = []
                elif word in (">", "<", ">>", "2>"):
                    command.append(word)
                elif command and command[-1] in (">", "<", ">>", "2>"):
                    command.pop()
                else:
                    command.append(word)


def our_command(words: list[str]) -> tuple[str, list[str]] | None:
    """The name and the arguments of a command of steadygpt; None if it is of something else."""
    scripts = {script: name for name, script in cli.COMMANDS.items() if script.endswith(".py")}
    if words[0] == "torchrun":
        at = words.index("train.py")
        return "train", words[at + 1 :]
    if words[0] == "steadygpt":
        return (words[1], words[2:]) if words[1] in cli.COMMANDS else None
    if words[0] == "python" and words[1] in scripts:
        return scripts[words[1]], words[2:]
    if words[:2] == ["python", "-m"] and words[2] in OF_MODULES:
        return OF_MODULES[words[2]], words[3:]
    return None


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command's own parser read its arguments, and do nothing with them."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/").removeprefix("./")
    if "--help" in words or "--version" in words or words[0] in OTHERS:
        return
    found = our_command(words)
    if found is None:
        check_file(words)
        return
    name, arguments = found
    module = importlib.import_module(f"gpt.cli.{name}")
    given = next((word for word in arguments if not word.startswith("-")), "")
    if name in FOLDERS and re.fullmatch(r"[\w-]+", given):  # the name of a config
        shipped = ROOT / FOLDERS[name] / f"{given}.yaml"
        assert shipped.is_file() or given in ("my-config", "mine", "planned"), command
    parse = module.parse

    def only_parse(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise UnderstoodError

    monkeypatch.setattr(module, "parse", only_parse)
    with pytest.raises(UnderstoodError):
        module.main(arguments, name)


def check_file(words: list[str]) -> None:
    """Check a command of python, whose file or module exists and names all of the flags."""
    assert words[0] in ("python", "python3", "install"), words
    if words[0] == "install":
        assert set(",".join(words[1:]).split(",")) <= {"", "dev", "ray", "slurm", "docs"}
        return
    if words[1] == "-m":
        if not words[2].startswith("gpt"):
            assert words[2] in ("pytest", "venv"), words
            return
        source = ROOT / f"{words[2].replace('.', '/')}.py"
        assert source.is_file() or source.with_suffix("").joinpath("__main__.py").is_file(), words
        return
    path = ROOT / words[1]
    path = path / "__main__.py" if path.is_dir() else path
    source_text = path.read_text("utf-8")
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source_text, words


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(TEXTS[page], "bash")])
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for command in commands(TEXTS[page]):
        with monkeypatch.context() as patch:
            check(command, patch)


@pytest.mark.parametrize(
    "command",
    [
        "steadygpt train quickstart --model.widht 3",
        "steadygpt train quickstrat",
        "steadygpt compare norm",
        "python sample.py runs/x --temprature 0",
        "python benchmarks/padding.py --figure x.png",
        "python benchmarks/none.py",
        "steadgpt train quickstart",
        "torchrun --nproc-per-node 2 train.py quickstart --procesess 2",
    ],
)
def test_a_mistake_is_found(command: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises((AssertionError, InputError, FileNotFoundError)):
        check(command, monkeypatch)


# -- Configs and Python ------------------------------------------------------------------------


def test_the_grid_in_compare_loads(tmp_path: Path):
    (example,) = (each for each in blocks(TEXTS["docs/compare.md"], "yaml") if "arms:" in each)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/mine.yaml").write_text(example)
    shutil.copy(ROOT / "configs/pre-norm.yaml", tmp_path)
    grid, cells = grids.load(tmp_path / "compare/mine.yaml")
    assert len(grid.all_arms()) == 4
    assert len(cells) == (4 * 3 - 2) * 2 * 5


def test_configs_in_pages_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for page in ("docs/configuration.md", "docs/data.md"):
        for number, example in enumerate(blocks(TEXTS[page], "yaml")):
            path = tmp_path / f"{number}.yaml"
            path.write_text(example)
            load(path)


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(TEXTS[page], "python")])
def test_python_compiles(page: str):
    if page == "CONTRIBUTING.md":
        pytest.skip("test_contributing.py tries its code")
    for block in blocks(TEXTS[page], "python"):
        compile(textwrap.dedent(block), page, "exec")


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path):
    pytest.importorskip("material")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "site/results/quick/index.html").is_file()
