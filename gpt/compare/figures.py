"""The pictures of a comparison, all by matplotlib, so that PNG, SVG and the report show the same.

A figure's artists carry ids that mean something: `arm-3` belongs to the fourth arm, `cell-ID` to a
cell. report.py turns them into what can be hovered over, followed, and switched off.

Colours are Okabe and Ito's, told apart by the colour-blind; a colour stands for a level of the
first factor, a line's dashes and a point's shape for a level of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from gpt import metrics
from gpt.compare.grid import Grid
from gpt.compare.outcomes import Outcome
from gpt.compare.probes import Probe
from gpt.compare.starts import Start
from gpt.compare.statistics import loglog_slope
from gpt.compare.summary import ArmSummary, Summary, place_text
from gpt.compare.verdicts import spikes
from gpt.run.plot import label, literal_text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SHAPES = "os^Dv"
INK = "#1f1f1f"  # text and axes; the report makes it the colour of its text, light or dark
PALE = "#8a8a8a"
CURVE_POINTS = 150
EARLY_STEPS = 200


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Attributes:
        name: of its files.
        title: a heading.
        caption: what is drawn, and how to read it.
        alt: what is seen, for those who do not.
        cells: whose curves it shows.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """How one arm is drawn, everywhere."""

    index: int | None
    colour: str
    dashes: Any
    shape: str

    @property
    def gid(self) -> str:
        """What marks its artists; nothing of an arm that another comparison alone has."""
        return "" if self.index is None else f"arm-{self.index}"


@dataclass(frozen=True)
class Material:
    """What pictures are drawn from."""

    grid: Grid
    summary: Summary
    outcomes: Sequence[Outcome]
    starts: Sequence[Start]

    @property
    def places(self) -> list[str]:
        """The grid's places, in its order."""
        return list(dict.fromkeys(place_text(o.cell.place) for o in self.outcomes))

    @property
    def styles(self) -> dict[str, Style]:
        """Each arm's."""
        arms = self.grid.all_arms()
        first = list(dict.fromkeys(next(iter(arm.levels.values())) for arm in arms))
        others = list(dict.fromkeys(tuple(arm.levels.values())[1:] for arm in arms))
        styles = {}
        for index, arm in enumerate(arms):
            colour = first.index(next(iter(arm.levels.values())))
            variant = others.index(tuple(arm.levels.values())[1:]) + colour // len(COLOURS)
            styles[arm.name] = Style(
                index,
                COLOURS[colour % len(COLOURS)],
                DASHES[variant % len(DASHES)],
                SHAPES[variant % len(SHAPES)],
            )
        return styles


def draw(material: Material) -> list[Picture]:
    """All pictures that the material has something for, in the order of the report."""
    with _look():
        found = [drawing(material) for drawing in DRAWINGS.values()]
        return [picture for picture in found if picture is not None] + list(_curves(material))


@contextmanager
def _look() -> Iterator[None]:
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


# ---------------------------------------------------------------------------------------------
# Losses and failures


def signature(material: Material) -> Picture:
    """Final loss against learning rate, a line an arm, a panel a place."""
    places = material.places
    figure, panels = _panels(len(places), width=7.2 if len(places) == 1 else 4.2, height=4.0)
    for axes, place in zip(panels, places, strict=True):
        draw_losses(axes, material, place, material.styles)
        axes.set_title(place)
    panels[0].set_ylabel("final validation loss (nats per token)")
    _legend(figure, material.styles)
    return Picture(
        "loss-by-rate",
        "Final loss against learning rate",
        "Each point is a run, a cross a failed one; lines join the medians over seeds. A run that "
        "failed counts as at most its loss at the start. The dashed line is H₁, the loss of "
        "guessing by token frequency.",
        _losses_in_words(material),
        figure,
    )


