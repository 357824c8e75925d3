"""The tour: from each idea of an introductory course to the lines of code that are it.

    python docs/tour                   list the stops
    python docs/tour STOP              run a stop: print what its code prints, save its pictures
    python docs/tour STOP --check      fail if it prints something else than its page shows
    python docs/tour STOP --write      write what it prints into its page
    python docs/tour --quotes          copy the quoted code, and its line numbers, from the source
    python docs/tour --notebook        make tour.ipynb of all stops (pip install 'steadygpt[docs]')

Without STOP, `--check` and `--write` run all stops. A stop is a page, STOP.md. Of its fenced
blocks, these have a meaning here; all others are only shown:

    ```python quote="FILE" object="NAME"    lines of our code; near it, [FILE, NAME](URL#L1-L2)
    ```python                               code to run, in one namespace for the whole page
    ```text tolerance=0.05                  right after it, what it prints; numbers may differ by 5%

Code draws with matplotlib.pyplot and saves to docs/tour/figures; a notebook shows open figures. A
quote that is empty is filled with the whole object; otherwise, its first and last line are kept.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import io
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FENCE = re.compile(r"^```(\w+)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
SETUP = """\
import os

import matplotlib.pyplot as plt
import torch

while not os.path.isdir("docs/tour"):  # pictures are saved there
    os.chdir("..")
plt.style.use("docs/tour/tour.mplstyle")
torch.set_num_threads(1)
"""


@dataclass
class Block:
    """Code of a page to run, and the text that follows it."""

    code: str
    code_span: tuple[int, int]  # of the whole fence, in the page
    expected: str
    text_span: tuple[int, int]  # of the text itself; empty, after the code, if there is none
    tolerance: float


def read(stop: str) -> str:
    """The page of a stop."""
    return (HERE / f"{stop}.md").read_text("utf-8")


def stops() -> dict[str, str]:
    """The stops in the order of README.md, each with its idea."""
    rows = re.findall(r"^\| (.+?) \| \[.+?\]\(([\w-]+)\.md\) \|", read("README"), re.MULTILINE)
    return {stop: idea for idea, stop in rows}


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that are run, in order."""
    fences = list(FENCE.finditer(page))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "python" or "quote=" in fence[2]:
            continue
        expected, span, tolerance = "", (fence.end(), fence.end()), 0.0
        if following and following[1] == "text" and not page[fence.end() : following.start()].strip():
            expected, span = following[3], following.span(3)
            tolerance = float((re.findall(r"tolerance=(\S+)", following[2]) or [0])[0])
        yield Block(fence[3], fence.span(), expected, span, tolerance)


# -- Running a stop ----------------------------------------------------------------------------


def run(stop: str) -> Iterator[tuple[Block, str]]:
    """Execute a page's blocks; yields each with what it printed."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(ROOT):
        exec(SETUP, namespace)  # noqa: S102 (the pages are part of this repository)
        for block in blocks(read(stop)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, f"{stop}.md", "exec"), namespace)  # noqa: S102
            plt.close("all")  # as a notebook does
            yield block, printed.getvalue()


def agree(expected: str, printed: str, tolerance: float) -> bool:
    """Whether two texts are equal, up to relative differences of their numbers, if allowed."""
    if not tolerance:
        return expected == printed
    first, second = ([float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (expected, printed))
    words = [NUMBER.sub("#", text).split() for text in (expected, printed)]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=tolerance) for a, b in zip(first, second, strict=True)
    )


def check(stop: str) -> str:
    """The differences between what a stop prints and what its page shows; empty if none."""
    found = ""
    for block, printed in run(stop):
        if not agree(block.expected, printed, block.tolerance):
            old, new = block.expected.splitlines(True), printed.splitlines(True)
            found += "".join(difflib.unified_diff(old, new, f"{stop}.md", "printed"))
    return found


def write(stop: str) -> None:
    """Put what a stop prints into its page."""
    page = read(stop)
    for block, printed in reversed(list(run(stop))):
        start, end = block.text_span
        if start == end == block.code_span[1] and printed:
            printed = f"\n\n```text\n{printed}```"
        page = page[:start] + printed + page[end:]
    (HERE / f"{stop}.md").write_text(page, "utf-8")


# -- Quoted code -------------------------------------------------------------------------------


def find(file: str, name: str) -> tuple[int, list[str]]:
    """The first line number of an object, by its dotted name, and its lines."""
    source = (ROOT / file).read_text("utf-8")
    node: Any = ast.parse(source)
    for part in name.split("."):
        node = next((n for n in node.body if part in _names(n)), None)
        if node is None:
            raise SystemExit(f"error: {file} has no {name}")
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    return first, source.splitlines()[first - 1 : node.end_lineno]


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)}


def excerpt(lines: list[str], quote: list[str]) -> tuple[int, int]:
    """Where in an object's lines a quote is: the same lines, or all from its first to its last."""
    if not quote:
        return 0, len(lines)
    for start in range(len(lines) - len(quote) + 1):
        if _dedent(lines[start : start + len(quote)]) == quote:
            return start, start + len(quote)
    stripped = [line.strip() for line in lines]
    start = stripped.index(quote[0].strip())
    return start, stripped.index(quote[-1].strip(), start) + 1


