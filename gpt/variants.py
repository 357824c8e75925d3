"""Tables of variants, such as `PLACEMENTS` of gpt.model.placement, read without importing modules.

Importing one would import torch, which takes 1.3 s: too long for `--help` and for a message about a
misspelled option. Unless the module is imported already, names and class attributes are therefore
read from its source.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def names(module: str, table: str) -> tuple[str, ...]:
    """The keys of a dict, or the elements of a set, in the order of the source."""
    found = None if _is_imported(module, table) else _names(module, table)
    return found or tuple(getattr(importlib.import_module(module), table))


def attribute(module: str, table: str, name: str, attribute: str) -> Any:
    """A class attribute of the class that a table has under `name`."""
    read = not _is_imported(module, table)
    node = _attribute(module, table, name, attribute) if read else None
    if node is not None:
        try:
            return ast.literal_eval(node)
        except ValueError:  # computed, so only its module knows it
            pass
    return getattr(getattr(importlib.import_module(module), table)[name], attribute)


def _is_imported(module: str, table: str) -> bool:
    """Whether a module has been imported, at least as far as the definition of the table."""
    return hasattr(sys.modules.get(module), table)


@functools.cache
def _names(module: str, table: str) -> tuple[str, ...] | None:
    """The keys or elements of a dict or set display; None if there is no such display."""
    node = _assigned(_statements(module), table)
    if isinstance(node, ast.Dict):
        return tuple(map(_text, node.keys))
    return tuple(map(_text, node.elts)) if isinstance(node, ast.Set) else None


@functools.cache
def _attribute(module: str, table: str, name: str, attribute: str) -> ast.expr | None:
    """The expression of a class attribute, of the class itself or its nearest base in `module`."""
    statements = _statements(module)
    classes = {node.name: node for node in statements if isinstance(node, ast.ClassDef)}
    entries = _assigned(statements, table)
    if not isinstance(entries, ast.Dict):
        return None
    node = dict(zip(map(_text, entries.keys), entries.values, strict=True)).get(name)
    while node is not None and _text(node) in classes:
        of_class = classes[_text(node)]
        if (found := _assigned(of_class.body, attribute)) is not None:
            return found
        node = next(iter(of_class.bases), None)
    return None


def _assigned(statements: Sequence[ast.stmt], name: str) -> ast.expr | None:
    """The expression that one of the statements assigns to `name`."""
    for node in statements:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        else:
            continue
        if _text(target) == name:
            return node.value
    return None


def _text(node: ast.expr | None) -> str:
    """A name or a string constant."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else ""


@functools.cache
def _statements(module: str) -> Sequence[ast.stmt]:
    """The top level of a module's source; empty if it has none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    return ast.parse(Path(spec.origin).read_text("utf-8")).body
