"""The shape of the package: what it exports, and which way its imports point."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

import gpt

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


def test_nothing_under_gpt_imports_a_door():
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
