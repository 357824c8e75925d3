"""report.html, one file that opens offline and reads like a short paper, and report.md beside it.

The page is a Jinja template; whatever comes from configs or files is escaped by it. Pictures stand
in it as SVG, in the page's own colours, light or dark. A few lines of script let a reader hover
over a run, follow it to its row, and switch arms off; without them only that is missing.
"""

from __future__ import annotations

import html
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gpt.compare import figures
from gpt.compare.figures import INK, Material, draw, save, threshold_text
from gpt.compare.grid import Grid
from gpt.compare.outcomes import Outcome
from gpt.compare.starts import Start
from gpt.compare.statistics import wilson
from gpt.compare.summary import (
    ArmSummary,
    Summary,
    ends_text,
    failures_text,
    place_text,
    rates_text,
)
from gpt.errors import printable
from gpt.io.files import read_json, read_small, write_text

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
TEMPLATES = Path(__file__).parent / "templates"
Comparison = tuple[Grid, Summary, list[Outcome]]


def write_report(
    directory: Path,
    grid: Grid,
    summary: Summary,
    outcomes: Sequence[Outcome],
    starts: Sequence[Start],
    commands: Sequence[Command],
    beside: tuple[Path, Comparison] | None = None,
) -> None:
    """Write report.html, report.md and figures/ into a comparison directory.

    Args:
        starts: probes of the networks; empty if there are none.
        commands: the command lines that ran it.
        beside: the directory of another comparison and what it holds, to be set next to this one.
    """
    material = Material(grid, summary, outcomes, starts)
    pictures = draw(material)
    other = None
    if beside is not None:
        path, (other_grid, other_summary, other_outcomes) = beside
        other = Material(other_grid, other_summary, other_outcomes, [])
        pictures.insert(1, figures.beside(material, other, (directory.name, path.name)))
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    drawings = {picture.name: save(picture, folder) for picture in pictures}
    tips = {outcome.cell.id: cell_tip(outcome) for outcome in outcomes}
    context: dict[str, Any] = {
        "grid": grid,
        "summary": summary,
        "outcomes": outcomes,
        "pictures": pictures,
        "styles": material.styles,
        "svg": {name: inline(svg, name, tips) for name, svg in drawings.items()},
        "command": [f"{each.began}  {shlex.join(each.argv)}" for each in commands],
        "environment": _environment(outcomes),
        "cells": [_row(outcome) for outcome in outcomes],
        "curve_of": {cell: picture.name for picture in pictures for cell in picture.cells},
        "script": Markup((TEMPLATES / "report.js").read_text("utf-8")),  # noqa: S704 - our own
        "grid_yaml": read_small(directory / "grid.yaml").decode(),
        "limits": limits(grid, summary),
        "beside": other,
        "names": (directory.name, beside[0].name if beside else ""),
        "ends": lambda interval: ends_text(interval, "{:+.3f}".format),
        "losses": lambda interval: ends_text(interval, "{:.3f}".format),
        "rates_text": rates_text,
        "vocabulary": math.log(next(o.vocabulary for o in outcomes if o.verdict is not None)),
        "side_by_side": _side_by_side(summary, other.summary) if other else {},
        "failures_text": failures_text,
        "threshold_text": threshold_text,
    }
    for name in ("report.html", "report.md"):
        write_text(directory / name, _templates(name).render(**context))


