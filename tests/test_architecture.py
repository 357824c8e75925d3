"""docs/architecture.md is true: what imports what, and how long the evening's reading is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
MODULES = sorted((ROOT / "gpt").rglob("*.py"))
EVENING = 2_000  # lines


def layers() -> dict[str, int]:
    """The row of each package or module in the table of imports."""
    table = PAGE.partition("## What may import what")[2]
    rows = re.findall(r"^\| ([\w, ]+) \| (?!holds)", table, re.M)
    return {name: row for row, names in enumerate(rows) for name in names.split(", ")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> Iterator[str]:
    """The modules of gpt that a module imports when it is imported itself."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpt":
            for name in node.names:
                yield f"gpt.{name.name}" if node.module == "gpt" else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("gpt."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upwards_in_the_table(path: Path):
    order = layers()
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in ("", "__init__", "__main__"):  # of gpt itself, whose imports wait until they are used
        return
    assert own in order, f"{own} is missing from the table"
    below = ["cli"] if path.name == "__main__.py" else []  # which runs a command
    for module in imported(path):
        other = room(module)
        if other not in (own, "__version__", *below):
            assert order[other] < order[own], f"{own} imports {module}"


def test_config_reads_by_name_what_the_page_says():
    options = (ROOT / "gpt/config/options.py").read_text("utf-8")
    (named,) = re.findall(r"It looks up the tables of ([\w, ]+) by\sname", PAGE)
    read = set(re.findall(r'"gpt\.(?:model\.)?(\w+)', options))
    assert read == set(re.findall(r"\w+", named)) - {"and"}


def test_every_row_is_a_module_or_package():
    for name in layers():
        assert (ROOT / "gpt" / name).is_dir() or (ROOT / f"gpt/{name}.py").is_file(), name


def test_the_evening_is_as_long_as_it_says():
    rows = re.findall(r"^\| \[?([\w./]+\.py)\]?(?:\([^)]*\))? \| (\d+) \|", PAGE, re.M)
    assert len(rows) > 5
    total = 0
    for name, lines in rows:
        count = len((ROOT / name).read_text("utf-8").splitlines())
        assert int(lines) == count, f"{name} has {count} lines"
        total += count
    written = re.search(r"\*\*together\*\* \| \*\*([\d,]+)\*\*", PAGE)
    assert written is not None
    assert int(written[1].replace(",", "")) == total
    assert total <= EVENING
