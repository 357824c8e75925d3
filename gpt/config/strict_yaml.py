"""YAML files of options, read strictly: duplicate keys, aliases and Python objects are errors.

A file may come from an untrusted source, so its size, nesting and numbers are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gpt.errors import InputError
from gpt.io.files import read_small, reading
from gpt.io.text import decode

MAX_BYTES = 2**17  # of a YAML file, which PyYAML reads in two seconds at worst
MAX_DIGITS = 100  # of a number


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and aliases (a few lines of them can fill memory).

    As in YAML 1.2, `1:30` and dates are text, and `<<` is an ordinary key. `010` is text that
    a numeric option reads as 10; more than `MAX_DIGITS` digits are text that it rejects.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not supported; a file may build on another with base:",
                problem_mark=mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > MAX_DIGITS:
            raise ValueError("a number has too many digits")
        return int(text.replace("_", ""), 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [
        kind for kind in kinds if kind[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool")
    ]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0|[1-9][0-9_]{0,99}|0x[0-9a-fA-F_]{1,99}|0b[01_]{1,99})$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, origin: str) -> object:
    """The value of a YAML text; messages begin with `origin`.

    Raises:
        InputError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise InputError(f"{origin}: nested too deeply") from None
    except (
        *(yaml.YAMLError, ValueError, TypeError),
        *(ArithmeticError, LookupError, AttributeError),
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or f"is not valid YAML: {error}".splitlines()[0]
        raise InputError(f"{origin}:{line} {problem}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: it cannot be read, is not valid YAML, or does not hold a mapping.
    """
    with reading(path):
        tree = parse_yaml(decode(read_small(path, MAX_BYTES), str(path)), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{path}: must be a mapping of options, such as `model: {{layers: 4}}`")
    return tree
