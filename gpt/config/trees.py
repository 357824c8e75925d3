"""Nested mappings of options, and the dotted paths that name their leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Two ways to give one thing: a value on top replaces a value of the other way below.
ALTERNATIVES = {"batch_sequences": "batch_tokens", "batch_tokens": "batch_sequences"}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` on top, mapping by mapping.

    A mapping never replaces a value that is not a mapping, so `validate` still reports `model: 5`.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        elif isinstance(value, Mapping) and below is not None:
            pass
        elif value is not None or not isinstance(below, Mapping):  # `model:` alone changes nothing
            merged[key] = value
        if value is not None and ALTERNATIVES.get(key, key) not in over:
            merged.pop(ALTERNATIVES[key], None)
    return merged


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping that is not a mapping, as (dotted path, value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`: `{"model.layers": 4}` becomes `{"model": {"layers": 4}}`."""
    tree: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        section, dot, rest = key.partition(".")
        if dot:
            tree.setdefault(section, {})
            sections.setdefault(section, {})[rest] = value
        else:
            tree[section] = value
    return merge(tree, {section: nest(below) for section, below in sections.items()})
