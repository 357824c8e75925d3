"""The documents: their links lead somewhere, their commands are understood, their configs load."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from gpt import cli
from gpt.compare import grid as grids
from gpt.config import load
from gpt.config.shipped import find
from gpt.errors import InputError
from gpt.scaling import ladder as ladders

PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.name != "report.md" or path.parent.name == "quick"  # they are made alike
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [textwrap.dedent(body) for _, kind, body in FENCE.findall(text) if kind == language]


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


def broken_links(page: Path, text: str) -> list[str]:
    """The links and images of a page that lead to no file or heading of the repository."""
    broken = []
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    for link in re.findall(r"\]\(<?([^)\s>]+)", prose):
        if re.match(r"https?:|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        linked = text if path == page else ""
        if not linked and anchor and path.suffix == ".md" and path.is_file():
            linked = path.read_text("utf-8")
        if not path.exists() or (linked and anchor and anchor not in anchors(linked)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str):
    assert broken_links(ROOT / page, TEXTS[page]) == []


def test_anchors_are_those_of_github():
    text = (
        "# A `b_c` d\n\n```bash\n# not a heading\n```\n\n## It's [x](y.md), 1.5!\n\n## It's x, 15\n"
    )
    assert anchors(text) == {"a-b_c-d", "its-x-15", "its-x-15-1"}


@pytest.mark.parametrize("link", ["none.md", "../gpt/none.py", "data.md#none", "#none", "none.png"])
def test_a_broken_link_is_found(link: str):
    text = f"# One\n\n[a](data.md#tokenizers), [b](#one), ![c](figures/curves.png), [d]({link})\n"
    assert broken_links(ROOT / "docs/index.md", text) == [link]


# -- Commands ----------------------------------------------------------------------------------


class UnderstoodError(Exception):
    """The command line was read."""


OF_MODULES = {  # `python -m`
    "gpt.data": "prepare",
    "gpt.checkpoint": "checkpoint",
    "gpt.diagnostics": "diagnose",
}
SHIPPED = {"config": "quickstart", "grid": "quick", "ladder": "tiny"}  # in place of a user's own
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OTHERS = {"echo", "lm_eval", "mkdir", "mkdocs", "mypy", "pre-commit", "ruff", "source"}
OTHERS |= {"tensorboard", "steadygpt --help", "steadygpt --version"}
REDIRECTIONS = (">", "<", ">>", "2>")


def commands(text: str) -> Iterator[str]:
    """The simple commands of a page, without redirections: in bash blocks, and within a line.

    Within a line, those that only name a program or have a placeholder, such as `RUN_DIR`, are
    left out.
    """
    prose = FENCE.sub("", text).replace("\n", " ")
    inline = re.findall(r"`((?:steadygpt|python|pip|\./install) [^`]+)`", prose)
    partial = re.compile(r"\S+( -m)? \S+$|.*\b[A-Z_]+\b(?!=)")
    whole = [command for command in inline if not partial.match(command)]
    for block in [*blocks(text, "bash"), *whole]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip(), comments=True)
            command: list[str] = []
            for word in [*words, "&&"]:
                if word in ("&&", "|", ";", "||", "&"):
                    if command:
                        yield shlex.join(command)
                    command = []
                elif command and command[-1] in REDIRECTIONS:
                    command.pop()
                else:
                    command.append(word)


def our_command(words: list[str]) -> tuple[str, list[str]] | None:
    """The name and the arguments of a command of steadygpt; None if it is of something else."""
    scripts = {script: name for name, script in cli.COMMANDS.items() if script.endswith(".py")}
    if words[0] == "torchrun" and "train.py" in words:
        return "train", words[words.index("train.py") + 1 :]
    if words[0] == "steadygpt" and words[1] in cli.COMMANDS:
        return words[1], words[2:]
    if words[0] == "python" and words[1] in scripts:
        return scripts[words[1]], words[2:]
    if words[:2] == ["python", "-m"] and words[2] in OF_MODULES:
        return OF_MODULES[words[2]], words[3:]
    return None


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command's own parser read its arguments, and load its config; do nothing with them.

    Raises:
        AssertionError, InputError, OSError: there is no such program, file, flag or value.
    """
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/").removeprefix("./")
    found = our_command(words)
    if found is None:
        if words[0] not in OTHERS and " ".join(words[:2]) not in OTHERS:
            check_program(words)
        return
    name, argv = found
    if "--help" in argv or "--help-all" in argv:
        return
    module = importlib.import_module(f"gpt.cli.{name}")
    parse = module.parse

    def read(*args: Any, **keywords: Any) -> None:
        arguments, options = parse(*args, **keywords)
        check_options(arguments, options)
        raise UnderstoodError

    monkeypatch.setattr(module, "parse", read)
    with pytest.raises(UnderstoodError):
        module.main(argv, name)