def beside(material: Material, other: Material, names: tuple[str, str]) -> Picture:
    """The signature picture of two comparisons next to each other; arms of one name look alike."""
    names = (label(names[0], 40), label(names[1], 40))
    strangers = {name: style for name, style in other.styles.items() if name not in material.styles}
    others = {name: replace(style, index=None) for name, style in strangers.items()}
    styles = {**others, **material.styles}
    pairs = [
        (m, place, name)
        for m, name in zip((material, other), names, strict=True)
        for place in m.places
    ]
    with _look():
        figure, panels = _panels(len(pairs), width=4.2, height=4.0)
        for axes, (shown, place, name) in zip(panels, pairs, strict=True):
            draw_losses(axes, shown, place, styles, mark=shown is material)
            axes.set_title(f"{name}{f': {place}' if place else ''}")
        low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
        for axes in panels:
            axes.set_ylim(min(low), max(high))
        panels[0].set_ylabel("final validation loss (nats per token)")
        _legend(figure, styles)
    return Picture(
        "beside",
        f"{names[0]} and {names[1]}",
        "Final loss against learning rate in two comparisons, on one scale of losses. Arms of one "
        "name look alike.",
        f"{names[0]}: {_losses_in_words(material)}. {names[1]}: {_losses_in_words(other)}",
        figure,
    )


def draw_losses(
    axes: Axes, material: Material, place: str, styles: dict[str, Style], *, mark: bool = True
) -> None:
    """The signature picture's panel; `mark` its cells, where they have a row in the report."""
    for arm in material.summary.arms:
        if arm.place != place:
            continue
        style = styles[arm.arm]
        axes.plot(
            [at.rate for at in arm.by_rate],
            [at.median_loss for at in arm.by_rate],
            color=style.colour,
            linestyle=style.dashes,
            lw=1.6,
            gid=style.gid,
        )
    for outcome in material.outcomes:
        if outcome.verdict is None or place_text(outcome.cell.place) != place:
            continue
        style = styles[outcome.cell.arm]
        failed = outcome.verdict.failed
        axes.plot(
            [outcome.rate],
            [outcome.loss],
            marker="x" if failed else style.shape,
            ms=5.5 if failed else 4.5,
            mew=1.4 if failed else 0,
            color=style.colour,
            linestyle="none",
            gid=f"{style.gid} cell-{outcome.cell.id}" if mark else style.gid,
        )
    axes.axhline(material.summary.unigram_entropy, color=PALE, lw=1, linestyle="--")
    axes.annotate(
        "H₁",
        (1, material.summary.unigram_entropy),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=PALE,
    )
    _rate_axis(axes, sorted({o.rate for o in material.outcomes}))


def failures(material: Material) -> Picture:
    """Share of failed seeds: arm against rate, or for each arm place against rate."""
    arms, places = list(material.styles), material.places
    rates = sorted({o.rate for o in material.outcomes})
    shares = {
        (a.arm, a.place, at.rate): (at.failures, at.n)
        for a in material.summary.arms
        for at in a.by_rate
    }
    if len(places) == 1:
        groups = {"": [(arm, (arm, places[0])) for arm in arms]}
    else:
        groups = {arm: [(place, (arm, place)) for place in places] for arm in arms}
    rows = len(next(iter(groups.values())))
    width = (1.8 if len(groups) == 1 else 1.2) + 0.52 * len(rates)
    for_titles = 0.7 + 0.085 * max(map(len, groups))  # a layout makes no room for their width
    figure, panels = _panels(len(groups), width=max(width, for_titles), height=0.9 + 0.34 * rows)
    for axes, (title, lines) in zip(panels, groups.items(), strict=True):
        values = np.full((rows, len(rates)), np.nan)
        for row, (_, key) in enumerate(lines):
            for column, rate in enumerate(rates):
                failed, n = shares.get((*key, rate), (0, 0))
                if n:
                    values[row, column] = failed / n
                    axes.text(
                        column,
                        row,
                        f"{failed}/{n}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if failed > n / 2 else "black",
                    )
        axes.pcolormesh(
            np.arange(len(rates) + 1) - 0.5,
            np.arange(rows + 1) - 0.5,
            values,
            cmap="cividis_r",
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=1,
        )
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_title(title)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=45)
        axes.set_yticks(range(rows), [name for name, _ in lines])
        axes.set_xlabel("learning rate")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return Picture(
        "failures",
        "Which runs failed",
        "Failed seeds of all seeds. Failed is a loss that is no longer finite, that ends no more "
        "than 0.05 nats under H₁, or that ends well above its own minimum.",
        "; ".join(
            f"{a.arm}{f' ({a.place})' if a.place else ''}: {a.failures} of {a.runs} runs failed"
            for a in material.summary.arms
        ),
        figure,
    )


