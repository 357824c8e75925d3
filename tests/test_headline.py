"""The first screen: an answer and its numbers, outcomes, and what would settle the question."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy import integrate, special
from test_summary import ARMS, grid, outcome

from gpt.compare import report
from gpt.compare.analysis.headline import Headline, headline, matching_text, mean_sd, spans
from gpt.compare.analysis.matching import Match
from gpt.compare.analysis.outcomes import Outcome
from gpt.compare.analysis.outlook import MOST_SEEDS, NO_SEEDS, outlook, seeds_needed
from gpt.compare.analysis.summary import summarize
from gpt.compare.figures import PLOTS
from gpt.compare.figures.base import Plot, PlotData, plot_style
from gpt.compare.figures.losses import loss_by_rate
from gpt.compare.figures.seeds import by_seed
from gpt.compare.grid import Grid
from gpt.compare.messages import format_means, format_summary

RATES, SEEDS = (1e-3, 1e-2), 8
COST = {
    "question": "Does a missing warm-up cost post-norm more?",
    "of": ["post, cold", "post, warm"],
    "against": ["pre, cold", "pre, warm"],
}
BASE = {"post, cold": 2.9, "post, warm": 2.5, "pre, cold": 2.45, "pre, warm": 2.4}


def loss(arm: str, rate: float, seed: int) -> float:
    """Differences vary with the seed; none is 0."""
    wave = math.sin(3 * seed + ARMS.index(arm)) / 50
    return BASE[arm] + wave + (rate > 5e-3) / 100


def noisy_loss(arm: str, rate: float, seed: int) -> float:
    return loss(arm, rate, seed) + (arm == "post, cold") * math.cos(seed)


def runs(
    value: Callable[[str, float, int], float] = loss,
    arms: Sequence[str] = ARMS,
    status: str = "trained",
    **options: Any,
) -> list[Outcome]:
    found = []
    for arm, rate, seed in itertools.product(arms, RATES, range(SEEDS)):
        run = outcome(arm, rate, seed, value(arm, rate, seed), status=status, **options)
        cell = replace(run.cell, id=run.cell.id.replace(", ", "_"))  # as of real cells
        found.append(replace(run, cell=cell, seconds=30))
    return found


def asked(*contrasts: dict[str, Any], **changes: Any) -> Grid:
    rates = {"optimizer.learning_rate": list(RATES)}
    return grid(**{"grid": rates, "seeds": SEEDS, "contrasts": contrasts, "pairs": [], **changes})


def screen(compared: Grid, found: list[Outcome], workers: int = 2) -> Headline:
    return headline(compared, summarize(compared, found, workers=workers), found)


# ---------------------------------------------------------------------------------------------
# What would settle it


def t_quantile(p: float, df: int) -> float:
    """Student's t quantile by bisection of the integral of its density."""
    norm = special.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * special.gamma(df / 2))
    low, high = 0.0, 50.0
    while high - low > 1e-9:
        x = (low + high) / 2
        area, _ = integrate.quad(lambda t: norm * (1 + t * t / df) ** (-(df + 1) / 2), 0, x)
        low, high = (x, high) if 0.5 + area < p else (low, x)
    return low


@pytest.mark.parametrize(("distance", "spread"), [(1, 0.3), (1, 1), (1, 2), (0.2, 0.33)])
def test_the_number_of_seeds_is_the_first_whose_interval_excludes_the_margin(
    distance: float, spread: float
):
    expected = next(
        n
        for n in range(6, 100)
        if t_quantile(0.975, n - 1) * spread / math.sqrt(n) < distance and 2 / 2**n <= 0.05
    )
    assert seeds_needed(distance, spread) == expected


def test_a_mean_at_the_margin_needs_too_many_seeds():
    assert seeds_needed(1e-6, 1.0) is None
    assert f"even {MOST_SEEDS:,} seeds would not" in outlook([1, -1, 1, -1.0], "above", 0)


