"""docs/configuration.md: it agrees with the options, and GitHub can render it."""

from __future__ import annotations

import re

from conftest import ROOT

from gpt.cli.reference import page
from gpt.config import Config, load, option_paths
from gpt.config.bibliography import LINKS

TEXT = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
ROWS = {
    match[1]: re.split(r" (?<!\\)\| ?", line)[:-1]
    for line in TEXT.partition("\n## Grids\n")[0].splitlines()
    if (match := re.match(r"\| `([\w.\[\]]+)` ", line))
}


def test_the_page_is_current():
    """`python -m gpt.cli.reference > docs/configuration.md` writes it."""
    assert page() == TEXT


def test_every_option_has_a_row():
    assert [path for path in ROWS if "[]" not in path] != []
    assert {path for path in ROWS if "[]" not in path} == set(option_paths(Config))


def test_rows_have_a_cell_for_each_column():
    for line in TEXT.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 7, line


def test_rows_state_type_default_unit_and_source():
    assert ROWS["training.steps"][1:4] == ["integer, 1 to 1,000,000,000", "`1000`", "steps"]
    assert ROWS["training.process_timeout"][3] == "seconds"
    assert ROWS["evaluation.sequences"][1:4] == [
        "integer, 1 to 1,000,000,000 or `null`", "`null`", "sequences",
    ]  # fmt: skip
    assert ROWS["optimizer.clip"][5] == "[Pascanu et al. 2013](https://arxiv.org/abs/1211.5063)"
    assert ROWS["data.path"][1:3] == ["path or list of paths", "`[]`"]
    assert ROWS["model.norm.eps"][4].endswith(r"\|\|x\|\|.")
    assert ROWS["data.holdout"][4].endswith("Read only without `validation`.")


def test_every_source_is_used():
    assert set(re.findall(r"\[([^]]+)\]\(https", TEXT)) == set(LINKS)


def test_the_example_is_valid(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my-run.yaml").write_text(example)
    config = load(tmp_path / "my-run.yaml")
    assert (config.model.norm.placement, config.optimizer.learning_rate) == ("post", 3e-4)
