"""The tour: from each idea of an introductory course to the lines of code that are it.

    python docs/tour                   list the stops
    python docs/tour STOP              run a stop: print what its code prints, save its pictures
    python docs/tour STOP --check      fail if it prints something else than its page shows
    python docs/tour STOP --write      write what it prints into its page
    python docs/tour --quotes          copy the quoted code, and its line numbers, from the source
    python docs/tour --notebook        make tour.ipynb of all stops (pip install 'steadygpt[docs]')

Without STOP, `--check`, `--write` and `--quotes` take all stops. A stop is a page, STOP.md. These
fenced blocks have a meaning; all others are only shown:

    ```python quote="FILE" object="NAME"    lines of our code; near it, [FILE, NAME](URL#L1-L2)
    ```python                               code to run, in one namespace for the whole page
    ```text tolerance=0.05                  right after it: what it prints; numbers may differ by 5%

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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = re.MULTILINE | re.DOTALL
BLOCK = re.compile(  # code, perhaps followed by its output
    r"^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n```text(?: tolerance=(?P<tolerance>\S+))?\n(?P<text>.*?)^```$)?",
    FLAGS,
)
QUOTE = re.compile(r'^```python quote="(.+?)" object="(.+?)"\n(.*?)^```$', FLAGS)
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


def read(stop: str) -> str:
    """The page of a stop."""
    return (HERE / f"{stop}.md").read_text("utf-8")


def save(stop: str, page: str) -> None:
    """Replace the page of a stop."""
    (HERE / f"{stop}.md").write_text(page, "utf-8")


def stops() -> dict[str, str]:
    """The stops in the order of README.md, each with its idea."""
    rows = re.findall(r"^\| (.+?) \| \[.+?\]\(([\w-]+)\.md\) \|", read("README"), re.MULTILINE)
    return {stop: idea for idea, stop in rows}


# -- Running a stop ----------------------------------------------------------------------------


def run(stop: str) -> Iterator[tuple[re.Match[str], str]]:
    """Execute a page's blocks; yields each with what it printed."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        message = (
            f"error: this Python lacks {error.name}; after ./install: source .venv/bin/activate"
        )
        raise SystemExit(message) from None
    mpl.use("agg")
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(ROOT):
        exec(SETUP, namespace)  # noqa: S102 (this code and the pages are part of the repository)
        for block in BLOCK.finditer(read(stop)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block["code"], f"{stop}.md", "exec"), namespace)  # noqa: S102
            plt.close("all")  # as a notebook does
            yield block, printed.getvalue()


def show(stop: str) -> None:
    """Run a stop, and print what its code prints, under the headings of its page."""
    page, shown = read(stop), ""
    for block, printed in run(stop):
        heading = re.findall(r"^#+ (.*)", page[: block.start()], re.MULTILINE)[-1]
        if printed and heading != shown:
            print(f"-- {heading}\n")
            shown = heading
        print(printed, end="\n" if printed else "", flush=True)
    for picture in re.findall(r"\((figures/.*?)\)", page):
        print(f"saved docs/tour/{picture}")
    print(f"explained in docs/tour/{stop}.md")


def agree(block: re.Match[str], printed: str) -> bool:
    """Whether a block printed what its page shows, up to its numbers' relative tolerance."""
    shown = block["text"] or ""
    if not block["tolerance"]:
        return shown == printed
    words = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    numbers = ([float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (shown, printed))
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=float(block["tolerance"])) for a, b in zip(*numbers, strict=True)
    )


def check(stop: str) -> str:
    """The differences between what a stop prints and what its page shows; empty if none."""
    found = ""
    for block, printed in run(stop):
        if not agree(block, printed):
            shown = (block["text"] or "").splitlines(True)
            found += "".join(difflib.unified_diff(shown, printed.splitlines(True), stop, "printed"))
    return found