def test_an_open_question_says_how_many_seeds_and_minutes_would_settle_it():
    differences = [0.5, -0.3, 0.9, 0.1, -0.1, 0.7]
    needed = seeds_needed(fmean(differences), stdev(differences))
    assert needed is not None
    assert needed > 6
    minutes = round((needed - 6) * 240 / 2 / 60)
    assert outlook(differences, "above", 0, 240, 2) == (
        f"At this mean and spread, about {needed} seeds ({needed - 6} more, about {minutes} "
        "minutes with 2 workers) would settle it."
    )
    assert f"({needed - 6} more) would settle it." in outlook(differences, "above", 0)


@pytest.mark.parametrize(
    ("claim", "margin", "wrong"),
    [("above", 0, False), ("above", 1, True), ("below", 0, True), ("within", 1, False)],
)
def test_a_mean_on_the_wrong_side_is_not_expected_to_give_yes(
    claim: Any, margin: float, wrong: bool
):
    text = outlook([0.5, -0.3, 0.9, 0.1, -0.1, 0.7], claim, margin)
    assert ("wrong side of the margin" in text) == wrong
    assert ("not expected to give YES" in text) == wrong


def test_the_nearer_end_of_an_equivalence_margin_counts():
    differences = [0.1, 0.5, 0.9, 0.3, 0.7]
    text = outlook(differences, "within", 0.6)
    assert f"about {seeds_needed(0.1, stdev(differences))} seeds" in text


def test_one_seed_shows_no_spread():
    assert "At least 6 seeds" in outlook([0.5], "above", 0)


# ---------------------------------------------------------------------------------------------
# The first screen


def test_yes_has_both_costs_the_difference_its_interval_p_and_n():
    found = screen(asked(COST), runs())
    (answer,) = found.answers
    assert (answer.question, answer.badge, answer.answer) == (COST["question"], "YES", "supported")
    of = [fmean(loss(arm, r, s) for r in RATES for s in range(SEEDS)) for arm in ARMS]
    pre, post = of[0] - of[1], of[2] - of[3]
    for text in (f"{post:+.3f}", f"{pre:+.3f}", f"{post - pre:+.3f}", "8 seeds, p = 0.0078"):
        assert text in answer.finding
    assert "95% interval +0.3" in answer.finding


def test_no_and_exploratory():
    turned = screen(asked({**COST, "claim": "below"}, COST), runs())
    assert [a.badge for a in turned.answers] == ["NO", "YES (exploratory)"]


def test_not_settled_says_what_would_settle_it():
    (answer,) = screen(asked(COST), runs(noisy_loss)).answers
    assert answer.badge == "NOT SETTLED"
    (total, more, minutes) = map(
        int, re.findall(r"about (\d+) seeds \((\d+) more, about (\d+) min", answer.because)[0]
    )
    assert total == SEEDS + more
    assert minutes == round(more * 8 * 30 / 2 / 60)  # 4 arms at 2 rates, 30 s each


def test_minutes_are_not_estimated_for_batched_cells():
    (answer,) = screen(asked(COST, runner="batched"), runs(noisy_loss)).answers
    assert "minute" not in answer.because
    assert re.search(r"about \d+ seeds \(\d+ more\)", answer.because)


def test_a_threshold_has_no_number_of_seeds():
    lr50 = {**COST, "measure": "log_lr50"}
    (answer,) = screen(asked(lr50), runs()).answers
    assert answer.badge == "NOT SETTLED"
    assert NO_SEEDS in answer.because


@pytest.mark.parametrize("contrasts", [[COST], []])
def test_runs_that_learned_nothing_give_no_number(contrasts: list[Any]):
    found = screen(asked(*contrasts), runs(lambda *_: 3.31, status="plateaued"))
    (answer,) = found.answers
    assert "The runs are too short, or their learning rates are wrong" in answer.finding
    assert not re.search(r"[0-9]\.[0-9]", answer.finding + answer.because)
    assert answer.badge == ("NOT SETTLED" if contrasts else "")