# ---------------------------------------------------------------------------------------------
# Thresholds and sensitivity


def thresholds(material: Material) -> Picture:
    """LR50 with its interval and the highest stable rate: against depth, or an arm a line."""
    depths = _depths(material)
    arms = material.summary.arms
    figure, (axes,) = _panels(1, width=7.2, height=4.0 if depths else 1.2 + 0.32 * len(arms))
    names = list(material.styles)
    rates = sorted({o.rate for o in material.outcomes})
    for arm in arms:
        style = material.styles[arm.arm]
        shift = 1 + 0.02 * (names.index(arm.arm) - len(names) / 2)
        at = depths[arm.place] * shift if depths else float(arms.index(arm))
        half, stable = arm.lr50, arm.highest_stable_rate
        xs, ys = ([at], [half.rate]) if depths else ([half.rate], [at])
        if half.bound != "unclear":
            axes.plot(
                xs,
                ys,
                marker=_BOUND_MARKS[half.bound][bool(depths)] or style.shape,
                color=style.colour,
                linestyle="none",
                gid=style.gid,
            )
        interval = arm.lr50_interval
        if interval is not None and half.bound != "unclear":
            span = list(np.clip([interval.low, interval.high], min(rates) / 2, max(rates) * 2))
            axes.plot(
                *(([at, at], span) if depths else (span, [at, at])),
                color=style.colour,
                lw=1.4,
                linestyle=style.dashes,
                gid=style.gid,
            )
        if stable is not None:
            axes.plot(
                *(([at], [stable]) if depths else ([stable], [at])),
                marker="|" if not depths else "_",
                ms=11,
                mew=2,
                color=style.colour,
                linestyle="none",
                gid=style.gid,
            )
    rates = sorted({o.rate for o in material.outcomes})
    if depths:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(
            sorted(set(depths.values())), [str(d) for d in sorted(set(depths.values()))]
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("blocks, L")
        axes.set_ylabel("learning rate")
        _legend(figure, material.styles)
    else:
        _rate_axis(axes, rates)
        axes.set_yticks(range(len(arms)), [_arm_and_place(arm) for arm in arms])
        axes.invert_yaxis()
    return Picture(
        "thresholds",
        "The rate at which half of the runs fail, and the highest stable rate",
        "Points: the rate at which a logistic fit (Firth's) of failure on log rate passes 1/2; "
        "a triangle points to where it lies beyond the rates tried, as a line does that runs on "
        "past them. Lines: 95% intervals over seeds and within the grid's spacing. Bars across: "
        "the highest rate up to which no seed failed.",
        "; ".join(f"{_arm_and_place(a)}: {threshold_text(a)}" for a in arms),
        figure,
    )


_BOUND_MARKS: dict[str, tuple[str, str]] = {"": ("", ""), "above": (">", "^"), "below": ("<", "v")}


def threshold_text(arm: ArmSummary) -> str:
    """An arm's LR50 in words."""
    rate = f"{arm.lr50.rate:.2g}"
    return {"": rate, "above": f"above {rate}", "below": f"below {rate}", "unclear": "unclear"}[
        arm.lr50.bound
    ]


def sensitivity(material: Material) -> Picture | None:
    """What a wrong rate costs, a bar an arm."""
    arms = material.summary.arms
    if all(len(arm.by_rate) < 2 for arm in arms):
        return None
    figure, (axes,) = _panels(1, width=7.2, height=1.2 + 0.32 * len(arms))
    for row, arm in enumerate(arms):
        style = material.styles[arm.arm]
        axes.barh(
            row,
            arm.lr_sensitivity,
            0.6,
            color=style.colour,
            gid=style.gid,
            alpha=1.0 if style.dashes == "-" else 0.55,
        )
        interval = arm.lr_sensitivity_interval
        if interval is not None:
            axes.plot([interval.low, interval.high], [row, row], color=INK, lw=1.4, gid=style.gid)
    axes.set_yticks(range(len(arms)), [_arm_and_place(arm) for arm in arms])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("learning-rate sensitivity (nats)")
    rates = {tuple(at.rate for at in arm.by_rate) for arm in arms}
    grid = ", ".join(f"{rate:g}" for rate in max(rates, key=len))
    own = (
        " Arms with rates of their own are not comparable with the others."
        if len(rates) > 1
        else ""
    )
    edge = ", ".join(_arm_and_place(arm) for arm in arms if arm.best_at_edge)
    edges = f" Best rate at the edge of the grid in some seed: {edge}." if edge else ""
    return Picture(
        "sensitivity",
        "Learning-rate sensitivity",
        "Mean over the rates tried of the loss, at most that at the start, above the arm's best "
        f"(Wortsman et al. 2023), with 95% intervals over seeds. Rates: {grid}; on another grid "
        "the value is another. An arm that learns at no rate has a value near 0: read it with "
        f"its loss.{own}{edges}",
        "; ".join(f"{_arm_and_place(a)}: {a.lr_sensitivity:.2f} nats" for a in arms),
        figure,
    )


# ---------------------------------------------------------------------------------------------
# Networks at their start


def gradient_by_depth(material: Material) -> Picture | None:
    """g_L against L, log-log."""
    if not material.starts:
        return None
    figure, (axes,) = _panels(1, width=6.0, height=3.6)
    slopes = _by_depth(axes, material, lambda probe: probe.last_gradient)
    axes.set_ylabel("gradient norm of the last block's W₂")
    figure.legend(loc="outside lower center", ncols=2 if len(slopes) < 9 else 3)
    return Picture(
        "gradient-by-depth",
        "Gradient of the last block at the start, by depth",
        "For one token, a mean over initial weights, as in the theory of Xiong et al. 2020: under "
        "xavier weights flat in post-norm, and in pre-norm falling with a slope near -0.45. In the "
        f"gpt2 regime at small widths both are near 0. Slopes: {'; '.join(slopes)}.",
        "; ".join(slopes),
        figure,
    )


def amplification(material: Material) -> Picture | None:
    """Change of the output by a change of the weights, against 2L."""
    if not material.starts:
        return None
    figure, panels = _panels(2, width=4.6, height=3.6)
    random = _by_depth(panels[0], material, lambda probe: probe.amplification, sublayers=True)
    adam = _by_depth(panels[1], material, lambda probe: probe.adam_amplification, sublayers=True)
    panels[0].set_title("weights moved at random: E|Δout|² / δ²")
    panels[1].set_title("one update by Adam: E|Δout|²")
    names = [_start_name(material, start) for start in material.starts]
    figure.legend(panels[0].lines, names, loc="outside lower center", ncols=min(len(names), 5))
    return Picture(
        "amplification",
        "How much a change of the weights is amplified, by depth",
        "For one token, per channel: every matrix of the blocks moved at random by 1% of its "
        "spread, and by Adam's first update at rate 1e-5. Theory (Liu et al. 2020) of the first, "
        "under xavier weights: as the number of sublayers in post-norm, a slope of 1, and in "
        f"pre-norm as its logarithm. Slopes: at random {'; '.join(random)}; by Adam "
        f"{'; '.join(adam)}.",
        f"At random: {'; '.join(random)}. By Adam: {'; '.join(adam)}",
        figure,
    )


def _by_depth(
    axes: Axes, material: Material, value: Callable[[Probe], float], *, sublayers: bool = False
) -> list[str]:
    """Draw a measure of one token against depth; returns each network's slope in words."""
    factor, slopes = 2 if sublayers else 1, []
    depths: set[int] = set()
    for start in material.starts:
        xs = [factor * probe.layers for probe in start.token]
        ys = [value(probe) for probe in start.token]
        zero = not all(ys)  # ReZero's branches start at 0
        grows = "0 throughout" if zero else f"{loglog_slope(xs, ys):+.2f}"
        slopes.append(f"{_start_name(material, start)} {grows}")
        style = _start_style(material, start)
        axes.plot(xs, ys, marker="o", ms=4, label=slopes[-1], **style)
        depths |= set(xs)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(depths), [str(depth) for depth in sorted(depths)])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sublayers, 2L" if sublayers else "blocks, L")
    _plain_numbers(axes)
    return slopes


