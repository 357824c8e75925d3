"""Put matplotlib's SVG into the HTML page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

from gpt.compare.figures.base import INK
from gpt.compare.report.rendering import anchor
from gpt.errors import printable

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def inline(svg: str, name: str, tips: dict[str, str]) -> Markup:
    """An SVG from matplotlib, as a part of the page.

    Ids get the figure's name as a prefix. The artists of an arm get a class, by which the page
    switches them off; those of a cell also a title to hover over and a link to the cell's row. Text
    and axes take the page's color.

    Args:
        name: of the figure.
        tips: the title of each cell, by its id.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(_rounded(svg))  # noqa: S314 - matplotlib wrote it just now
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    background = root.find(f".//{{{SVG}}}g[@id='patch_1']")
    if background is not None:
        background.clear()
    _mark(root, tips)
    _prefix_ids(root, name)
    width, height = (float(root.attrib.pop(key).removesuffix("pt")) for key in ("width", "height"))
    root.set("style", f"max-width:{width * 1.35:.0f}px;min-width:min({width * 0.9:.0f}px,34rem)")
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-alt")
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - escaped by it


def _mark(root: ElementTree.Element, tips: dict[str, str]) -> None:
    """Turn the ids of arms and cells into classes, titles and links."""
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
                element.set("data-cell", anchor(cell))
                title = ElementTree.Element(f"{{{SVG}}}title")
                title.text = printable(tips[cell])
                element.insert(0, title)
                link = ElementTree.Element(f"{{{SVG}}}a", {"href": f"#{anchor(cell)}"})
                link.append(element)
                parent[index] = link


def _prefix_ids(root: ElementTree.Element, name: str) -> None:
    """Make ids and references to them unique in the page; replace INK by the page's color."""
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        for key, value in element.attrib.items():
            if key.endswith("href") and value.startswith("#") and not value.startswith("#row-"):
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
            element.set(key, value)


def _rounded(svg: str) -> str:
    """The SVG with the coordinates of lines rounded to a tenth of a point."""
    tenth = lambda number: f"{float(number[0]):.1f}".removesuffix(".0")  # noqa: E731
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{2,}", tenth, path[0]), svg)
