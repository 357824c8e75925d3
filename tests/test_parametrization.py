"""muP: what scales with the width, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, rendering
from pydantic import ValidationError

from gpt import cli, coordinates
from gpt.compare import grid as grids
from gpt.config import Config, ModelConfig, OptimizerConfig, merge, validate
from gpt.data.preparation import prepare
from gpt.ensemble import BatchedTrainer
from gpt.errors import InputError
from gpt.model.gpt2 import GPT
from gpt.model.init import REGIMES, initialize
from gpt.model.parametrization import HIDDEN_RATES, RULES, kind_of
from gpt.model.placement import PLACEMENTS
from gpt.optim import Optimizer
from gpt.trainer import Trainer

Make = Callable[..., Config]
BASE, WIDE = 32, 256
M = WIDE / BASE
VOCAB = 600


def make(width: int = WIDE, mup: bool = True, **options: Any) -> GPT:
    shape = {"layers": 2, "heads": 4, "width": width, "context": 64}
    if mup:
        shape |= {"parametrization": "mup", "mup_base_width": BASE}
    model = GPT(ModelConfig.model_validate({**shape, **options}), VOCAB)
    initialize(model, model.config, seed=0)
    return model


def mup(base: int, **options: Any) -> dict[str, Any]:
    return {"parametrization": "mup", "mup_base_width": base, **options}


# -- Initial weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_hidden_matrices_shrink_with_the_root_of_the_width_and_others_do_not(regime: str):
    """Each matrix has the standard deviation of the base network, hidden ones divided by √m."""
    options = {"tied_head": False, "init": {"regime": regime}}
    model, base = make(**options), make(BASE, mup=False, **options)
    narrow = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            ratio = parameter.std().item() / narrow[name].std().item()
            expected = M**-0.5 if name.startswith("blocks.") else 1.0
            assert ratio == pytest.approx(expected, rel=0.05), name


def test_xaviers_hidden_matrices_need_no_change():
    """Their variance, 2 / (n_in + n_out), falls with 1 / width by itself."""
    init = {"init": {"regime": "xavier"}}
    scaled, standard = dict(make(**init).named_parameters()), make(mup=False, **init)
    for name, parameter in standard.named_parameters():
        torch.testing.assert_close(scaled[name], parameter, rtol=1e-6, atol=0)


# -- Logits ------------------------------------------------------------------------------------


def test_attention_logits_are_divided_by_the_heads_width():
    """q k^T / (d/h), times the root of the base network's d/h; computed in float64."""
    model = make().double()
    attention = model.attentions()[0]
    x = torch.randn(2, 9, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = [
        (x @ part.T + bias).unflatten(-1, (4, -1)).transpose(1, 2)
        for part, bias in zip(
            attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True
        )
    ]
    expected = heads[0] @ heads[1].mT / (WIDE / 4) * math.sqrt(BASE / 4)
    q, k, v = attention.project(x)
    torch.testing.assert_close(attention.scores(q, k), expected)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = expected.masked_fill(mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention.attend(q, k, v), weights @ heads[2])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("regime", "at_base"), [("gpt2", 1.0), ("xavier", BASE**-0.5), ("small", BASE**-0.5)]
)
def test_output_logits_are_divided_by_the_width(tied: bool, regime: str, at_base: float):
    model = make(tied_head=tied, init={"regime": regime})
    x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(0))
    matrix = model.token_embedding.weight if tied else model.head.weight
    expected = x @ matrix.T * (at_base if tied else 1.0) / M
    torch.testing.assert_close(model.logits(x), expected)


# -- Learning rates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exponent"), [("adamw", -1.0), ("radam", -1.0), ("muon", -0.5), ("sgd", 0.0)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_only_hidden_matrices_have_another_learning_rate(name: str, exponent: float, tied: bool):
    model = make(tied_head=tied, norm={"placement": "dlcl"})
    config = OptimizerConfig.model_validate({"name": name, "learning_rate": 0.3})
    optimizer = Optimizer(model.named_parameters(), config, model.m)
    optimizer.step(0.5)
    rates = optimizer.by_parameter("lr")
    for key, parameter in model.named_parameters():
        hidden = key.startswith("blocks.") and parameter.ndim == 2
        assert rates[key] == pytest.approx(0.15 * (M**exponent if hidden else 1.0)), key


@pytest.mark.parametrize("name", HIDDEN_RATES)
@pytest.mark.parametrize("independent", [False, True])
def test_a_step_decays_the_same_fraction_at_every_width(name: str, independent: bool):
    """With zero gradients, a matrix loses rate · decay, or only decay if it is independent."""
    config = OptimizerConfig(
        name=name, learning_rate=0.02, weight_decay=0.01, independent_decay=independent
    )
    model = make()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(model.named_parameters(), config, model.m).step(0.5)
    kept = 1 - 0.5 * 0.01 * (1.0 if independent else 0.02)
    for key, parameter in model.named_parameters():
        factor = kept if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor, rtol=1e-6, atol=0)