def _templates(name: str) -> Any:
    """A template; every expression in it is escaped, for HTML by Jinja and for Markdown here."""
    templates = Environment(
        loader=PackageLoader("gpt.compare"),
        autoescape=name.endswith(".html"),
        finalize=_html if name.endswith(".html") else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["rate"] = lambda value: f"{value:g}"
    templates.filters["anchor"] = _anchor
    templates.filters["short"] = lambda value: "" if value is None else f"{value:.3g}"
    templates.filters["code"] = lambda value: Markup(printable(value))  # noqa: S704 - in a code block
    return templates.get_template(f"{name}.jinja")


def _html(value: Any) -> Any:
    """Text without control characters, which Jinja escapes afterwards."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value, "\n\t") if is_text else value


def _markdown(value: Any) -> Any:
    """Text in one line whose signs mean nothing in Markdown or in the HTML within it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = html.escape(printable(re.sub(r"\s+", " ", value)), quote=False)
    text = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^(\s*)([-+=#]|\d+(?=[.)](?:\s|$)))(?=[-+=#\s.)]|$)", _marker, text)


def _marker(begin: re.Match[str]) -> str:
    """What would begin a list or heading, escaped; a number's sign is before its stop."""
    return f"{begin[1]}{begin[2]}\\" if begin[2].isdecimal() else f"{begin[1]}\\{begin[2]}"


# ---------------------------------------------------------------------------------------------
# Pictures in the page


def inline(svg: str, name: str, tips: dict[str, str]) -> Markup:
    """An SVG of matplotlib's as a part of the page.

    Ids become the picture's own. What belongs to an arm gets a class to be switched by; a cell also
    a title to hover over and a link to its row. Text and axes take the page's colour.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(_shorter(svg))  # noqa: S314 - matplotlib wrote it just now
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    background = root.find(f".//{{{SVG}}}g[@id='patch_1']")
    if background is not None:
        background.clear()
    for parent in list(root.iter()):
        for index, element in enumerate(list(parent)):
            words = element.get("id", "").split()
            marks = [word for word in words if re.match(r"arm-\d+$|cell-", word)]
            if not marks:
                continue
            del element.attrib["id"]
            element.set("class", " ".join(w if w.startswith("arm-") else "cell" for w in marks))
            cell = next((w.removeprefix("cell-") for w in marks if w.startswith("cell-")), None)
            if cell is not None:
                element.set("data-cell", _anchor(cell))
                title = ElementTree.Element(f"{{{SVG}}}title")
                title.text = printable(tips[cell])
                element.insert(0, title)
                link = ElementTree.Element(f"{{{SVG}}}a", {"href": f"#{_anchor(cell)}"})
                link.append(element)
                parent[index] = link
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        for key, value in element.attrib.items():
            if key.endswith("href") and value.startswith("#") and not value.startswith("#row-"):
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
            element.set(key, value)
    width, height = (float(root.attrib.pop(key).removesuffix("pt")) for key in ("width", "height"))
    root.set("style", f"max-width:{width * 1.35:.0f}px;min-width:min({width:.0f}px,34rem)")
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-alt")
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - escaped by it


def _side_by_side(
    mine: Summary, theirs: Summary
) -> dict[str, tuple[ArmSummary | None, ArmSummary | None]]:
    """The arms of two comparisons by name and place; None where one has no such arm."""
    one, two = ({(arm.arm, arm.place): arm for arm in each.arms} for each in (mine, theirs))
    return {
        f"{arm}{f' ({place})' if place else ''}": (one.get((arm, place)), two.get((arm, place)))
        for arm, place in {**one, **two}
    }


def _shorter(svg: str) -> str:
    """Lines drawn to a tenth of a point are fine enough."""
    tenth = lambda number: f"{float(number[0]):.1f}".removesuffix(".0")  # noqa: E731
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{2,}", tenth, path[0]), svg)


def _anchor(cell: str) -> str:
    """The id of a cell's row; ids of cells hold letters, digits, dots and dashes."""
    return f"row-{cell}"


def cell_tip(outcome: Outcome) -> str:
    """A cell in one line."""
    found = outcome.verdict
    where = ", ".join(
        [outcome.cell.arm, *([place_text(outcome.cell.place)] if outcome.cell.place else [])]
    )
    head = f"{where}, rate {outcome.rate:g}, seed {outcome.seed}: {outcome.status}"
    return head if found is None else f"{head}. {found.reason}"


def _row(outcome: Outcome) -> dict[str, Any]:
    """What the table of all cells says of one."""
    found = outcome.verdict
    row: dict[str, Any] = {
        "id": outcome.cell.id,
        "arm": outcome.cell.arm,
        "place": place_text(outcome.cell.place),
        "rate": outcome.rate,
        "seed": outcome.seed,
        "status": outcome.status,
        "failed": found is None or found.failed,
        "reason": (outcome.lost.reason if outcome.lost else "not run")
        if found is None
        else found.reason,
        "loss": None,
    }
    if found is not None:
        row |= {
            "loss": found.final_val_loss,
            "best": found.best_val_loss,
            "step": found.step,
            "layer": found.layer,
            "spikes": found.loss_spikes,
            "grad_spikes": found.grad_spikes,
            "grad_norm": found.max_grad_norm,
            "clipped": found.clipped,
            "seconds": outcome.seconds,
        }
    return row


# ---------------------------------------------------------------------------------------------
# Words


def limits(grid: Grid, summary: Summary) -> list[str]:
    """What these runs can not show."""
    seeds = len(grid.seeds)
    assert isinstance(grid.base, dict)
    found = [
        f"No failure in {seeds} seed{'s' if seeds > 1 else ''} only bounds the failure rate under "
        f"{wilson(0, seeds).high:.0%}; the smallest p-value of a paired test of so many is "
        f"{min(1.0, 2 * 0.5**seeds):.2g}."
        + (" A bootstrap over so few is too narrow." if seeds < 10 else ""),
        "Short runs measure the onset of instability, not the quality of a finished model; and a "
        "run that is only slow, by its rate or its optimizer, counts as plateaued too.",
        "Sensitivity and thresholds belong to the rates tried; on another grid they are others.",
        "The best rate of an arm is picked on the very seeds that its loss is shown for.",
        "What holds for this corpus, this size and this precision may not hold for others.",
    ]
    for place in dict.fromkeys(arm.place for arm in summary.arms):
        sums = [arm.summed_rate for arm in summary.arms if arm.place == place]
        if max(sums) > 1.001 * min(sums):
            found.append(
                "Schedules differ in the sum of their rates too: over all updates "
                f"{min(sums):,.0f} to {max(sums):,.0f} times the full rate; warm-up lowers it."
            )
            break
    if any(arm.clipped is not None for arm in summary.arms):
        found.append(
            "Gradients are clipped in some arms, which hides instability; see the share clipped."
        )
    return found


@dataclass(frozen=True)
class Command:
    """A command line, and when it began."""

    argv: list[str]
    began: str


def read_commands(directory: Path) -> list[Command]:
    """The command lines that ran a comparison.

    Raises:
        InputError: command.json is damaged.
    """
    path = directory / "command.json"
    if not path.is_file():
        return []
    return read_json(path, list[Command], "delete it to go on")


def _environment(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What all cells were run with; what differs between them is listed side by side."""
    seen: dict[str, list[str]] = {}
    for outcome in outcomes:
        facts = dict(outcome.environment or {})
        facts |= facts.pop("versions", {})
        for key in ("argv", "initial_weights", "unigram_entropy"):
            facts.pop(key, None)
        for key, value in facts.items():
            if str(value) not in seen.setdefault(key, []):
                seen[key].append(str(value))
    return {key: "; ".join(values) for key, values in seen.items()}
