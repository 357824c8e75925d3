"""Names and attributes of variants, read from the source before their module is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpt import variants
from gpt.model.norm import ACROSS_TOKENS, BIASED, NORMS
from gpt.model.placement import PLACEMENTS, Block

ATTRIBUTES = (
    "final_norm",
    "has_norms",
    "needs_norms",
    "min_layers",
    "scales_depth",
    "more_stable",
)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_attributes_read_from_the_source_are_those_of_the_class(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "gpt.model.placement")
    for attribute in ATTRIBUTES:
        found = variants.attribute("gpt.model.placement", "PLACEMENTS", name, attribute)
        assert found == getattr(PLACEMENTS[name], attribute)
    assert "gpt.model.placement" not in sys.modules


@pytest.mark.parametrize(
    ("table", "expected"),
    [("NORMS", NORMS), ("BIASED", BIASED), ("ACROSS_TOKENS", ACROSS_TOKENS)],
)
def test_names_are_those_of_a_dict_or_a_set(
    table: str, expected: dict[str, object] | set[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "gpt.model.norm")
    assert set(variants.names("gpt.model.norm", table)) == set(expected)
    assert "gpt.model.norm" not in sys.modules


def test_a_placement_added_at_run_time_has_its_attributes(monkeypatch: pytest.MonkeyPatch):
    class Mine(Block):
        min_layers = 7

    monkeypatch.setitem(PLACEMENTS, "mine", Mine)
    assert variants.attribute("gpt.model.placement", "PLACEMENTS", "mine", "min_layers") == 7
    assert variants.attribute("gpt.model.placement", "PLACEMENTS", "mine", "final_norm") is True


def test_what_is_not_a_literal_comes_from_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = "class A:\n    x = 1 + 1\n    y = 3\nTABLE = {'a': A}\nMADE = dict(b=A)\n"
    (tmp_path / "variants_of_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert variants.attribute("variants_of_a_test", "TABLE", "a", "y") == 3
    assert "variants_of_a_test" not in sys.modules
    assert variants.attribute("variants_of_a_test", "TABLE", "a", "x") == 2
    monkeypatch.delitem(sys.modules, "variants_of_a_test")
    assert variants.names("variants_of_a_test", "MADE") == ("b",)
    monkeypatch.delitem(sys.modules, "variants_of_a_test")
    assert variants.attribute("variants_of_a_test", "MADE", "b", "y") == 3


def test_the_module_of_a_table_can_be_imported_first(environment: dict[str, str]):
    """It imports gpt.config, which reads the table before it exists."""
    command = [sys.executable, "-c", "import gpt.model.placement"]
    assert subprocess.run(command, env=environment).returncode == 0


def test_a_model_is_validated_without_torch(environment: dict[str, str]):
    code = """
import sys
from gpt.config import Config, validate
validate(Config, {"model": {"norm": {"placement": "deepnorm", "type": "rms"}}})
try:
    validate(Config, {"model": {"norm": {"placement": "deepnorm", "type": "none"}}})
except ValueError as error:
    assert "conflicts with placement deepnorm" in str(error), error
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