def test_every_parameter_has_a_kind():
    for placement in PLACEMENTS:
        kinds = {
            name: kind_of(name, parameter.ndim)
            for name, parameter in make(
                BASE, layers=4, tied_head=False, norm={"placement": placement}
            ).named_parameters()
        }
        assert set(kinds.values()) == set(RULES)
        assert {n for n, kind in kinds.items() if kind == "head"} == {"head.weight"}
        embeddings = {n for n, kind in kinds.items() if kind == "embedding"}
        assert embeddings == {"token_embedding.weight", "position_embedding.weight"}


# -- Against the standard parametrization ------------------------------------------------------


def trained(config: Config, steps: int = 3) -> Trainer:
    trainer = Trainer(config, VOCAB, torch.device("cpu"))
    trainer.reset()
    for step in range(1, steps + 1):
        trainer.update(0.7, *trainer.backward(step, *batch(config, step)))
    return trainer


def batch(config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(VOCAB, (4, config.model.context + 1), generator=generator)
    return x[:, :-1], x[:, 1:]


@pytest.mark.parametrize("name", HIDDEN_RATES)
@pytest.mark.parametrize("regime", REGIMES)
def test_at_the_base_width_it_is_the_standard_parametrization_bit_for_bit(
    tiny: Make, name: str, regime: str
):
    common = {"optimizer": {"name": name}}
    for tied in (True, False):
        model = {"tied_head": tied, "init": {"regime": regime}}
        standard = trained(tiny(model=model, **common))
        scaled = trained(tiny(model=mup(16, **model), **common))
        weights = dict(standard.model.named_parameters())
        for key, parameter in scaled.model.named_parameters():
            assert torch.equal(parameter, weights[key]), key
        x, _ = batch(standard.config, 0)
        assert torch.equal(standard.model(x), scaled.model(x))


def test_cells_of_a_batch_train_as_they_do_alone(tiny: Make):
    configs = [
        tiny(model=mup(4), seed=seed, optimizer={"learning_rate": rate, "weight_decay": 0.3})
        for seed, rate in [(0, 1e-2), (1, 3e-3)]
    ]
    alone = [trained(config) for config in configs]
    together = [trained(config, steps=0) for config in configs]
    batched = BatchedTrainer(together)
    for step in (1, 2, 3):
        x, y = batch(configs[0], step)
        batched.update([0.7, 0.7], *batched.backward(torch.stack([x, x]), torch.stack([y, y])))
    for one, cell in zip(alone, together, strict=True):
        weights = dict(cell.model.named_parameters())
        for key, parameter in one.model.named_parameters():
            torch.testing.assert_close(weights[key], parameter, rtol=1e-4, atol=1e-5)


# -- Config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parametrization": "mup"}, "parametrization: mup needs mup_base_width"),
        ({"mup_base_width": 8}, r"mup_base_width \(8\) has no effect"),
        (mup(9), r"heads \(2\) must divide mup_base_width \(9\)"),
        (mup(8, norm={"type": "scale"}), "norm.type scale conflicts with parametrization mup"),
    ],
)
def test_combinations_without_a_rule_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"heads": 2, "width": 16, **options})


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_optimizers_without_a_rule_are_refused(tiny: Make, name: str):
    with pytest.raises(InputError, match=f"optimizer.name {name} conflicts with .*adamw, radam"):
        tiny(model=mup(8), optimizer={"name": name})


# -- The coordinate check ----------------------------------------------------------------------


@pytest.fixture
def narrow(tiny: Make) -> Make:
    """Networks of two blocks that see 8 sequences of 16 tokens."""

    def make(**model: Any) -> Config:
        return tiny(
            model={"width": 32, **model},
            training={"batch_sequences": 8},
            optimizer={"learning_rate": 2e-3, "clip": None},
        )

    return make


def slopes(config: Config) -> dict[str, float]:
    found = coordinates.check(config, prepare(config.data), [32, 64, 128, 256], steps=3, seeds=2)
    return {change.name: change.slope for change in found}


def test_changes_grow_with_the_width_but_not_in_mup(narrow: Make):
    standard, scaled = slopes(narrow()), slopes(narrow(**mup(32)))
    for name in ("output logits", "stream after block 1", "stream after block 2"):
        assert standard[name] > 0.6, name
        assert abs(scaled[name]) < 0.25, name
    for slope in (standard["embeddings"], scaled["embeddings"]):
        assert abs(slope) < 0.25
    assert max(scaled.values()) < 0.5


def test_a_change_is_the_rms_of_the_difference(narrow: Make):
    """Against a second computation, for one seed, of two activations."""
    config = narrow()
    dataset = prepare(config.data)
    found = {c.name: c.rms for c in coordinates.check(config, dataset, [32, 64], steps=1, seeds=1)}
    trainer = Trainer(config, dataset.encoding.n_vocab, torch.device("cpu"))
    trainer.reset()
    ids = coordinates.TrainingSequences(dataset.train, 16, 0).batch(1, 8)
    x, y = (torch.from_numpy(part.copy()) for part in ids)
    with torch.no_grad():
        before = trainer.model(x), trainer.model.blocks[0](trainer.model.embed(x))
    trainer.update(1.0, *trainer.backward(1, x, y))
    with torch.no_grad():
        after = trainer.model(x), trainer.model.blocks[0](trainer.model.embed(x))
    rms = [
        (new - old).square().mean().sqrt().item() for new, old in zip(after, before, strict=True)
    ]
    assert [found[n][0] for n in ("output logits", "stream after block 1")] == pytest.approx(rms)


