"""A grid file becomes cells, and mistakes in it are named."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from gpt.compare.grid import (
    MOST_CELLS,
    Contrast,
    Grid,
    Point,
    check_sizes,
    load,
    schema,
    shared_points,
)
from gpt.config import Config
from gpt.errors import InputError
from gpt.model.placement import PLACEMENTS

GRIDS = ROOT / "configs/compare"
LITERATURE = sorted((GRIDS / "literature").glob("*.yaml"))
SHIPPED = [*sorted(GRIDS.glob("*.yaml")), *LITERATURE]

TREE: dict[str, Any] = {
    "base": {"model": {"width": 16, "heads": 2}, "data": {"tokenizer": "bytes"}},
    "options": {"training.steps": 7, "evaluation": {"every": 7}},
    "arms": {
        "placement": {
            "pre": {"model.norm.placement": "pre", "model.norm.final_norm": "on"},
            "post": {"model": {"norm": {"placement": "post", "final_norm": "off"}}},
        },
        "warm-up": {"cold": {"schedule.warmup": "none"}, "warm": {"schedule.warmup": "linear"}},
    },
    "grid": {
        "optimizer.learning_rate": ["1e-3", 0.01, 0.1],
        "model.layers, model.context": [[2, 16], [3, 8]],
    },
    "seeds": 2,
}


def cells(folder: Path, **changes: Any) -> list[Any]:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
    return load(path)[1]


def message(folder: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        cells(folder, **changes)
    assert 1 <= len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_cells_are_every_arm_in_every_setting_rate_and_seed(tmp_path: Path):
    found = cells(tmp_path)
    assert len(found) == 2 * 2 * 3 * 2 * 2
    assert len({cell.id for cell in found}) == len(found)
    assert [cell.config.seed for cell in found] == [0] * 24 + [1] * 24  # seed by seed
    cell = next(c for c in found if c.arm == "post, warm" and c.config.seed == 1)
    config = cell.config
    assert isinstance(config, Config)
    assert (config.model.norm.placement, config.model.norm.final_norm) == ("post", "off")
    assert config.schedule.warmup == "linear"
    assert (config.training.steps, config.evaluation.every, config.model.width) == (7, 7, 16)
    assert config.optimizer.learning_rate == 1e-3
    assert cell.setting == {"model.layers": 2, "model.context": 16}
    assert cell.varied == {
        "model.norm.placement": "post",
        "model.norm.final_norm": "off",
        "schedule.warmup": "linear",
        "optimizer.learning_rate": 1e-3,
        "model.layers": 2,
        "model.context": 16,
    }
    assert cell.id == "post_warm_learning-rate-0.001_layers-2_context-16_seed-1"


def test_linked_options_move_together(tmp_path: Path):
    settings = {(c.config.model.layers, c.config.model.context) for c in cells(tmp_path)}
    assert settings == {(2, 16), (3, 8)}


def test_cells_of_one_seed_and_setting_differ_in_their_arm_alone(tmp_path: Path):
    a, b = (
        c
        for c in cells(tmp_path)
        if c.arm in ("pre, cold", "post, cold")
        and c.config.seed == 0
        and c.setting["model.layers"] == 2
        and c.config.optimizer.learning_rate == 0.1
    )
    assert a.config.differences(b.config).keys() == {
        "name",
        "model.norm.placement",
        "model.norm.final_norm",
    }


def test_each_seed_has_weights_and_batches_of_its_own(tmp_path: Path):
    made = cells(tmp_path)
    assert len({c.config.seed for c in made}) > 1
    assert all(c.config.data_seed == c.config.seed for c in made)


def test_an_arm_may_have_rates_of_its_own(tmp_path: Path):
    arms = {
        "optimizer": {
            "adamw": {},
            "adafactor": {"optimizer.name": "adafactor", "optimizer.learning_rate": [0.5, 0.7]},
        }
    }
    found = cells(tmp_path, arms=arms)
    rates = {
        arm: {c.config.optimizer.learning_rate for c in found if c.arm == arm}
        for arm in arms["optimizer"]
    }
    assert rates == {"adamw": {1e-3, 0.01, 0.1}, "adafactor": {0.5, 0.7}}


def test_excluded_cells_are_left_out(tmp_path: Path):
    everything = cells(tmp_path)
    exclude = [{"placement": "post", "optimizer.learning_rate": ["1e-1", 0.01]}, {"seed": 1}]
    left = {c.id for c in cells(tmp_path, exclude=exclude)}
    wanted = {
        c.id
        for c in everything
        if c.config.seed == 0
        and not (c.arm.startswith("post") and c.config.optimizer.learning_rate >= 0.01)
    }
    assert left == wanted
    assert 0 < len(left) < len(everything)


def test_a_cell_that_makes_no_sense_can_be_excluded(tmp_path: Path):
    arms = {"norm": {"rezero": {"model.norm.placement": "rezero"}, "pre": {}}}
    changes = {"arms": arms, "grid": {"model.norm.type": ["rms", None]}}
    assert "arm 'rezero': model.norm.type: rms conflicts" in message(tmp_path, **changes)
    exclude = [{"norm": "rezero", "model.norm.type": "rms"}]
    assert len(cells(tmp_path, **changes, exclude=exclude)) == 3 * 2


def test_a_resolved_grid_gives_the_same_cells(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TREE))
    grid, first = load(path, {"training": {"batch_sequences": 3}})
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "grid.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json")))
    same, second = load(again / "grid.yaml")
    assert same == grid
    assert [(c.id, c.config) for c in second] == [(c.id, c.config) for c in first]
    assert all(c.config.batch_sequences == 3 for c in second)


def test_the_base_may_be_a_file_beside_the_grid(tmp_path: Path):
    (tmp_path / "below.yaml").write_text("model: {width: 24, heads: 2}\nseed: 5\nname: other\n")
    found = cells(tmp_path, base="below.yaml")
    assert {c.config.model.width for c in found} == {24}
    assert {c.config.seed for c in found} == {0, 1}


CONTRAST = {"question": "?", "of": ["pre, warm", "pre, cold"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "gone.yaml"}, ["base: gone.yaml: no such file"]),
        ({"arms": {}}, ["arms"]),
        ({"arms": {"a": {}}, "x": 1}, ["x: no such option"]),
        ({"grid": {"optimizer.rate": [1]}}, ["grid: optimizer.rate: no such option", "perhaps"]),
        ({"grid": {"optimizer.learning_rate": []}}, ["grid.optimizer.learning_rate"]),
        ({"grid": {"model.layers, model.width": [[1, 2, 3]]}}, ["needs 2 values", "[1, 2, 3]"]),
        ({"grid": {"model.norm.placement": ["pre"]}}, ["is set by arm", "and by the grid"]),
        ({"grid": {"seed": [1, 2]}}, ["seed: no such option of a cell"]),
        (
            {"grid": {"model.layers": [2], "model.layers, model.width": [[2, 16]]}},
            ["is on two axes"],
        ),
        ({"grid": {"model.layers": [2, "2"]}}, ["duplicate value or name"]),
        ({"grid": {"model.layers": ["many"]}}, ["arm 'pre, cold': model.layers", "'many'"]),
        ({"grid": {"model.width": [15]}}, ["heads (2) must divide width (15)"]),
        (
            {
                "grid": {"model.norm.type": ["layer", "none"]},
                "options": {"model.norm.embedding": True},
            },
            ["arm 'pre, cold': model.norm.embedding: true conflicts with norm.type none"],
        ),
        (
            {"arms": {"a": {"x": {"model.bias": True}}, "b": {"y": {"model.bias": False}}}},
            ["model.bias is set by 'y' and by another factor"],
        ),
        ({"arms": {"a": {"x, y": {}}}}, ["x, y"]),
        ({"seeds": [1, 1]}, ["seeds: duplicate seed"]),
        ({"seeds": 0}, ["seeds"]),
        ({"exclude": [{"color": "red"}]}, ["exclude.0: color"]),
        ({"exclude": [{"seed": 9}]}, ["exclude.0", "matches no cell"]),
        ({"exclude": [{"seed": [0, 1]}]}, ["exclude leaves no cells"]),
        ({"seeds": list(range(2000))}, ["48,000 cells", f"{MOST_CELLS:,}"]),
        (
            {"contrasts": [{"question": "?", "of": ["pre, warm", "pre, hot"]}]},
            ["'pre, hot' is not one", "pre, cold"],
        ),
        ({"contrasts": [{"question": "?", "of": ["pre, warm"]}]}, ["contrasts.0.of"]),
        ({"contrasts": [{**CONTRAST, "of": ["pre, cold"] * 2}]}, ["compared with itself"]),
        (
            {"contrasts": [{**CONTRAST, "at": {"optimizer.lr": [1]}}]},
            ["contrasts.0.at: optimizer.lr: is not on an axis"],
        ),
        (
            {"contrasts": [{**CONTRAST, "at": {"optimizer.learning_rate": [0.7]}}]},
            ["contrasts.0: arm 'pre, warm' has no cell with optimizer.learning_rate 0.7"],
        ),
        (
            {"contrasts": [{**CONTRAST, "rates": {"pre, warm": 1e-3}}]},
            ["contrasts.0", "needs a rate for each of pre, warm; pre, cold"],
        ),
        (
            {"contrasts": [{**CONTRAST, "rates": {"pre, warm": 1e-3, "pre, cold": 0.7}}]},
            ["arm 'pre, cold' has no cell with optimizer.learning_rate 0.7"],
        ),
        (
            {
                "contrasts": [
                    {
                        **CONTRAST,
                        "measure": "log_lr50",
                        "rates": {"pre, warm": 1e-3, "pre, cold": 1e-3},
                    }
                ]
            },
            ["log_lr50 needs more than one rate"],
        ),
        ({"contrasts": [{**CONTRAST, "claim": "within"}]}, ["needs a margin above 0"]),
        ({"contrasts": [{**CONTRAST, "margin": float("inf")}]}, ["contrasts.0.margin"]),
        (
            {"contrasts": [{**CONTRAST, "measure": "column"}]},
            ["measure: column needs the name of a column"],
        ),
        (
            {"contrasts": [{**CONTRAST, "column": "spikes"}]},
            ["column: needs measure: column or log_column"],
        ),
        (
            {"contrasts": [{**CONTRAST, "measure": "column", "column": "spike"}]},
            ["contrasts.0.column: must be", "found 'spike'"],
        ),
        (
            {"contrasts": [{**CONTRAST, "slope": "model.width"}]},
            ["contrasts.0.slope: model.width: is not on an axis"],
        ),
        (
            {"contrasts": [{**CONTRAST, "slope": "model.layers", "at": {"model.layers": [2]}}]},
            ["contrasts.0.slope: model.layers: needs two or more positive numbers"],
        ),
        (
            {"contrasts": [{**CONTRAST, "slope": "optimizer.learning_rate"}]},
            ["slope: optimizer.learning_rate cannot be the axis"],
        ),
        ({"context_seeds": 0}, ["context_seeds"]),
        (
            {"context_seeds": 1, "contrasts": [{**CONTRAST, "at": {"optimizer.lr": [1]}}]},
            ["contrasts.0.at: optimizer.lr: is not on an axis"],
        ),
        ({"contrast": CONTRAST}, ["contrast: ", "contrasts"]),
        ({"pairs": [["a", "b"]]}, ["'a' is not one of the arms"]),
        ({"pairs": [["pre, warm", "pre, warm"]]}, ["'pre, warm' is compared with itself"]),
        (
            {"pairs": [["pre, warm", "pre, cold"], ["pre, cold", "pre, warm"]]},
            ["pairs: duplicate pair"],
        ),
        ({"arms": {"seed": {"a": {}}}}, ["'seed' cannot name a factor"]),
        (
            {"arms": {"a": {"x": {"optimizer.learning_rate": []}}}},
            ["'x' has no value for optimizer.learning_rate"],
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: list[str]):
    text = message(tmp_path, **changes)
    assert "mine.yaml" in text
    for word in words:
        assert word in text


# ---------------------------------------------------------------------------------------------
# Comparisons that could not have an answer

RATES = "optimizer.learning_rate"
LAYERS = "model.layers"
WARM_RATES = {"schedule.warmup": "linear", RATES: [0.2, 0.3]}
OWN_RATES = {"warm-up": {"cold": {"schedule.warmup": "none"}, "warm": WARM_RATES}}
WARM_LAYERS = {"schedule.warmup": "linear", LAYERS: [4, 5]}
OWN_LAYERS = {
    "arms": {"warm-up": {"cold": {"schedule.warmup": "none"}, "warm": WARM_LAYERS}},
    "grid": {RATES: [0.01, 0.1], LAYERS: [2, 3]},
}
ONE_LAYER = {**OWN_LAYERS, "arms": {"warm-up": {"cold": {}, "warm": {**WARM_LAYERS, LAYERS: [2]}}}}
COLD_WARM = {"question": "?", "of": ["cold", "warm"]}
COLUMN = {**CONTRAST, "measure": "column"}
SEARCH: dict[str, Any] = {"search": {"start": 0.01}, "grid": {LAYERS: [2, 3]}}
THRESHOLD = {**CONTRAST, "measure": "log_threshold", "claim": "within"}
PAIR = ["pre, warm", "pre, cold"]
NOT_SHARED = "no setting and learning rate has every common seed of"


def asking(question: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"contrasts": [question], **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # An arm without cells
        (
            asking(CONTRAST, exclude=[{"arm": "pre, cold"}]),
            "contrasts.0.of: arm 'pre, cold' has no cell to compare",
        ),
        (
            {"pairs": [PAIR], "exclude": [{"arm": "pre, cold"}]},
            "pairs.0: arm 'pre, cold' has no cell to compare",
        ),
        (
            asking({**CONTRAST, "at": {LAYERS: [2], "model.context": [8]}}),
            "contrasts.0.of: arm 'pre, warm' has no cell to compare",
        ),
        (
            asking(
                {**CONTRAST, "at": {LAYERS: [2]}, "rates": {"pre, warm": 0.01, "pre, cold": 0.01}},
                exclude=[{"arm": "pre, cold", RATES: 0.01, LAYERS: 2}],
            ),
            "contrasts.0.of: arm 'pre, cold' has no cell to compare",
        ),
        # Arms without common seeds
        (
            asking(
                CONTRAST,
                exclude=[{"arm": "pre, cold", "seed": 0}, {"arm": "pre, warm", "seed": 1}],
            ),
            "contrasts.0.of: no seed is common to pre, warm; pre, cold",
        ),
        (
            {
                "pairs": [["post, warm", "post, cold"], PAIR],
                "exclude": [{"arm": "pre, cold", "seed": 0}, {"arm": "pre, warm", "seed": 1}],
            },
            "pairs.1: no seed is common to pre, warm; pre, cold",
        ),
        # Arms without common rates or settings
        (asking(COLD_WARM, arms=OWN_RATES), f"contrasts.0.of: {NOT_SHARED} cold; warm (`rates`"),
        ({"pairs": [["cold", "warm"]], "arms": OWN_RATES}, f"pairs.0: {NOT_SHARED} cold; warm"),
        (
            asking(
                {**CONTRAST, "rates": {"pre, warm": 0.01, "pre, cold": 0.1}},
                exclude=[
                    {"arm": "pre, cold", RATES: 0.1, LAYERS: 2},
                    {"arm": "pre, warm", RATES: 0.01, LAYERS: 3},
                ],
            ),
            "contrasts.0.of: no setting has every common seed of pre, warm; pre, cold",
        ),
        # Too few rates
        *(
            (
                asking({**CONTRAST, "measure": measure}, **changes),
                f"contrasts.0.measure: {measure} needs two or more learning rates that all of "
                f"its arms have{where}",
            )
            for measure in ("sensitivity", "log_lr50")
            for changes, where in [
                ({"grid": {RATES: [0.01]}}, ""),
                ({"grid": {}}, ""),
                ({"grid": {LAYERS: [2, 3]}}, " at layers 2"),
                (
                    {
                        "grid": {RATES: [0.01, 0.1], LAYERS: [2, 3]},
                        "exclude": [{"arm": "pre, cold", RATES: 0.1, LAYERS: 3, "seed": 0}],
                    },
                    " at layers 3",
                ),
            ]
        ),
        # Too few values on the axis of a slope
        (
            asking({**COLD_WARM, "slope": LAYERS}, **OWN_LAYERS),
            f"contrasts.0.of: {NOT_SHARED} cold; warm",
        ),
        (
            asking({**COLD_WARM, "slope": LAYERS}, **ONE_LAYER),
            "contrasts.0.slope: model.layers: needs two or more positive numbers that all arms",
        ),
        (
            asking({**CONTRAST, "slope": LAYERS}, exclude=[{"arm": "pre, cold", LAYERS: 3}]),
            "contrasts.0.slope: model.layers: needs two or more positive numbers that all arms",
        ),
        (
            asking({**CONTRAST, "slope": "model.bias"}, grid={"model.bias": [True, False]}),
            "contrasts.0.slope: model.bias: needs two or more positive numbers",
        ),
        # Columns that are empty, or have no log
        (
            asking({**COLUMN, "column": "max_stream_rms"}),
            "contrasts.0.column: max_stream_rms: needs diagnostics.every, which arm 'pre, cold'",
        ),
        (
            asking(
                {**COLUMN, "column": "max_sharpness"}, options={"diagnostics.every": 2}
            ),
            "contrasts.0.column: max_sharpness: needs diagnostics.sharpness, which arm",
        ),
        (
            asking({**COLUMN, "column": "early_rise"}, options={"training.steps": 39}),
            "contrasts.0.column: early_rise: needs training.steps of 40 or more, which arm",
        ),
        *(
            (
                asking({**CONTRAST, "measure": "log_column", "column": column}),
                f"contrasts.0: column: {column} is 0 in a steady run, and 0 has no log",
            )
            for column in (
                "spikes",
                "spike_score",
                "grad_norm_spikes",
                "grad_norm_spike_score",
                "early_rise",
            )
        ),
        # Margins that decide the answer
        *(
            (
                asking({**CONTRAST, "measure": "failure", **changes}),
                f"contrasts.0: margin: {changes['margin']} must be above -{bound} and "
                f"below {bound}",
            )
            for bound, changes in [
                (1, {"margin": 5}),
                (1, {"margin": 1}),
                (1, {"margin": -1, "claim": "below"}),
                (1, {"margin": 3, "claim": "within"}),
                (2, {"margin": 2, "against": ["post, warm", "post, cold"]}),
            ]
        ),
        (
            asking({**THRESHOLD, "margin": 0.22}, **SEARCH),
            "contrasts.0.margin: 0.22 is below the log of search.ratio, 0.223144",
        ),
        # Seeds outside the contrasts
        ({"context_seeds": 1}, "context_seeds: needs contrasts"),
        (asking(CONTRAST, context_seeds=3), "context_seeds: 3 is above the number of seeds, 2"),
        (
            asking(COLD_WARM, arms={"a": {"cold": {}, "warm": {}}}, context_seeds=1),
            "context_seeds: has no effect, as every cell is in a contrast",
        ),
        # Text and values
        (asking({**CONTRAST, "question": ""}), "contrasts.0.question: is empty"),
        (asking({**CONTRAST, "question": " "}), "contrasts.0.question: is empty"),
        *(
            (
                asking({**CONTRAST, "at": {RATES: values}}),
                f"contrasts.0: at: {RATES}: duplicate value",
            )
            for values in ([0.01, 0.01], [0.001, "1e-3"])
        ),
    ],
)  # fmt: skip
def test_a_comparison_that_could_not_have_an_answer_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    text = message(tmp_path, **changes)
    assert text.startswith(f"{tmp_path / 'mine.yaml'}: {words}")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        asking({**COLD_WARM, "rates": {"cold": 0.01, "warm": 0.3}}, arms=OWN_RATES),
        asking({**CONTRAST, "measure": "failure", "margin": -0.99}),
        asking(
            {
                **CONTRAST,
                "against": ["post, warm", "post, cold"],
                "measure": "failure",
                "claim": "within",
                "margin": 1.5,
            }
        ),
        asking({**CONTRAST, "measure": "failure", "slope": LAYERS, "margin": 1.5}),
        asking({**THRESHOLD, "margin": 0.23}, **SEARCH),
        asking({**THRESHOLD, "margin": 0.1, "slope": LAYERS}, **SEARCH),
        asking({**THRESHOLD, "margin": 0.02}, **{**SEARCH, "search": {"start": 1, "ratio": 1.01}}),
        asking({**CONTRAST, "slope": LAYERS}, exclude=[{"arm": "pre, cold", RATES: 0.1}]),
        asking({**CONTRAST, "measure": "log_lr50"}, exclude=[{"arm": "pre, cold", RATES: 0.1}]),
        asking({**COLUMN, "column": "max_stream_rms"}, options={"diagnostics.every": 2}),
        asking({**COLUMN, "column": "max_sharpness"},
               options={"diagnostics.every": 2, "diagnostics.sharpness": 1}),
        asking({**COLUMN, "column": "early_rise"}, options={"training.steps": 40}),
        asking({**CONTRAST, "measure": "log_column", "column": "max_grad_norm"}),
        asking(CONTRAST, context_seeds=2),
        asking(CONTRAST, exclude=[{"arm": "pre, cold", "seed": 0}]),
        {"pairs": [["cold", "warm"]], "arms": {"a": {"cold": {}, "warm": {RATES: [0.01, 0.5]}}}},
    ],
)  # fmt: skip
def test_one_that_could_is_not(tmp_path: Path, changes: dict[str, Any]):
    assert cells(tmp_path, **changes)


def test_a_flag_for_fewer_seeds_lowers_those_of_the_context(tmp_path: Path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**TREE, **asking(CONTRAST, seeds=3, context_seeds=2)}))
    found, _ = load(path, seeds="1")
    assert (found.seeds, found.context_seeds) == ((0,), 1)


def test_shared_points_have_every_common_seed_of_every_arm():
    def runs(*keys: tuple[int, str, float]) -> dict[tuple[int, Point], None]:
        return {(seed, (setting, rate)): None for seed, setting, rate in keys}

    a = runs((0, "x", 0.1), (1, "x", 0.1), (2, "x", 0.1), (0, "x", 0.2), (1, "x", 0.2))
    b = runs((2, "x", 0.1), (1, "x", 0.1), (2, "x", 0.2), (1, "y", 0.1), (2, "y", 0.1))
    assert shared_points({"a": a, "b": b}) == ([1, 2], [("x", 0.1)])
    assert shared_points({"a": a, "b": runs((1, "x", 0.3))}) == ([], [])
    assert shared_points({"a": a, "b": runs((3, "x", 0.1))}) == ([], [])
    assert shared_points({"a": a, "b": {}}) == ([], [])
    half = runs((0, "x", 0.1), (1, "x", 0.1), (2, "x", 0.1), (0, "x", 0.2), (1, "x", 0.2))
    assert shared_points({"a": half, "b": half}) == ([0, 1], [("x", 0.1), ("x", 0.2)])


def test_a_seed_at_one_rate_alone_leaves_the_other_seeds_their_answer(tmp_path: Path):
    """Seed 0 lacks one rate, seed 1 the other: neither is a point of all seeds."""
    exclude = [{"seed": 0, RATES: 0.01}, {"seed": 1, RATES: 0.1}]
    rates = {RATES: [0.01, 0.1]}
    assert cells(tmp_path, **asking(CONTRAST, grid=rates, seeds=8, exclude=exclude))


def test_many_comparisons_of_many_cells_are_checked_quickly(tmp_path: Path):
    arms = {"f": {f"a{n}": {} for n in range(40)}}
    pairs = list(itertools.combinations(arms["f"], 2))
    contrasts = [{"question": "?", "of": pair, "at": {RATES: [0.01, 0.02]}} for pair in pairs[:20]]
    axis = {RATES: [0.01 * n for n in range(1, 26)]}
    tree = {"base": {}, "arms": arms, "grid": axis, "seeds": 4}
    path = tmp_path / "large.yaml"
    path.write_text(json.dumps(tree))

    def seconds() -> float:
        began = time.process_time()
        assert len(load(path)[1]) == 4_000
        return time.process_time() - began

    plain = seconds()
    path.write_text(json.dumps({**tree, "contrasts": contrasts, "pairs": pairs}))
    assert seconds() < 3 * plain + 1


# ---------------------------------------------------------------------------------------------
# Cells


def test_cells_outside_every_contrast_have_the_first_seeds_only(tmp_path: Path):
    contrast = {**CONTRAST, "at": {"optimizer.learning_rate": [0.01]}}
    found = cells(tmp_path, seeds=[5, 6, 7], context_seeds=2, contrasts=[contrast])
    seeds: dict[tuple[str, float], set[int]] = {}
    for cell in found:
        key = (cell.arm, cell.config.optimizer.learning_rate)
        seeds.setdefault(key, set()).add(cell.config.seed)
    for (arm, rate), own in seeds.items():
        compared = rate == 0.01 and arm in CONTRAST["of"]
        assert own == ({5, 6, 7} if compared else {5, 6})
    assert len(found) == 2 * 2 * 3 * 2 * 2 + 2 * 2


@pytest.mark.parametrize("key", ["seed", "optimizer.learning_rate", "model.norm.placement"])
def test_options_that_cells_differ_in_are_not_flags(tmp_path: Path, key: str):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TREE))
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = {name: 1}
    for part in reversed(section.split(".") if section else []):
        tree = {part: tree}
    with pytest.raises(InputError, match=f"--{key}: the cells of"):
        load(path, tree)


def test_long_names_are_cut_and_stay_apart(tmp_path: Path):
    arms = {f"factor {n}": {f"level {'x' * 30} {n}": {}} for n in range(3)}
    found = cells(tmp_path, arms=arms)
    assert all(len(cell.id) <= 100 for cell in found)
    assert len({cell.id for cell in found}) == len(found)


def test_names_in_any_script_stay_apart(tmp_path: Path):
    found = cells(tmp_path, arms={"norm": {"前": {}, "後": {}, "$\\alpha$": {}}})
    assert len({cell.id for cell in found}) == len(found) == 3 * 6 * 2
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cell.id) for cell in found)


def test_on_and_off_may_be_excluded_as_yaml_reads_them(tmp_path: Path):
    found = cells(tmp_path, exclude=[{"model.norm.final_norm": False}])
    assert {cell.config.model.norm.final_norm for cell in found} == {"on"}


def test_flags_override_the_files_options(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TREE))
    _, found = load(path, {"training": {"steps": "9"}})
    assert {cell.config.training.steps for cell in found} == {9}


def test_rates_of_an_arms_own_count_towards_the_limit(tmp_path: Path):
    many = [0.001 * n for n in range(1, 3000)]
    arms = {"a": {"x": {"optimizer.learning_rate": many}}}
    assert "11,996 cells" in message(tmp_path, arms=arms)


# ---------------------------------------------------------------------------------------------
# The shipped ones


def test_the_documented_grids_are_shipped():
    assert {path.stem for path in GRIDS.glob("*.yaml")} == {
        "quick",
        "placements",
        "depth",
        "norms",
        "remedies",
        "thresholds",
        "single-gpu",
        "gpu-day",
        "hundred-layers",
    }
    documented = (ROOT / "docs/results/literature/README.md").read_text("utf-8")
    for path in LITERATURE:
        assert f"(../../../configs/compare/literature/{path.name})" in documented


def test_the_grids_of_published_reports_can_be_read():
    published = (ROOT / "docs").rglob("grid.yaml")
    current = [path for path in published if "\ncontrasts:" in path.read_text("utf-8")]
    assert len(current) > 5  # not those of earlier versions
    for path in current:
        assert load(path)[1]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_is_fair(path: Path):
    grid, found = load(path)
    assert grid.contrasts
    assert len(grid.seeds) >= 3
    for cell in found:  # nothing hides instability unless that is what is compared
        assert cell.config.optimizer.clip is None or cell.arm == "clipping"
        decay = cell.config.optimizer
        assert decay.weight_decay == 0 or decay.independent_decay
        assert cell.config.evaluation.give_up_after is None
        assert cell.config.sampling.tokens == 0
    schema = "schema.json" if path.parent == GRIDS else "../schema.json"
    assert path.read_text("utf-8").startswith(f"# yaml-language-server: $schema={schema}\n")


@pytest.mark.parametrize("path", LITERATURE, ids=lambda path: path.stem)
def test_the_literature_is_tested_on_eight_seeds_that_no_other_grid_has(path: Path):
    grid, found = load(path)
    for contrast in grid.contrasts:
        cells = [cell for cell in found if contrast.includes(cell)]
        for arm in contrast.arms:
            assert {cell.config.seed for cell in cells if cell.arm == arm} == set(grid.seeds)
    assert len(grid.seeds) == 8
    for other in set(SHIPPED) - {path}:
        assert not set(grid.seeds) & set(load(other)[0].seeds), other.stem


def test_quick_registers_four_questions_that_eight_seeds_can_settle():
    grid, found = load(ROOT / "configs/compare/quick.yaml")
    assert [arm.name for arm in grid.all_arms()] == [
        "pre, no warm-up",
        "pre, warm-up",
        "post, no warm-up",
        "post, warm-up",
    ]
    assert len({cell.config.optimizer.learning_rate for cell in found}) >= 4
    assert [contrast.measure for contrast in grid.contrasts] == ["loss"] * 4
    for contrast in grid.contrasts:
        seeds = {arm: set() for arm in contrast.arms}  # type: dict[str, set[int]]
        for cell in filter(contrast.includes, found):
            seeds[cell.arm].add(cell.config.seed)
        assert all(len(each) == 8 for each in seeds.values())


def test_the_placements_grid_has_all_placements():
    _, found = load(ROOT / "configs/compare/placements.yaml")
    assert {cell.config.model.norm.placement for cell in found} == set(PLACEMENTS)


def test_the_depth_grid_has_its_depths():
    _, found = load(ROOT / "configs/compare/depth.yaml")
    assert {cell.config.model.layers for cell in found} == {3, 6, 9, 12}


def test_the_single_gpu_grid_has_the_documented_size():
    _, found = load(ROOT / "configs/compare/single-gpu.yaml")
    model = found[0].config.model
    assert (model.layers, model.width, model.context) == (12, 256, 256)
    assert found[0].config.training.steps == 1000
    assert len(found) == 180


def test_a_grid_is_documented_and_its_schema_is_current():
    for section in (Grid, Contrast):
        assert all(info.description for info in section.model_fields.values())
    shipped = (ROOT / "configs/compare/schema.json").read_text("utf-8")
    assert shipped == schema(), "python -m gpt.compare.grid > configs/compare/schema.json"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((f"a{c}b", "cannot be shown") for c in "\x1b\x00\x9b\uffff\u202e\u200b\u2028\n\t"),
        ("a\udcffb", "a\\udcffb' is not Unicode text"),
        *((name, "must have no comma, and no space") for name in (" ", "", "\u3000", "a ", "a,b")),
        ("x" * 41, "at most 40 characters"),
        *(
            (name, "not a valid file name on Windows")
            for name in ("con", "NUL", "aux.x", "com1.txt")
        ),
    ],
)
def test_names_that_a_report_cannot_show_are_refused(tmp_path: Path, name: str, words: str):
    for arms in ({"f": {name: {}, "b": {}}}, {name: {"a": {}, "b": {}}}):
        found = message(tmp_path, arms=arms, contrasts=[], pairs=[], exclude=[])
        assert words in found
        assert "arms" in found


@pytest.mark.parametrize(("one", "two"), [("A", "a"), ("a b", "a-b")])
def test_names_that_give_the_same_directory_are_refused(tmp_path: Path, one: str, two: str):
    arms = {"f": {one: {}, two: {}}}
    found = message(tmp_path, arms=arms, contrasts=[], pairs=[], exclude=[])
    assert f"rename {one!r} or {two!r}" in found


def test_arms_are_counted_before_they_are_built(tmp_path: Path):
    began = time.process_time()
    arms = {f"f{n}": {"a": {}, "b": {}} for n in range(24)}
    text = message(tmp_path, arms=arms, contrasts=[], pairs=[], exclude=[])
    assert "arms: 16,777,216 combinations of levels; at most 10,000 are allowed" in text
    axes = {"optimizer.learning_rate": [1e-6 * n for n in range(1, 200)]}
    axes |= {"model.layers": list(range(1, 200))}
    assert "describes" in message(tmp_path, grid=axes, exclude=[])
    assert time.process_time() - began < 2


def test_a_batch_size_in_a_grid_replaces_the_base_s_in_the_other_unit(tmp_path: Path):
    base = {"training": {"batch_sequences": 6}, "model": {"context": 64}}
    plain: dict[str, Any] = {"contrasts": [], "pairs": [], "exclude": [], "seeds": 1, "grid": {}}
    in_tokens = {"training.batch_tokens": 128}
    for changes in (
        {"options": in_tokens},
        {"options": {"training": {"batch_tokens": 128}}},
        {"arms": {"batch": {"small": in_tokens}}},
        {"grid": {"training.batch_tokens": [128]}},
    ):
        arms = {"arms": {"batch": {"a": {}}}}
        (cell,) = cells(tmp_path, base=base, **{**plain, **arms, **changes})
        assert cell.config.batch_sequences == 2
    cells(tmp_path, base=base, **plain)
    _, found = load(tmp_path / "mine.yaml", {"training": {"batch_tokens": "64"}})
    assert {cell.config.batch_sequences for cell in found} == {1}


def test_lists_whose_cost_multiplies_are_bounded(tmp_path: Path):
    assert "at most 200 items" in message(tmp_path, exclude=[{"seed": n} for n in range(201)])
    pairs = [["pre, cold", f"{n}"] for n in range(1001)]
    assert "at most 1000 items" in message(tmp_path, pairs=pairs)
    (tmp_path / "base.yaml").write_text(f"data: {{source: text, path: {'a' * 90_000}}}")
    both = message(tmp_path, base="base.yaml", options={"sampling.prompt": "b" * 60_000})
    assert "is longer than 131,072 bytes including its base" in both


def test_a_large_grid_is_read_in_linear_time_and_written_and_read_back(tmp_path: Path):
    path = tmp_path / "large.yaml"
    arms = {f"f{n}": {"a": {}, "b": {}} for n in range(10)}
    path.write_text(yaml.safe_dump({"base": {}, "arms": arms, "seeds": 1}))
    began = time.process_time()
    grid, cells = load(path)
    assert len(cells) == 1024
    assert time.process_time() - began < 4
    path.write_text(grid.to_yaml())
    assert load(path)[0] == grid


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"title": "a\x1b"}, "title: "),
        ({"title": "x" * 201}, "title: "),
        ({"contrasts": [{"question": "a\nb", "of": ["a", "b"]}]}, "contrasts.0"),
        ({"grid": {"sampling.prompt": ["x\uffff"]}}, "grid: sampling.prompt: "),
        ({"grid": {"sampling.prompt": ["x" * 101]}}, "grid: sampling.prompt: "),
    ],
)
def test_text_that_a_figure_cannot_show_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    plain = {"arms": {"f": {"a": {}, "b": {}}}, "contrasts": [], "pairs": [], "exclude": []}
    assert words in message(tmp_path, **plain | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"model": 5}}, "model: must be a mapping of options, found 5"),
        ({"base": {"model": {"norm": [1]}}}, "model.norm: must be a mapping of options, found"),
        ({"options": {"model": 5}}, "options: model: no such option"),
        ({"arms": {"a": {"x": {"model": 5}}}}, "arms.a.x: model: no such option"),
        ({"grid": {"model": [5]}}, "grid: model: no such option"),
        ({"arms": {"a": {}}}, "arms.a: must have at least 1 item, found {}"),
    ],
)
def test_a_value_where_a_section_belongs_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    assert words in message(tmp_path, **{"contrasts": [], "pairs": [], "exclude": [], **changes})


@pytest.mark.parametrize("digits", [30, 95])
def test_numbers_of_many_digits_in_an_axis_and_an_exclusion(tmp_path: Path, digits: int):
    path = tmp_path / "mine.yaml"
    many = "9" * digits
    tree = f"base: {{}}\narms: {{a: {{x: {{}}}}}}\nseeds: 1\ngrid: {{model.layers: [{many}]}}\n"
    path.write_text(tree)
    with pytest.raises(
        InputError, match=r"model.layers: '?9+(\.\.\.)?'? is not between 1 and 2,000"
    ):
        load(path)
    path.write_text(f"{tree}exclude: [{{model.layers: {many}}}]")
    with pytest.raises(InputError, match="exclude leaves no cell"):
        load(path)


def test_cells_too_large_for_the_machine_are_refused_with_their_arm(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    big = {"model.layers": 2_000, "model.width": 20_000, "model.heads": 1}
    tree = {"base": {}, "options": {"training.device": "cpu"}, "arms": {"a": {"x": {}, "y": big}}}
    path.write_text(yaml.safe_dump(tree))
    _, cells = load(path)
    with pytest.raises(
        InputError, match=r"arm 'y': training model.layers: 2,000, .* GB are available"
    ):
        check_sizes(cells)
