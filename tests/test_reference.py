"""docs/configuration.md, which `python -m gpt.cli.reference` makes from the options."""

from __future__ import annotations

from conftest import ROOT

from gpt.cli import reference
from gpt.config import Config, option_fields


def test_the_page_is_current():
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == reference.page()


def test_it_has_every_option_of_a_run_once():
    rows = [line.split("`")[1] for line in reference.page().splitlines() if line.startswith("| `")]
    of_a_run = rows[: rows.index("title")]  # the first one of a grid
    assert sorted(of_a_run) == sorted(option_fields(Config))
    assert len(set(of_a_run)) == len(of_a_run)


def test_units_and_sources_are_those_of_options():
    page = reference.page()
    for path in {**reference.UNITS, **reference.SOURCES}:
        assert f"| `{path}` |" in page


def test_values_in_words():
    page = reference.page()
    for row in (
        "| `model.norm.placement` | `pre`, `post`, `peri`, ",
        "| `optimizer.clip` | number from 1e-30 or `null` | 1 | ",
        "| `training.micro_batch` | `auto` or integer from 1 | `auto` | sequences | ",
        "| `base` | text or a mapping | required | ",
        "that `measure: column` and `measure: log_column` compare. |",
        "for log\\_lr50, log\\_threshold and log\\_column;",
    ):
        assert row in page