def change(name: str, slope: float) -> coordinates.Change:
    return coordinates.Change(name, (1.0, 2.0**slope), slope)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ([0.9, -0.1], "grows with the width; worst slope +0.90 (a)"),
        ([0.6, -0.9], "grows with the width; worst slope +0.60 (a)"),
        ([0.1, -0.8], "declines with the width; worst slope -0.80 (b)"),
        ([0.1, -0.55], "looks independent of the width; worst slope -0.55 (b)"),
        ([0.1, -0.3], "looks independent of the width; worst slope -0.30 (b)"),
        ([0.3, 0.2], "looks independent of the width; worst slope +0.30 (a)"),
    ],
)
def test_the_verdict(slopes: list[float], expected: str):
    assert coordinates.verdict(list(map(change, "ab", slopes))) == expected


def test_the_command(tmp_path: Path, narrow: Make, capsys: pytest.CaptureFixture[str]):
    file, out = tmp_path / "narrow.yaml", tmp_path / "check.png"
    file.write_text(narrow(**mup(32)).to_yaml())
    words = [str(file), "--widths", "16,32", "--steps", "2", "--seeds", "1", "--out", str(out)]
    with rendering():
        assert cli.run("coordcheck", words) == 0
    printed = capsys.readouterr().out
    assert "output logits" in printed
    assert "the change looks independent of the width" in printed or "with the width" in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as end:
        cli.run("coordcheck", words)
    assert end.value.code == 2
    assert "check.png exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "32"], "--widths: needs at least two widths"),
        (["--widths", "32,32"], "--widths: needs at least two widths"),
        (["--widths", "32,x"], "--widths"),
        (["--widths", "32,33"], "heads (2) must divide width (33)"),
    ],
)
def test_bad_widths(
    tmp_path: Path,
    narrow: Make,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "narrow.yaml"
    file.write_text(narrow().to_yaml())
    with pytest.raises(SystemExit) as end:
        cli.run("coordcheck", [str(file), *words, "--out", str(tmp_path / "check.png")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 3


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path,
    tiny_file: Path,
    folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(coordinates, "check", None)
    with pytest.raises(SystemExit) as end:
        cli.run("coordcheck", [str(tiny_file), "--out", str(tmp_path / folder / "check.png")])
    assert end.value.code == 2
    assert f"--out: {tmp_path / folder} is not a folder" in capsys.readouterr().err


def test_radam_needs_an_update_that_is_not_sgds(narrow: Make):
    config = merge(narrow().model_dump(), {"optimizer": {"name": "radam"}})
    config = validate(Config, config)
    dataset = prepare(config.data)
    with pytest.raises(InputError, match=r"--steps: .* use at least 6"):
        coordinates.check(config, dataset, [16, 32], steps=5, seeds=1)
    assert coordinates.check(config, dataset, [16, 32], steps=6, seeds=1)


def test_the_scale_of_the_schedule_counts_and_the_micro_batch_does_not(narrow: Make):
    def rms(**options: Any) -> list[float]:
        config = validate(Config, merge(narrow().model_dump(), options))
        (found,) = (
            c.rms
            for c in coordinates.check(config, prepare(config.data), [16, 32], steps=1, seeds=1)
            if c.name == "embeddings"
        )
        return list(found)

    whole = rms()
    assert rms(training={"micro_batch": 2}) == pytest.approx(whole, rel=1e-3)
    half = rms(schedule={"scale": 0.5}, optimizer={"weight_decay": 0})
    assert half == pytest.approx([x / 2 for x in rms(optimizer={"weight_decay": 0})], rel=1e-3)


def test_a_change_of_zero_has_no_slope(narrow: Make):
    config = narrow()
    with pytest.raises(InputError, match=r"change of embeddings is 0 at width 32 .* no slope"):
        coordinates.check(config, prepare(config.data), [32, 64], steps=0, seeds=1)


# -- The shipped grid --------------------------------------------------------------------------


def test_the_grid_asks_both_questions_of_eight_seeds_at_the_largest_width():
    grid, found = grids.load(ROOT / "configs/compare/literature/mup.yaml")
    assert {cell.config.model.width for cell in found} == {32, 64, 128, 256}
    assert {cell.config.model.mup_base_width for cell in found} == {None, 32}
    assert [contrast.at["model.width"] for contrast in grid.contrasts] == [[256], [256]]
    for contrast in grid.contrasts:
        for arm in contrast.arms:
            own = [cell for cell in found if contrast.includes(cell) and cell.arm == arm]
            assert {cell.config.seed for cell in own} == set(grid.seeds)
            assert len(own) == len(grid.seeds) == 8
