"""The report opened in a browser, as its reader does, and with hostile text in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import few_probes, rendering
from test_headline import write_case

from gpt.compare import comparison
from gpt.compare.figures import PLOTS, draw
from gpt.compare.figures.base import PlotData, save
from gpt.compare.grid import load
from gpt.compare.init_probes import measure_init_probes, read_init_probes, write_init_probes
from gpt.compare.report.rendering import _markdown
from gpt.compare.report.svg import inline

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine"
)
ABSENT = {"beside", "by-seed", "searched"}  # another comparison, values per seed, searches
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module", autouse=True)
def _rendered() -> Iterator[None]:
    with rendering():
        yield


@pytest.fixture(scope="module")
def directory(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two placements with and without warm-up, in two depths, trained here."""
    from gpt.training import train

    base = tiny(
        diagnostics={"every": 10},
        sampling={"tokens": 0},
        training={"steps": 20, "batch_sequences": 8},
    )
    tree = base.model_dump(mode="json")
    grid = {
        "title": "</title><script>document.title = 'owned'</script>",
        "base": {key: value for key, value in tree.items() if key not in ("name", "seed")},
        "arms": {
            "placement": {
                "pre": {"model.norm.placement": "pre"},
                "<b>post</b>": {"model.norm.placement": "post"},
            },
            "warm-up": {
                "cold": {"schedule.warmup": "none"},
                "warm & slow": {"schedule.warmup": "linear"},
            },
        },
        "grid": {"model.layers": [1, 2], "optimizer.learning_rate": [0.03, 3e4]},
        "seeds": 1,
        "contrasts": [
            {
                "question": "<img src=x onerror=alert(1)> Does it?",
                "measure": "log_lr50",
                "of": ["pre, cold", "pre, warm & slow"],
                "against": ["<b>post</b>, cold", "<b>post</b>, warm & slow"],
            }
        ],
        "pairs": [["pre, cold", "<b>post</b>, cold"]],
    }
    folder = tmp_path_factory.mktemp("report")
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    command = {"argv": ["compare.py", "<b>*grid*</b>"], "began": "2026-01-01"}
    (folder / "command.json").write_text(json.dumps([command]))
    resolved, cells = load(path)
    path.write_text(resolved.to_yaml())
    for cell in cells[:-1]:
        train(cell.config, folder / "cells" / cell.id, quiet=True)
    with few_probes():
        write_init_probes(folder, measure_init_probes(cells[:1]) or [])
    comparison.report(resolved, cells, folder)
    return folder


@pytest.fixture(scope="module")
def html(directory: Path) -> str:
    return (directory / "report.html").read_text("utf-8")


def test_it_references_nothing_outside_itself(html: str):
    attributes = re.findall(r"""(?:href|src|srcset|action)=["']([^"']*)["']""", html)
    assert attributes
    assert [a for a in attributes if not a.startswith(("#", "data:,"))] == []
    assert not re.search(r"@import|url\((?!#)", html)


def test_names_from_the_grid_are_text(html: str):
    assert "<script>document.title" not in html
    assert "<b>post</b>" not in html
    assert "<img" not in html
    assert "&lt;b&gt;post&lt;/b&gt;" in html


def test_every_cell_has_a_row_and_every_row_a_curve(directory: Path, html: str):
    _, cells = load(directory / "grid.yaml")
    for cell in cells[:-1]:
        row = re.search(rf'<tr id="row-{re.escape(cell.id)}".*?</tr>', html, re.DOTALL)
        assert row
        target = re.search(r'<a href="#(curves-\d+)"', row[0])
        assert target
        figure = re.search(rf'<figure id="{target[1]}">.*?</figure>', html, re.DOTALL)
        assert figure
        assert f'data-cell="row-{cell.id}"' in figure[0]
    assert "1 of 16 cells have no result" in html


def test_ids_are_unique_and_links_have_targets(html: str):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_every_plot_has_an_alternative_text(html: str):
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) >= len(PLOTS) - len(ABSENT)
    for figure in figures:
        label = re.search(r'aria-labelledby="([^"]+)"', figure)
        assert label
        assert re.search(rf'id="{label[1]}">[^<]{{20,}}', figure)


def test_all_plots_are_drawn_and_have_files(directory: Path):
    grid, summary, outcomes = comparison.read_comparison(directory)
    init_probes = read_init_probes(directory, [arm.name for arm in grid.all_arms()])
    names = list(draw(PlotData(grid, summary, outcomes, init_probes)))
    assert names[: len(PLOTS) - len(ABSENT)] == [name for name in PLOTS if name not in ABSENT]
    assert len([name for name in names if name.startswith("curves")]) == 4
    for name in names:
        assert (directory / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(directory / f"figures/{name}.svg")


@pytest.mark.slow
def test_saved_plots_are_laid_out(directory: Path, tmp_path: Path):
    for name, plot in draw(PlotData(*comparison.read_comparison(directory), [])).items():
        save(name, plot, tmp_path)
        box, (width, height) = plot.figure.get_tightbbox(), plot.figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.01, name
        assert box.x1 < width + 0.01, name
        assert box.y1 < height + 0.01, name


def test_markdown_links_to_its_figures_and_breaks_no_table(directory: Path):
    text = (directory / "report.md").read_text("utf-8")
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (directory / name).is_file()
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {10, 7, 6, 5, 4}
    assert re.search(r"H₁ is \d+\.\d+\.", text)


def test_command_lines_in_markdown_are_code_not_part_of_a_list(directory: Path):
    blocks = (directory / "report.md").read_text("utf-8").split("\n\n")
    code = next(number for number, block in enumerate(blocks) if block.startswith("    "))
    assert blocks[code - 1] == "Run with:"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("1. a", "1\\. a"), ("2)", "2\\)"), ("- a", "\\- a"), ("2.577", "2.577"), ("-0.05", "-0.05")],
)
def test_only_list_markers_are_escaped_as_such(text: str, escaped: str):
    assert _markdown(text) == escaped


