"""docs/tour: pages quote the code as it is, and print and draw what they show."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest
import torch
import yaml
from conftest import ROOT

from gpt.config import load
from gpt.model.norm import layer_norm

TOUR = ROOT / "docs/tour"


def runner() -> ModuleType:
    """A copy of docs/tour/__main__.py of its own, which a test may change."""
    spec = importlib.util.spec_from_file_location("tour", TOUR / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STOPS = list(runner().stops())
PAGES = {path.stem: path.read_text("utf-8") for path in TOUR.glob("*.md") if path.stem != "README"}


@pytest.fixture
def tour(tmp_path: Path) -> Iterator[Any]:
    """The runner on a copy of the tour, so that pictures and pages here stay as they are."""
    module = runner()
    shutil.copytree(TOUR, tmp_path / "docs/tour", ignore=shutil.ignore_patterns("*.ipynb"))
    module.ROOT, module.HERE = tmp_path, tmp_path / "docs/tour"
    threads = torch.get_num_threads()
    with mpl.rc_context():
        yield module
    torch.set_num_threads(threads)


# -- Every page --------------------------------------------------------------------------------


def test_the_list_has_every_page():
    assert sorted(STOPS) == sorted(PAGES)
    assert len(set(STOPS)) == len(STOPS) > 5


@pytest.mark.parametrize("stop", STOPS)
def test_quotes_and_line_numbers_are_those_of_the_code(stop: str):
    assert runner().with_quotes(PAGES[stop]) == PAGES[stop]


@pytest.mark.parametrize("stop", STOPS)
def test_a_page_has_its_parts(stop: str):
    page = PAGES[stop]
    assert page.startswith("# ")
    assert re.search(r'^```python quote="gpt/', page, re.MULTILINE)
    assert any(block["text"] for block in runner().BLOCK.finditer(page))
    pictures = re.findall(r"^!\[(.+)\]\((.+)\)$", page, re.MULTILINE)
    assert pictures
    for description, picture in pictures:
        assert len(description) > 40
        assert (TOUR / picture).is_file()
        assert f"docs/tour/{picture}" in page or picture.startswith("../results/")
    remember = page.partition("## What to remember\n\n")[2]
    assert len(re.findall(r"^- ", remember, re.MULTILINE)) == 3
    assert re.search(r"^Sources?: .*\b(19|20)\d\d\b", remember, re.MULTILINE)


@pytest.mark.parametrize("stop", STOPS)
def test_its_config_is_valid(stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGES[stop], re.DOTALL | re.MULTILINE)
    load("quickstart", yaml.safe_load(text))


def test_every_picture_is_shown():
    shown = {name for page in PAGES.values() for name in re.findall(r"\(figures/(.+?)\)", page)}
    assert shown == {path.name for path in (TOUR / "figures").iterdir()}


# -- Quotes ------------------------------------------------------------------------------------

SOURCE = '''\
"""A module."""


class Adder:
    """Adds."""

    def forward(self, x):
        """x + 1."""
        one = 1
        return x + one


TABLE: dict[str, int] = {
    "a": 1,
}
'''
QUOTES = """\
See [m.py, Adder.forward](../../m.py#L9-L10) and [m.py, TABLE](../../m.py#L13-L15):

```python quote="m.py" object="Adder.forward"
one = 1
return x + one
```

```python quote="m.py" object="TABLE"
TABLE: dict[str, int] = {
    "a": 1,
}
```
"""


def test_quotes_follow_the_code(tour: Any):
    def quoted(source: str, page: str = QUOTES) -> str:
        (tour.ROOT / "m.py").write_text(source)
        return tour.with_quotes(page)  # type: ignore[no-any-return]

    assert quoted(SOURCE) == QUOTES
    moved = quoted(SOURCE.replace("class", "# above it\nclass"))
    assert moved == QUOTES.replace("L9-L10", "L10-L11").replace("L13-L15", "L14-L16")
    changed = quoted(
        SOURCE.replace('"a": 1', '"b": 2').replace("return", "one += 0\n        return")
    )
    assert "one = 1\none += 0\nreturn x + one\n" in changed
    assert '    "b": 2,\n' in changed
    assert "#L9-L11" in changed
    assert "#L14-L16" in changed
    far = quoted("\n" * 1000 + SOURCE)
    assert far == QUOTES.replace("L9-L10", "L1009-L1010").replace("L13-L15", "L1013-L1015")
    emptied = QUOTES.replace("one = 1\nreturn x + one\n", "")
    assert 'def forward(self, x):\n    """x + 1."""\n    one = 1\n' in quoted(SOURCE, emptied)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("one = 1", "one = 2", r"Adder.forward in m.py has changed"),
        ("def forward", "def backward", r"m.py has no Adder.forward"),
    ],
)
def test_a_quote_that_is_gone_is_an_error(tour: Any, old: str, new: str, message: str):
    (tour.ROOT / "m.py").write_text(SOURCE.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        tour.with_quotes(QUOTES)


def test_a_quote_needs_a_link(tour: Any):
    (tour.ROOT / "m.py").write_text(SOURCE)
    with pytest.raises(SystemExit, match=r"no link \[m.py, TABLE\]"):
        tour.with_quotes(QUOTES.replace("[m.py, TABLE]", "[it]"))


# -- Running a stop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "tolerance", "result"),
    [
        ("loss 2.00\n", "loss 2.00\n", 0.0, True),
        ("loss 2.00\n", "loss 2.01\n", 0.0, False),
        ("loss 2.00\n", "loss 2.01\n", 0.01, True),
        ("loss 2.00\n", "loss 2.03\n", 0.01, False),
        ("loss 2.00\n", "loss -2.00\n", 0.01, False),
        ("loss 2.00\n", "lost 2.00\n", 0.01, False),
        ("1,000 of  1e-3\n", "999 of 0.001\n", 0.01, True),  # widths may change too
        ("1 2\n", "1\n", 0.5, False),
        ("a 1e-3\n", "a nan\n", 0.5, False),
    ],
)
def test_texts_agree(tour: Any, first: str, second: str, tolerance: float, result: bool):
    option = f" tolerance={tolerance}" if tolerance else ""
    page = f"```python\nf()\n```\n\n```text{option}\n{first}```\n"
    assert tour.agree(tour.BLOCK.match(page), second) is result


def test_layer_norm_prints_what_its_page_shows(tour: Any):
    assert tour.check("layer-norm") == ""
    assert (tour.HERE / "figures/layer-norm.png").read_bytes()[:4] == b"\x89PNG"
    page = tour.HERE / "layer-norm.md"
    page.write_text(page.read_text("utf-8").replace("sigma  707.1", "sigma  790.6"), "utf-8")
    assert "-sigma  790.6\n+sigma  707.1\n" in tour.check("layer-norm")
    assert tour.main(["layer-norm", "--write"]) == 0
    assert page.read_text("utf-8") == PAGES["layer-norm"]


def test_output_is_written_below_its_block(tour: Any, capsys: pytest.CaptureFixture[str]):
    (tour.HERE / "README.md").write_text("| to add | [sum](sum.md) | m.py |\n")
    page = tour.HERE / "sum.md"
    code = "```python\na = 1 + 1\nprint(a)\n```\n"
    page.write_text(
        f"# Sum\n\n{code}\nText.\n\n```python\nb = a\n```\n\n```text\nold\n```\n\nEnd.\n"
    )
    assert tour.main(["sum", "--check"]) == 1
    assert "+2\n" in capsys.readouterr().err
    assert tour.main(["--write"]) == 0
    shown = f"# Sum\n\n{code}\n```text\n2\n```\n\nText.\n\n```python\nb = a\n```\n\nEnd.\n"
    assert page.read_text() == shown
    assert tour.main(["--check"]) == 0
    assert tour.main(["sum"]) == 0
    assert tour.main([]) == 0
    explained = "explained in docs/tour/sum.md\n"
    assert capsys.readouterr().out == f"-- Sum\n\n2\n\n{explained}sum                    to add\n"
    with pytest.raises(SystemExit, match="2"):
        tour.main(["product"])


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_prints_what_its_page_shows(stop: str, tour: Any, environment: dict[str, str]):
    command = [sys.executable, tour.HERE, stop, "--check"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


# -- Numbers that notes give -------------------------------------------------------------------


def test_numbers_in_notes():
    values = [0.8, -1.2, 0.5, 2.1, -0.3]
    assert statistics.fmean(values) == pytest.approx(0.38)
    assert statistics.pstdev(values) == pytest.approx(1.105, abs=5e-4)
    assert statistics.stdev(values) == pytest.approx(1.236, abs=5e-4)
    by_hand = [(v - 0.38) / statistics.pstdev(values) for v in values]
    ours = layer_norm(torch.tensor(values), 1.0, 0.0, 1e-5).tolist()
    assert ours == pytest.approx(by_hand, abs=2e-5)
    assert [round(v, 3) for v in ours] == [0.380, -1.430, 0.109, 1.556, -0.615]
    assert statistics.pvariance([(v - 0.38) / 1.18 for v in values]) == pytest.approx(
        0.877, abs=5e-4
    )
    assert statistics.pstdev([1000, 1500, 2000, 2500, 3000]) == pytest.approx(707.1, abs=0.05)


# -- The notebook ------------------------------------------------------------------------------


def test_the_notebook_is_that_of_the_pages():
    text = (TOUR / "tour.ipynb").read_text("utf-8")
    found = json.loads(text)["cells"]
    shown = [(cell["cell_type"], "".join(cell["source"])) for cell in found]
    assert shown == list(runner().cells())
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    assert pictures == len(list((TOUR / "figures").iterdir()))
    assert "/home" not in text
    assert len(text) < 3_000_000


def test_the_notebook_prints_what_the_pages_show():
    tour = runner()
    found = json.loads((TOUR / "tour.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in found if cell["cell_type"] == "code"][1:]
    blocks = [block for stop in STOPS for block in tour.BLOCK.finditer(PAGES[stop])]
    for cell, block in zip(code, blocks, strict=True):
        printed = [output for output in cell["outputs"] if output.get("name") == "stdout"]
        assert tour.agree(block, "".join("".join(output["text"]) for output in printed))