def _dedent(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).splitlines()


def with_quotes(page: str) -> str:
    """A page with the quoted code, and the line numbers in its links, as they are now."""
    for fence in reversed(list(FENCE.finditer(page))):
        options = dict(re.findall(r'(\w+)="(.*?)"', fence[2]))
        if "quote" not in options:
            continue
        file, name = options["quote"], options["object"]
        first, lines = find(file, name)
        try:
            start, end = excerpt(lines, fence[3].splitlines())
        except ValueError:
            raise SystemExit(f"error: {name} in {file} has changed; quote it again:\n{fence[3]}")
        link = re.compile(rf"\[{re.escape(file)}, {re.escape(name)}\]\([^)]*\)")
        links = list(link.finditer(page))
        if not links:
            raise SystemExit(f"error: there is no link [{file}, {name}](...) to what is quoted")
        nearest = min(links, key=lambda match: abs(match.start() - fence.start()))
        target = f"[{file}, {name}](../../{file}#L{first + start}-L{first + end - 1})"
        changes = {fence.span(3): "\n".join([*_dedent(lines[start:end]), ""]), nearest.span(): target}
        for (a, b), text in sorted(changes.items(), reverse=True):
            page = page[:a] + text + page[b:]
    return page


# -- The notebook ------------------------------------------------------------------------------


def notebook() -> Any:
    """All stops in one notebook, not yet executed: prose without outputs and pictures, code."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells = [new_markdown_cell("# The tour, stop by stop", id="title")]
    cells.append(new_code_cell(SETUP.strip(), id="setup"))
    for stop in stops():
        page, at = read(stop), 0
        for number, block in enumerate(blocks(page)):
            cells.append(new_markdown_cell(_prose(page[at : block.code_span[0]]), id=f"{stop}-{number}"))
            cells.append(new_code_cell(block.code.strip(), id=f"{stop}-code-{number}"))
            at = max(block.code_span[1], block.text_span[1] + len("```"))
        cells.append(new_markdown_cell(_prose(page[at:]), id=f"{stop}-end"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def _prose(text: str) -> str:
    return re.sub(r"^!\[.*?\]\(.*?\)\n", "", text, flags=re.MULTILINE).strip()


def write_notebook() -> None:
    """Execute the notebook and save it."""
    import nbformat
    from nbclient import NotebookClient

    made = notebook()
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(made, timeout=300, record_timing=False, resources=resources).execute()
    nbformat.write(made, HERE / "tour.ipynb")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python docs/tour", description=__doc__.split("\n")[0])
    parser.add_argument("stop", nargs="?", choices=list(stops()), metavar="STOP")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="compare what is printed with the page")
    modes.add_argument("--write", action="store_true", help="write what is printed into the page")
    modes.add_argument("--quotes", action="store_true", help="copy the quoted code again")
    modes.add_argument("--notebook", action="store_true", help="make tour.ipynb")
    flags = parser.parse_args(arguments)
    chosen = [flags.stop] if flags.stop else list(stops())
    if flags.notebook:
        write_notebook()
    elif flags.quotes:
        for stop in chosen:
            (HERE / f"{stop}.md").write_text(with_quotes(read(stop)), "utf-8")
    elif flags.write:
        for stop in chosen:
            write(stop)
    elif flags.check:
        differences = "".join(map(check, chosen))
        print(differences, end="", file=sys.stderr)
        return int(bool(differences))
    elif flags.stop:
        for _, printed in run(flags.stop):
            print(printed, end="", flush=True)
    else:
        for stop, idea in stops().items():
            print(f"{stop:22} {idea}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