def test_text_of_a_figure_takes_the_pages_color(directory: Path):
    svg = (directory / "figures/loss-by-rate.svg").read_text("utf-8")
    assert "#1f1f1f" in svg
    _, cells = load(directory / "grid.yaml")
    shown = inline(svg, "x", {cell.id: "a tip" for cell in cells})
    assert "#1f1f1f" not in shown
    assert "currentColor" in shown


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, directory: Path) -> Iterator[Any]:
    """The report in a window; any console message or outside request fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None
        ),
    )
    page.goto((directory / "report.html").as_uri())
    yield page
    assert wrong == []
    context.close()


@pytest.mark.slow
@needs_browser
def test_it_opens_and_draws(page: Any):
    assert page.title() == "</title><script>document.title = 'owned'</script>"
    page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    for svg in page.query_selector_all("figure svg"):
        box = svg.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    assert page.locator("figure svg path").count() > 100


@pytest.mark.slow
@needs_browser
def test_hovering_shows_a_cells_values(page: Any):
    drawn = page.locator("#loss-by-rate [data-cell]").first
    drawn.scroll_into_view_if_needed()
    drawn.hover(force=True)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert re.search(r"rate .*, seed \d: \w+", tip.text_content())


@pytest.mark.slow
@needs_browser
def test_arms_can_be_switched_off_and_on(page: Any):
    box = page.locator(".arms input").first
    lines = page.locator("svg .arm-0")
    rows = page.locator("tr.arm-0")
    assert lines.first.is_visible()
    assert rows.first.is_visible()
    box.uncheck()
    assert all(not line.is_visible() for line in lines.all())
    assert all(not row.is_visible() for row in rows.all())
    assert page.locator("svg .arm-1").first.is_visible()
    box.check()
    assert lines.first.is_visible()


@pytest.mark.slow
@needs_browser
def test_a_row_links_to_its_curve_which_is_highlighted(page: Any):
    link = page.locator("[data-show]").first
    row = page.locator(f'[id="{link.get_attribute("data-show")}"]')
    page.get_by_role("link", name="All runs", exact=True).last.click()
    link.click()
    target = page.url.rpartition("#")[2]
    assert target.startswith("curves-")
    width = "line => getComputedStyle(line).strokeWidth"
    lines = page.locator(f"#{target} .chosen > path")
    assert lines.count() >= 2
    assert lines.first.is_visible()
    assert {line.evaluate(width) for line in lines.all()} == {"3px"}
    others = page.locator(f"#{target} .cell:not(.chosen) > path")
    assert "3px" not in {line.evaluate(width) for line in others.all()}
    color = "getComputedStyle(document.querySelector('tr.chosen')).backgroundColor"
    assert row.get_attribute("class").endswith("chosen")
    assert page.evaluate(color) == "rgb(255, 243, 196)"
    page.locator("[data-show]").last.click()
    assert page.locator("tr.chosen").count() == 1


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_a_phone_and_a_screen(page: Any, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Any, scheme: str):
    page.emulate_media(color_scheme=scheme)

    def light(color: str) -> float:
        r, g, b = map(int, re.findall(r"\d+", color)[:3])
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    paper = light(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    ink = light(page.evaluate("getComputedStyle(document.querySelector('p')).color"))
    label = light(page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"))
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 120
    assert abs(paper - label) > 120


@pytest.mark.slow
@needs_browser
def test_it_can_be_printed(page: Any, tmp_path: Path):
    page.emulate_media(media="print")
    assert not page.locator(".arms").is_visible()
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert page.locator("details").count() > 3
    assert page.locator("details:not([open])").count() == 0


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("case", ["YES", "NO", "NOT SETTLED", "own rates", "several settings"])
def test_the_first_screen_shows_the_answer(browser: Any, tmp_path: Path, case: str):
    write_case(case, tmp_path)
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    parts = [".answer .badge >> nth=0", ".answer strong >> nth=0", ".answer .outcomes"]
    for part in (*parts, "#by-seed svg", "#loss-by-rate svg"):
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= 800, part
        assert box["x"] + box["width"] <= 1200, part
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for text in page.locator(".answer svg text").all():
        box = text.bounding_box()
        assert box["x"] >= 0, text.text_content()
        assert box["x"] + box["width"] <= 390, text.text_content()
    assert page.locator(".answer svg text", has_text="post, cold").count() >= 2
    page.close()