def start_by_layer(material: Material) -> Picture | None:
    """Gradient norm, residual dependency and stream by layer, before training."""
    if not material.starts:
        return None
    depth = max(set.intersection(*({p.layers for p in start.text} for start in material.starts)))
    figure, panels = _panels(4, width=2.8, height=3.2)
    words = []
    for start in material.starts:
        probe = next(probe for probe in start.text if probe.layers == depth)
        style = {**_start_style(material, start), "marker": "o", "ms": 3}
        blocks = range(1, depth + 1)
        if all(probe.gradient_norms):  # ReZero's are 0
            panels[0].plot(blocks, probe.gradient_norms, **style)
        if probe.betas is not None:
            panels[1].plot(blocks, [attention for attention, _ in probe.betas], **style)
            panels[2].plot(blocks, [mlp for _, mlp in probe.betas], **style)
        panels[3].plot(blocks, probe.stream_rms, label=_start_name(material, start), **style)
        words.append(
            f"{_start_name(material, start)}: gradient {probe.gradient_norms[0]:.2g} in block 1, "
            f"{probe.gradient_norms[-1]:.2g} in block {depth}"
        )
    _by_block(panels, ("gradient norm of W₂", *INSIDE))
    panels[0].set_yscale("log")
    _plain_numbers(panels[0])
    figure.legend(loc="outside lower center", ncols=2 if len(words) < 9 else 3)
    return Picture(
        "start-by-layer",
        f"Inside the networks at their start, {depth} blocks",
        f"The arms' networks made {depth} blocks deep, whatever the grid's depth. On "
        "batches of the training text, before any update. β = Var[f]/Var[x + f] is a "
        "sublayer's share in its sum: it falls with depth where the stream grows, as in pre-norm, "
        "and stays where every sum is normalised, as in post-norm.",
        "; ".join(words),
        figure,
    )