def check_options(arguments: Any, options: dict[str, Any]) -> None:
    """Load the config, grid or ladder that a command names, with its options."""
    for kind, shipped in SHIPPED.items():
        given = getattr(arguments, kind, None)
        if given is None or given.startswith("runs/"):
            continue
        path = find(Path(shipped if re.fullmatch(r"[\w-]+\.yaml", given) else given), kind)
        if kind == "config":
            if path.stem == "finetune":  # whose own is a run
                options.setdefault("init_from", "gpt2")
            load(path, options)
        elif kind == "grid":
            grids.load(path, options, arguments.seeds)
        else:
            ladders.load(path, options, arguments.seeds)


def check_program(words: list[str]) -> None:
    """Check a command whose program is not ours: its file, flags or extras exist."""
    program, *rest = words
    if program in ("install", "pip"):
        named = rest if program == "install" else re.findall(r"\[(.*?)\]", " ".join(rest))
        assert set(",".join(named).split(",")) - {""} <= set(EXTRAS), words
        return
    assert program == "python", words
    if rest[0] == "-m":
        source = ROOT / rest[1].replace(".", "/")
        if rest[1] == "pytest":
            for pattern in (word for word in rest if word.startswith("tests/")):
                assert list(ROOT.glob(pattern)), words
        else:
            assert source.with_suffix(".py").is_file() or (source / "__main__.py").is_file(), words
        return
    path = ROOT / rest[0]
    text = (path / "__main__.py" if path.is_dir() else path).read_text("utf-8")
    for word in rest[1:]:
        assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in text, words


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for command in commands(TEXTS[page]):
        with monkeypatch.context() as patch:
            check(command.replace("layer_scale", "rezero"), patch)  # which CONTRIBUTING.md adds