def with_outputs(stop: str) -> str:
    """A page with what its code prints."""
    outputs = iter([printed for _, printed in run(stop)])

    def replaced(block: re.Match[str]) -> str:
        code, printed = f"```python\n{block['code']}```", next(outputs)
        option = f" tolerance={block['tolerance']}" if block["tolerance"] else ""
        return f"{code}\n\n```text{option}\n{printed}```" if printed else code

    return BLOCK.sub(replaced, read(stop))


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
    size = len(quote) or len(lines)
    for start in range(len(lines) - size + 1):
        if not quote or _dedent(lines[start : start + size]) == "\n".join(quote):
            return start, start + size
    stripped = [line.strip() for line in lines]
    start = stripped.index(quote[0].strip())
    return start, stripped.index(quote[-1].strip(), start) + 1


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))


def with_quotes(page: str) -> str:
    """A page with the quoted code, and the line numbers in its links, as they are now."""
    changes = {}  # spans of the page, and their new texts
    for fence in QUOTE.finditer(page):
        file, name, quote = fence.groups()
        first, lines = find(file, name)
        try:
            start, end = excerpt(lines, quote.splitlines())
        except ValueError:
            raise SystemExit(f"error: {name} in {file} has changed:\n{quote}") from None
        label = f"[{file}, {name}]"
        links = list(re.finditer(rf"{re.escape(label)}\([^)]*\)", page))
        if not links:
            raise SystemExit(f"error: there is no link {label} to what is quoted")
        link = min(links, key=lambda link: abs(link.start() - fence.start()))
        changes[fence.span(3)] = f"{_dedent(lines[start:end])}\n"
        changes[link.span()] = f"{label}(../../{file}#L{first + start}-L{first + end - 1})"
    for (left, right), text in sorted(changes.items(), reverse=True):
        page = page[:left] + text + page[right:]
    return page


# -- The notebook ------------------------------------------------------------------------------


def cells() -> Iterator[tuple[str, str]]:
    """The cells of a notebook of all stops: the pages without outputs and pictures."""
    yield "markdown", "# The tour, stop by stop"
    yield "code", SETUP.strip()
    for stop in stops():
        page, at = re.sub(r"^!\[.*?\]\(figures/.*?\)\n", "", read(stop), flags=re.MULTILINE), 0
        for block in BLOCK.finditer(page):
            if prose := page[at : block.start()].strip():
                yield "markdown", prose
            yield "code", block["code"].strip()
            at = block.end()
        yield "markdown", page[at:].strip()


def write_notebook() -> None:
    """Execute the notebook and save it."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbformat import v4
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: --notebook needs {error.name}: ./install docs") from None

    make = {"markdown": v4.new_markdown_cell, "code": v4.new_code_cell}
    made = v4.new_notebook(
        cells=[make[kind](text, id=f"cell-{n}") for n, (kind, text) in enumerate(cells())],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(made, timeout=300, record_timing=False, resources=resources).execute()
    nbformat.write(made, HERE / "tour.ipynb")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python docs/tour", description=__doc__.split("\n")[0])
    parser.add_argument("stop", nargs="?", choices=list(stops()), metavar="STOP")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="compare what is printed with the page")
    modes.add_argument("--write", action="store_true", help="write what is printed into the page")
    modes.add_argument("--quotes", action="store_true", help="copy the quoted code again")
    modes.add_argument("--notebook", action="store_true", help="make tour.ipynb of all stops")
    flags = parser.parse_args(arguments)
    chosen = [flags.stop] if flags.stop else list(stops())
    if flags.notebook:
        write_notebook()
    elif flags.check:
        differences = "".join(map(check, chosen))
        print(differences, end="", file=sys.stderr)
        return int(bool(differences))
    elif flags.write or flags.quotes:
        for stop in chosen:
            save(stop, with_outputs(stop) if flags.write else with_quotes(read(stop)))
    elif flags.stop:
        show(flags.stop)
    else:
        for stop, idea in stops().items():
            print(f"{stop:22} {idea}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