def layers_while_training(material: Material) -> Picture | None:
    """Residual dependency and stream by layer at the last look, where diagnostics were on."""
    looks = {o.cell.id: _last_look(o) for o in material.outcomes if o.verdict is not None}
    trained = [o for o in material.outcomes if looks.get(o.cell.id) and not _failed(o)]
    if not trained:
        return None
    where = [(place_text(o.cell.place), o.rate) for o in trained]
    place, rate = max(
        where,
        key=lambda key: len({o.cell.arm for o, w in zip(trained, where, strict=True) if w == key}),
    )
    figure, panels = _panels(3, width=3.4, height=3.2)
    for outcome, key in zip(trained, where, strict=True):
        if key == (place, rate):
            for axes, measure in zip(
                panels, ("attention_beta", "mlp_beta", "stream_rms"), strict=True
            ):
                blocks = [
                    r for r in looks[outcome.cell.id] if "attention_logit" in r and measure in r
                ]
                axes.plot(
                    [r["layer"] for r in blocks],
                    [r[measure] for r in blocks],
                    **_line(material, outcome),
                )
    _by_block(panels, INSIDE)
    _legend(figure, material.styles)
    step = max(record["step"] for records in looks.values() for record in records)
    return Picture(
        "layers",
        "Inside the networks while they train",
        f"Runs at rate {rate:g}{f' ({place})' if place else ''} that trained, at step {step}, a "
        "line a run; where a placement adds in another way than x + f, β is not measured.",
        f"Residual dependency and RMS of the stream by block at step {step}, a line a run",
        figure,
    )