@pytest.mark.parametrize(
    "command",
    [
        "steadygpt train quickstart --model.widht 3",
        "steadygpt train quickstart --optimizer.name adma",
        "steadygpt train quickstrat",
        "steadygpt train configs/quickstrat.yaml",
        "steadygpt trian quickstart",
        "steadygpt compare norm",
        "steadygpt compare norms --seeds -1",
        "steadygpt scaling tinny",
        "steadygpt export runs/x",
        "python sample.py runs/x --temprature 0",
        "python -m gpt.datum quickstart",
        "python -m pytest tests/test_none.py",
        "python benchmarks/padding.py --figure x.png",
        "python benchmarks/none.py",
        "steadgpt train quickstart",
        "torchrun --nproc-per-node 2 train.py quickstart --procesess 2",
        "./install dve",
        "pip install -e '.[rya]'",
    ],
)
def test_a_mistake_in_a_command_is_found(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    (simple,) = commands(f"```bash\n{command}\n```\n")
    with pytest.raises((AssertionError, InputError, FileNotFoundError)):
        check(simple, monkeypatch)


def test_commands_of_a_page():
    text = (
        "Type `steadygpt runs` or `python benchmarks/cost.py --figure\nx.png`, not `steadygpt eval "
        "RUN_DIR`.\n```bash\nA=1 ./install dev && steadygpt plan \\\n  quickstart > x # both\n```\n"
    )
    found = ["A=1 ./install dev", "steadygpt plan quickstart"]
    assert list(commands(text)) == [*found, "python benchmarks/cost.py --figure x.png"]


# -- Configs, Python and paths -----------------------------------------------------------------


SEARCHED = """
base: pre-norm
arms:
  placement: {pre: {model.norm.placement: pre}, post: {model.norm.placement: post}}
  warm-up: {warm-up: {schedule.warmup: linear}}
seeds: 2
"""


def check_yaml(text: str, folder: Path) -> None:
    """Load a block of YAML as what its keys say that it is: a grid, a part of one, or a config.

    Args:
        folder: in which its `base` is at `../pre-norm.yaml`.
    """
    keys = set(yaml.safe_load(text))
    path = folder / "example.yaml"
    if "task" in keys:
        return  # lm_eval's
    if keys == {"search"}:
        text += SEARCHED
    path.write_text(text)
    if keys & {"arms", "search"}:
        grids.load(path)
    elif "init_from" in keys:
        load(path, {"init_from": "gpt2"})  # in place of the user's run
    else:
        load(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for grids, below a copy of the config that they build on."""
    shutil.copy(ROOT / "configs/pre-norm.yaml", tmp_path)
    (tmp_path / "compare").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "compare"


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(TEXTS[page], "yaml")])
def test_yaml_loads(page: str, folder: Path):
    for block in blocks(TEXTS[page], "yaml"):
        check_yaml(block, folder)


@pytest.mark.parametrize(
    "text", ["model: {widht: 3}", "data: {source: txt}", "arms: {a: {b: {model.bais: true}}}"]
)
def test_a_mistake_in_yaml_is_found(text: str, folder: Path):
    with pytest.raises(InputError):
        check_yaml(text, folder)


def test_the_grid_in_compare_has_its_cells(folder: Path):
    (example,) = (each for each in blocks(TEXTS["docs/compare.md"], "yaml") if "arms:" in each)
    (folder / "mine.yaml").write_text(example)
    grid, cells = grids.load(folder / "mine.yaml")
    assert len(grid.all_arms()) == 4
    assert len(cells) == (4 * 3 - 2) * 2 * 5


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(TEXTS[page], "python")])
def test_python_parses(page: str):
    if page == "CONTRIBUTING.md":
        pytest.skip("test_contributing.py tries its code")
    quotes = re.compile(r"^```python quote=.*?^```$", re.DOTALL | re.MULTILINE)  # in test_tour.py
    for block in blocks(quotes.sub("", TEXTS[page]), "python"):
        ast.parse(block)


OF_OTHERS = ("CHANGELOG.md", "docs/peers.md")  # which name files of the past, and of other projects


@pytest.mark.parametrize("page", [page for page in TEXTS if page not in OF_OTHERS])
def test_paths_in_the_text_exist(page: str):
    """Alone or in a command; `docs/results/NAME` is not a path but a placeholder."""
    path = re.compile(r"(?:^| )((?:benchmarks|configs|docs|gpt|tests)/[a-z][a-z\d_./-]*)(?= |$)")
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXTS[page]))
    named = [name for span in spans for name in path.findall(span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


# -- The site ----------------------------------------------------------------------------------


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build a site; not with --quiet, with which --strict lets warnings pass."""
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/results/quick/index.html").is_file()
    texts = [path.read_text("utf-8") for path in tmp_path.glob("site/**/*.html")]
    assert not any("```" in text for text in texts)  # a block of code that mkdocs overlooked


@pytest.mark.slow
@pytest.mark.parametrize(
    "link", ["[a](none.md)", "[a](#none)", "![a](none.png)", "[a](../none.py)", "[a](../code.py)"]
)
def test_a_site_with_a_broken_link_is_refused(link: str, tmp_path: Path):
    """A link to code outside docs/ becomes text, if the code exists."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/hooks.py", tmp_path / "docs")
    (tmp_path / "docs/index.md").write_text(f"# One\n\n[a](#one), {link}\n")
    (tmp_path / "code.py").write_text("")
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nnav: [index.md]\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == int("code" not in link), done.stderr
