"""What all figures share: their data, the style of each arm, panels, legends and saving.

Colors are Okabe and Ito's, which color-blind readers can tell apart. A color stands for a level
of the first factor; dashes and point shapes stand for the levels of the others, or, if there is one
factor only, for its levels too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.results import Summary
from gpt.compare.grid import Grid
from gpt.compare.init_probes import InitProbe
from gpt.run.plot import COLORS, label, literal_text

DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SHAPES = "os^Dv"
SYMBOLS = dict(zip(SHAPES, "●■▲◆▼", strict=True))
INK = "#1f1f1f"  # text and axes; the report replaces it by its text color, light or dark
PALE = "#8a8a8a"
BETAS = ("attention's residual dependency β", "feed-forward's β")
STREAM = "RMS of the residual stream"
WIDTH = 4.9  # inches of a figure that a phone shows in full; also of legends
HEIGHT = 2.7  # inches of a figure of the first screen
MOST_TICKS = 12  # on a rate axis, with the name of each rate
Section = Literal["answer", "losses", "arms", "initialization", "training", "curves"]


@dataclass(frozen=True)
class Plot:
    """A figure with its text.

    Attributes:
        section: of report.html, which shows it.
        title: a heading.
        caption: the quantities shown, and how to read them.
        alt: a description for readers who cannot see it.
        cells: whose curves it shows.
    """

    section: Section
    title: str
    caption: str
    alt: str
    figure: Figure
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """How one arm is drawn, in all figures; `index` None: not an arm of this comparison."""

    index: int | None
    color: str
    dashes: Any
    shape: str

    @property
    def gid(self) -> str:
        """The id of the arm's artists."""
        return "" if self.index is None else f"arm-{self.index}"

    @property
    def line(self) -> dict[str, Any]:
        """Options of its lines."""
        return {"color": self.color, "linestyle": self.dashes}


@dataclass(frozen=True)
class PlotData:
    """What is plotted: a comparison and its results.

    Attributes:
        name: of the comparison's directory.
        beside: another comparison, to be shown next to this one.
    """

    grid: Grid
    summary: Summary
    outcomes: Sequence[Outcome]
    init_probes: Sequence[InitProbe] = ()
    name: str = ""
    beside: PlotData | None = None

    @property
    def settings(self) -> list[str]:
        """The grid's settings as text, in its order."""
        return list(dict.fromkeys(o.cell.setting_text for o in self.outcomes))

    @property
    def rates(self) -> list[float]:
        """All learning rates, from low to high."""
        return sorted({o.rate for o in self.outcomes})

    @property
    def styles(self) -> dict[str, Style]:
        """The style of each arm."""
        arms = self.grid.all_arms()
        first = list(dict.fromkeys(next(iter(arm.levels.values())) for arm in arms))
        others = list(dict.fromkeys(tuple(arm.levels.values())[1:] for arm in arms))
        styles = {}
        for index, arm in enumerate(arms):
            color = first.index(next(iter(arm.levels.values())))
            variant = others.index(tuple(arm.levels.values())[1:])
            variant += color if len(others) == 1 else color // len(COLORS)
            styles[arm.name] = Style(
                index,
                COLORS[color % len(COLORS)],
                DASHES[variant % len(DASHES)],
                SHAPES[variant % len(SHAPES)],
            )
        return styles

    def cell_line(self, outcome: Outcome) -> dict[str, Any]:
        """Options of a line that belongs to one cell."""
        style = self.styles[outcome.cell.arm]
        return {**style.line, "lw": 1.2, "gid": f"{style.gid} cell-{outcome.cell.id}"}


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw with the style of all figures."""
    options: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.facecolor": "none",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": PALE,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "steadygpt",
        "path.simplify_threshold": 0.3,
    }
    with literal_text(), mpl.rc_context(options):
        yield


def panels(count: int, *, width: float, height: float, most: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of one size (inches), at most `most` in a row."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def legend(figure: Figure, styles: dict[str, Style]) -> None:
    """Name all arms under the panels; the figure grows by the legend, of at most WIDTH."""
    names = [label(name, 56) for name in styles]
    handles = [
        Line2D([], [], **style.line, marker=style.shape, ms=4, label=name)
        for name, style in zip(names, styles.values(), strict=True)
    ]
    each = 0.55 + 0.075 * max(map(len, names))  # inches
    rows = math.ceil(len(handles) / max(1, min(4, int(WIDTH / each))))
    columns = math.ceil(len(handles) / rows)
    figure.set_figheight(figure.get_figheight() + 0.18 * rows)
    drawn = figure.legend(handles=handles, loc="outside lower left", ncols=columns)
    for handle, text, style in zip(
        drawn.legend_handles, drawn.get_texts(), styles.values(), strict=True
    ):
        text.set_gid(style.gid)
        if handle is not None:
            handle.set_gid(style.gid)


def numeric_axis(data: PlotData) -> tuple[str, dict[str, float]]:
    """The one option in which settings differ, if its values are positive numbers, and these.

    Returns:
        The option's name, and setting as text -> its value; empty if there is no such option.
    """
    settings = {o.cell.setting_text: o.cell.setting for o in data.outcomes}
    options = {tuple(setting) for setting in settings.values()}
    if len(settings) > 1 and all(len(keys) == 1 for keys in options) and len(options) == 1:
        ((option,),) = options
        values = {text: setting[option] for text, setting in settings.items()}
        if all(type(v) in (int, float) and v > 0 for v in values.values()):
            return option.rpartition(".")[2], values
    return "", {}


def rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """Make x a logarithmic axis of learning rates, with a tick at each rate tried if they fit."""
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    if len(rates) > MOST_TICKS:
        plain_numbers(axes.xaxis)
        return
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with a few plain numbers: 0.3, not 3 x 10^-1."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def by_block(axes_list: Sequence[Axes], titles: Sequence[str]) -> None:
    """Label panels of measures against the block: βs from 0, all others on a logarithmic axis."""
    for axes, title in zip(axes_list, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title in BETAS:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)


def save(name: str, plot: Plot, folder: Path) -> str:
    """Write NAME.png and NAME.svg, and return the SVG."""
    with plot_style():
        plot.figure.draw_without_rendering()
        plot.figure.set_layout_engine(None)  # laid out once for both, not at every draw
        plot.figure.savefig(folder / f"{name}.png", dpi=130, facecolor="white")
        path = folder / f"{name}.svg"
        plot.figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path.read_text("utf-8")