INSIDE = ("attention's residual dependency β", "feed-forward's β", "RMS of the residual stream")


def _by_block(panels: Sequence[Axes], titles: Sequence[str]) -> None:
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-3:-1]:
        axes.set_ylim(bottom=0)
    panels[-1].set_yscale("log")
    _plain_numbers(panels[-1])


def _plain_numbers(axes: Axes) -> None:
    """0.3 and not 3 x 10^-1 on a logarithmic axis, and few of them."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _last_look(outcome: Outcome) -> list[metrics.Record]:
    records = [r for r in metrics.read(outcome.directory / "metrics.jsonl") if "layer" in r]
    last = max((record["step"] for record in records), default=0)
    return [record for record in records if record["step"] == last]


def _start_name(material: Material, start: Start) -> str:
    """The levels that a network's arms have in common: what they differ in is no matter of it."""
    levels = [arm.levels for arm in material.grid.all_arms() if arm.name in start.arms]
    common = [
        name for factor, name in levels[0].items() if all(each[factor] == name for each in levels)
    ]
    return ", ".join(common) or start.arms[0]


def _start_style(material: Material, start: Start) -> dict[str, Any]:
    style = material.styles[start.arms[0]]
    gid = " ".join(material.styles[arm].gid for arm in start.arms)
    return {"color": style.colour, "linestyle": style.dashes, "lw": 1.5, "gid": gid}


# ---------------------------------------------------------------------------------------------
# Curves