def test_two_factors_of_two_levels_make_a_two_by_two_table():
    at = {"optimizer.learning_rate": [1e-2]}
    found = runs()
    found[0] = replace(found[0], verdict=replace(found[0].verdict, status="plateaued"))  # at 1e-3
    last = next(n for n, o in enumerate(found) if (o.cell.arm, o.rate) == ("post, warm", 1e-2))
    found[last] = replace(found[last], verdict=replace(found[last].verdict, status="plateaued"))
    table = screen(asked({**COST, "at": at}), found).table
    assert (table.corner, table.columns) == ("placement", ("cold", "warm"))
    assert "learning rate 0.01" in table.caption
    for row, texts in table.rows:
        for column, text in zip(table.columns, texts, strict=True):
            arm = f"{row}, {column}"
            mean = fmean(loss(arm, 1e-2, seed) for seed in range(SEEDS))
            trained = SEEDS - (arm == "post, warm")
            assert text == f"{trained} of {SEEDS} trained, {mean:.3f}"


def test_arms_outside_the_contrast_are_counted_at_its_rates():
    single = {"question": "?", "of": COST["of"], "at": {"optimizer.learning_rate": [1e-3]}}
    rows = dict(screen(asked(single), runs()).table.rows)
    assert all(text.startswith("8 of 8 trained") for texts in rows.values() for text in texts)


def test_other_factors_make_a_table_of_all_arms():
    arms = {"placement": {"a": {}, "b": {}, "c": {}}}
    found = [
        replace(run, cell=replace(run.cell, arm="abc"[ARMS.index(run.cell.arm)]))
        for run in runs(arms=ARMS[:3])
    ]
    table = screen(asked({"question": "?", "of": ["a", "c"]}, arms=arms), found).table
    assert [name for name, _ in table.rows] == ["a", "b", "c"]
    assert table.columns == ("trained", "mean loss")


def test_what_it_holds_for_names_the_seeds_and_rates_compared():
    at = {"optimizer.learning_rate": [1e-3]}
    text = screen(asked({**COST, "at": at}), runs()).holds_for
    assert "seeds 0 to 7; rates 0.001" in text
    for part in (
        "gpt2 weights",
        "1000 steps",
        "adamw",
        "fp32",
        "Python's standard library",
        "blocks of width",
    ):
        assert part in text


def test_seeds_are_written_as_spans():
    assert spans([7, 1, 2, 3, 9, 10, 3]) == "1 to 3, 7, 9, 10"


def test_matching_is_a_few_words_or_the_first_exception():
    match = Match(3, 3, 20, 18, 2, ())
    assert matching_text(match) == (
        "matched: same inputs, same initial weights (2 of 20 rescaled), same software"
    )
    assert matching_text(replace(match, exceptions=("a", "b"))) == "NOT MATCHED: a, and 1 more"
    assert "nothing to match" in matching_text(replace(match, cells=0))


def test_mean_and_sd_are_those_of_the_sample():
    assert mean_sd([1.0, 2.0, 4.0]) == "2.333 ± 1.528"
    assert mean_sd([1.0]) == "1.000"


def test_the_terminal_has_each_question_its_answer_and_the_means():
    compared, found = asked(COST), runs()
    summary = summarize(compared, found)
    lines = format_summary(summary, Path("x")).splitlines()
    assert lines[0] == COST["question"]
    assert lines[1].startswith("  YES: ")
    losses = [loss("post, warm", 1e-2, seed) for seed in range(SEEDS)]
    row = ["post,", "warm", "0.01", f"{fmean(losses):.3f}", "±", f"{stdev(losses):.3f}", "0/8"]
    assert row in [line.split() for line in lines]


def test_a_long_table_in_the_terminal_is_cut():
    found = [outcome(ARMS[0], 1e-4 * n, 0, 2.0) for n in range(1, 101)]
    lines = format_means(summarize(asked(), found))
    assert lines[-1] == "... 51 more rows in report.md"
    assert len(lines) == 51


# ---------------------------------------------------------------------------------------------
# In the report

