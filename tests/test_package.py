"""The package: its exports, the direction of its imports, its distributions, its project files."""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NEEDS_A_RUN, ROOT

import gpt
from gpt import cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = sorted((ROOT / "gpt").rglob("*.py"))


def imports(path) -> set[str]:
    """Modules that a file imports from this project."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_exports_are_real():
    assert sorted(gpt.__all__) == sorted(gpt._HOMES)
    for name in gpt.__all__:
        assert getattr(gpt, name).__module__ == gpt._HOMES[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpt.nothing


def test_nothing_under_gpt_imports_a_command():
    for path in MODULES:
        assert not imports(path) & {"train", "sample", "compare"}, path


def test_imports_make_no_circle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = imports(path)
    graph.pop("gpt.__init__")
    reached = {name: {to for to in targets if to in graph} for name, targets in graph.items()}
    while reached:
        leaves = {name for name, targets in reached.items() if not targets}
        assert leaves, f"a circle among {sorted(reached)}"
        reached = {n: targets - leaves for n, targets in reached.items() if n not in leaves}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_no_pickle_and_no_code_from_files():
    forbidden = re.compile(
        r"\b(pickle|torch\.load|eval|exec|__import__)\(|yaml\.(unsafe_|full_)?load\("
    )
    for path in MODULES:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if forbidden.search(line) and "Loader=_Loader" not in line and ".eval()" not in line:
                pytest.fail(f"{path}:{number}: {line.strip()}")


# -- Distributions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from this tree."""
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_its_configs(wheel: zipfile.ZipFile):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = [*MODULES, ROOT / "gpt/py.typed", *ROOT.glob("gpt/**/templates/*")]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    configs = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.json")]
    expected |= {f"gpt/{path.relative_to(ROOT).as_posix()}" for path in configs}
    assert files == expected
    for path in configs:
        assert wheel.read(f"gpt/{path.relative_to(ROOT).as_posix()}") == path.read_bytes()


def test_what_the_wheel_holds_runs_in_an_empty_folder(wheel: zipfile.ZipFile, tmp_path: Path):
    installed, folder = tmp_path / "installed", tmp_path / "folder"
    wheel.extractall(installed)
    folder.mkdir()
    code = """if True:
        import sys
        from pathlib import Path
        from gpt import config
        from gpt.config import shipped
        from gpt.cli import main
        from gpt.compare import grid

        needs_a_run, installed = sys.argv.pop(), Path(sys.argv.pop())
        for name in shipped.names("config"):
            assert shipped.find(name, "config") == installed / f"gpt/configs/{name}.yaml"
            if name != needs_a_run:
                config.load(name)
        for name in shipped.names("grid"):
            grid.load(name)
        sys.argv[1:] = ["train", "post-norm", "--print-config"]
        sys.exit(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", code, installed, NEEDS_A_RUN],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert (config["name"], config["model"]["norm"]["placement"]) == ("post-norm", "post")
    assert list(folder.iterdir()) == []


def test_the_metadata_is_complete(metadata: Message):
    assert metadata["Name"] == "steadygpt"
    assert metadata["Version"] == gpt.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"] == "steadygpt contributors"
    assert metadata["Keywords"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_source_distribution_holds_tests_configs_and_docs(tmp_path: Path):
    from hatchling.builders.sdist import SdistBuilder

    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = (
        "install",
        "*.md",
        "*.py",
        "*.txt",
        "*.cff",
        ".ci/*",
        ".github/**/*.yml",
        ".pre-commit-*.yaml",
    )
    folders = ("benchmarks/*.py", "configs/**/*.yaml", "docs/**/*.md", "gpt/**/*.py", "tests/*.py")
    for pattern in (*top, *folders):
        files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert files, pattern
        assert files <= names, pattern


# -- Project files ---------------------------------------------------------------------------------


def test_the_version_has_one_place(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["steadygpt", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out == f"steadygpt {gpt.__version__}\n"
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", gpt.__version__)


def test_the_changelog_follows_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version), version
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert found == [kind for kind in kinds if kind in found], section.splitlines()[0]


def test_every_dependency_is_pinned():
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    plain = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    missing = {re.split(r"[^\w.-]", text)[0].lower() for text in wanted} - plain
    assert not missing


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text("utf-8"))


def test_the_workflow_runs_what_ci_runs():
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    commands = {step["run"] for step in steps if "run" in step}
    script = (ROOT / ".ci/run").read_text("utf-8")
    expected = re.findall(r"(?:^|&& )\.venv/bin/(.*?)(?= &&|$)", script, re.MULTILINE)
    for extras in re.findall(r"^\./install (\S+)", script, re.MULTILINE):
        expected.append(f"pip install -q -c constraints.txt -e '.[{extras}]'")
    assert "python -m pytest" in expected
    for command in expected:
        command = command.replace("pip install -q", "python -m pip install")
        assert command in commands, f"{command}: in .ci/run, and not in the workflow"


def test_the_workflow_covers_every_supported_python_and_system():
    matrix = workflow()["jobs"]["tests"]["strategy"]["matrix"]
    supported = [
        text.rpartition(" :: ")[2]
        for text in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", text)
    ]
    assert matrix["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]


def test_the_workflow_may_only_read_and_pins_its_actions():
    assert workflow()["permissions"] == {"contents": "read"}
    for job in workflow()["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_pre_commit_downloads_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    for name in re.findall(r"tests/\w+\.py", " ".join(hook["entry"] for hook in hooks)):
        assert (ROOT / name).is_file()