def _curves(material: Material) -> Iterator[Picture]:
    """Loss and gradient norm of every run, a picture for each place and rate."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in material.outcomes:
        if outcome.verdict is not None:
            groups.setdefault((place_text(outcome.cell.place), outcome.rate), []).append(outcome)
    order = sorted(groups, key=lambda group: (material.places.index(group[0]), group[1]))
    for number, (place, rate) in enumerate(order, 1):
        outcomes = groups[place, rate]
        long = any(o.cell.config.training.steps > EARLY_STEPS for o in outcomes)
        early = [("loss", f"its first {EARLY_STEPS} steps", EARLY_STEPS)] if long else []
        drawn = [("loss", "training loss", None), *early, ("grad_norm", "gradient norm", None)]
        figure, panels = _panels(len(drawn), width=3.6, height=3.3)
        for outcome in outcomes:
            records = [r for r in metrics.read(outcome.directory / "metrics.jsonl") if "loss" in r]
            for axes, (key, _, last) in zip(panels, drawn, strict=True):
                _draw_run(axes, records, key, last, _line(material, outcome))
        for axes, (key, title, _) in zip(panels, drawn, strict=True):
            axes.set_title(title)
            axes.set_xlabel("step")
            if key == "loss":
                axes.axhline(material.summary.unigram_entropy, color=PALE, lw=1, linestyle="--")
        panels[-1].set_yscale("log")
        _plain_numbers(panels[-1])
        _legend(figure, material.styles)
        statuses = ", ".join(f"{o.cell.arm}, seed {o.seed}: {o.status}" for o in outcomes)
        yield Picture(
            f"curves-{number:02}",
            f"Rate {rate:g}{f', {place}' if place else ''}",
            "Every run, a line each; a ring marks a spike. The dashed line is H₁.",
            f"Loss and gradient norm against the step. {statuses}",
            figure,
            tuple(outcome.cell.id for outcome in outcomes),
        )


def _draw_run(
    axes: Axes, records: Sequence[metrics.Record], key: str, last: int | None, style: dict[str, Any]
) -> None:
    steps, values = [r["step"] for r in records], [r[key] for r in records]
    axes.plot(*_thinned(steps, values, last), **{**style, "lw": 1.0})
    found = [n for n in spikes(values) if last is None or steps[n] <= last]
    axes.plot(
        [steps[n] for n in found],
        [values[n] for n in found],
        **{**style, "linestyle": "none", "marker": "o", "ms": 6, "mfc": "none"},
    )


def _thinned(
    steps: Sequence[int], values: Sequence[float | None], last: int | None
) -> tuple[list[float], list[float]]:
    """At most CURVE_POINTS points: means of neighbours, None left out."""
    points = [
        (s, v)
        for s, v in zip(steps, values, strict=True)
        if v is not None and (last is None or s <= last)
    ]
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [float(np.mean([s for s, _ in g])) for g in groups], [
        float(np.mean([v for _, v in g])) for g in groups
    ]


def _line(material: Material, outcome: Outcome) -> dict[str, Any]:
    style = material.styles[outcome.cell.arm]
    gid = f"{style.gid} cell-{outcome.cell.id}"
    return {"color": style.colour, "linestyle": style.dashes, "lw": 1.2, "gid": gid}


# ---------------------------------------------------------------------------------------------
# What they share


DRAWINGS: dict[str, Callable[[Material], Picture | None]] = {
    "loss-by-rate": signature,
    "failures": failures,
    "thresholds": thresholds,
    "sensitivity": sensitivity,
    "gradient-by-depth": gradient_by_depth,
    "start-by-layer": start_by_layer,
    "amplification": amplification,
    "layers": layers_while_training,
}


def _failed(outcome: Outcome) -> bool:
    return outcome.verdict is not None and outcome.verdict.failed


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` panels side by side, four in a row at most, of one scale each."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def _legend(figure: Figure, styles: dict[str, Style]) -> None:
    """All arms under the panels."""
    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            linestyle=style.dashes,
            marker=style.shape,
            ms=4,
            label=name,
        )
        for name, style in styles.items()
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    for handle, text, style in zip(
        legend.legend_handles, legend.get_texts(), styles.values(), strict=True
    ):
        text.set_gid(style.gid)
        if handle is not None:
            handle.set_gid(style.gid)


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")


def _depths(material: Material) -> dict[str, int]:
    """The number of blocks at each place, if places differ in it alone."""
    places = {place_text(o.cell.place): o.cell.place for o in material.outcomes}
    if len(places) > 1 and all(list(place) == ["model.layers"] for place in places.values()):
        return {text: int(place["model.layers"]) for text, place in places.items()}
    return {}


def _arm_and_place(arm: ArmSummary) -> str:
    return f"{arm.arm}{f' ({arm.place})' if arm.place else ''}"


def _losses_in_words(material: Material) -> str:
    parts = []
    for arm in material.summary.arms:
        losses = ", ".join(f"{at.median_loss:.2f} at {at.rate:g}" for at in arm.by_rate)
        parts.append(f"{_arm_and_place(arm)}: {losses}")
    return "Median final loss. " + "; ".join(parts)


def save(picture: Picture, folder: Path) -> str:
    """Write PNG and SVG, and return the SVG."""
    with _look():
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine(None)  # laid out once for both, not at every draw
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=130, facecolor="white")
        path = folder / f"{picture.name}.svg"
        picture.figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path.read_text("utf-8")