OWN = {arm: RATES[n % 2] for n, arm in enumerate(ARMS)}
CASES: dict[str, tuple[Grid, list[Outcome]]] = {
    "YES": (asked(COST), runs()),
    "NO": (asked({**COST, "claim": "below"}), runs()),
    "NOT SETTLED": (asked(COST), runs(noisy_loss)),
    "nothing learned": (asked(COST), runs(lambda *_: 3.31, status="plateaued")),
    "one pair": (asked({"question": "?", "of": COST["of"]}), runs()),
    "own rates": (asked({**COST, "rates": OWN}), runs()),
    "several settings": (
        asked(COST, grid={"optimizer.learning_rate": list(RATES), "model.layers": [2, 4]}),
        [*runs(layers=2), *runs(layers=4)],
    ),
    "no contrasts": (asked(), runs()),
    "failures": (asked({**COST, "measure": "failure"}), runs()),
    "logarithms": (
        asked({**COST, "measure": "log_column", "column": "max_grad_norm"}),
        runs(),
    ),
}


DRAWN = ("by-seed", "loss-by-rate")


def write_case(case: str, folder: Path) -> None:
    """Write a report whose only figures are those of the first screen."""

    def draw(data: PlotData) -> dict[str, Plot]:
        with plot_style():
            return {name: plot for name in DRAWN if (plot := PLOTS[name](data))}

    compared, found = CASES[case]
    (folder / "grid.yaml").write_text(compared.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", draw)
        report.write_report(folder, compared, summarize(compared, found), found, [], [])


@pytest.mark.parametrize("case", CASES)
def test_every_report_begins_with_its_first_screen(case: str, tmp_path: Path):
    write_case(case, tmp_path)
    compared, found = CASES[case]
    html = (tmp_path / "report.html").read_text("utf-8")
    (first,) = re.findall(r'<section class="answer".*?</section>', html, re.DOTALL)
    text = unescape(first)
    shown = screen(compared, found, workers=1)
    answer = shown.answers[0]
    for part in (answer.question, answer.finding, answer.because, shown.holds_for, shown.matching):
        assert part in text
    assert (f'<span class="badge {answer.answer}">{answer.badge}</span>' in text) == bool(
        compared.contrasts
    )
    has_seeds = case not in ("nothing learned", "no contrasts")
    assert re.findall(r'<figure id="([^"]*)"', first) == [*DRAWN][not has_seeds :]
    for name, texts in shown.table.rows:
        assert f'<th scope="row">{name}</th>' + "".join(f"<td>{t}</td>" for t in texts) in text
    markdown = (tmp_path / "report.md").read_text("utf-8")
    assert answer.badge in markdown
    assert "| arm | rate | mean ± sd | failed |" in markdown


def test_dumbbells_join_the_two_arms_of_each_seed():
    compared, found = asked(COST), runs()
    data = PlotData(compared, summarize(compared, found), found)
    plot = by_seed(data)
    assert plot is not None
    (axes,) = plot.figure.axes
    bars = [
        list(line.get_xdata() if len(set(line.get_xdata())) > 1 else line.get_ydata())
        for line in axes.lines
        if len(line.get_xdata()) == 2
    ]
    expected = [
        [fmean(loss(arm, rate, seed) for rate in RATES) for arm in (start, to)]
        for to, start in (COST["of"], COST["against"])
        for seed in range(SEEDS)
    ]
    assert bars == [pytest.approx(each) for each in [*expected, [0, 1]]]  # and the line at H₁
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    pairs = [[data.styles[arm] for arm in reversed(COST[key])] for key in ("of", "against")]
    assert [(point.get_marker(), point.get_color()) for point in points] == [
        (style.shape, style.color) for pair in pairs for style in pair * SEEDS
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*"01234567", *"01234567"]


def test_the_registered_rates_and_the_unigram_entropy_are_marked():
    at = {**COST, "at": {"optimizer.learning_rate": [1e-2]}}
    for contrast, bands, rings in ((at, 1, 0), ({**COST, "rates": OWN}, 0, 4), (COST, 0, 0)):
        compared, found = asked(contrast), runs()
        plot = loss_by_rate(PlotData(compared, summarize(compared, found), found))
        axes = plot.figure.axes[0]
        assert len(axes.patches) == bands
        marks = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert len(marks) == rings
        assert ("mark the rates registered" in plot.caption) == bool(bands or rings)
        (note,) = axes.texts
        assert note.get_text() == "H₁: learned only frequencies"
        assert axes.get_ylim()[1] > 3.3 + 0.1 * (3.3 - axes.get_ylim()[0])
