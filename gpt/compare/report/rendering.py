"""Render the report's templates, with all text from configs and files escaped."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gpt.errors import printable

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, context: dict[str, Any], package: str = "gpt.compare.report") -> str:
    """The text of report.html or report.md.

    Every expression in a template is escaped: for HTML by Jinja, for Markdown here.

    Args:
        package: with the folder `templates`.
    """
    templates = Environment(
        loader=PackageLoader(package),
        autoescape=name.endswith(".html"),
        finalize=_html if name.endswith(".html") else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["rate"] = lambda value: f"{value:g}"
    templates.filters["anchor"] = anchor
    templates.filters["short"] = lambda value: "" if value is None else f"{value:.3g}"
    templates.filters["code"] = lambda value: Markup(printable(value))  # noqa: S704 - in a code block
    return templates.get_template(f"{name}.jinja").render(**context)


def anchor(cell: str) -> str:
    """The HTML id of a cell's row; cells' ids hold letters, digits and any of `.`, `-` and `_`."""
    return f"row-{cell}"


def _html(value: Any) -> Any:
    """Text without control characters, which Jinja escapes afterwards."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value, "\n\t") if is_text else value


def _markdown(value: Any) -> Any:
    """Text in one line, with every character escaped that means something in Markdown or HTML."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = html.escape(printable(re.sub(r"\s+", " ", value)), quote=False)
    text = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^(\s*)([-+=#]|\d+(?=[.)](?:\s|$)))(?=[-+=#\s.)]|$)", _list_marker, text)


def _list_marker(found: re.Match[str]) -> str:
    """The start of a list or heading, escaped; for a number, at its period or parenthesis."""
    return f"{found[1]}{found[2]}\\" if found[2].isdecimal() else f"{found[1]}\\{found[2]}"
