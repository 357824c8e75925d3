from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rendering
from matplotlib.figure import Figure
from torch import nn

from gpt import cli, metrics
from gpt.config import Config, ModelConfig, OptimizerConfig
from gpt.diagnostics.failure import advice, describe_location, first_nonfinite
from gpt.diagnostics.fault import FaultLocation
from gpt.diagnostics.layers import MEASURES, LayerStats, layer_of
from gpt.model.gpt2 import GPT
from gpt.model.init import initialize
from gpt.model.placement import PLACEMENTS
from gpt.optim import Optimizer
from gpt.run import layer_plot
from gpt.run.directory import RunDirectory, RunResult
from gpt.training import train

Make = Callable[..., Config]
VOCAB, LAYERS, CONTEXT = 31, 4, 12


def make(placement: str = "pre", **options: Any) -> GPT:
    shape = {"layers": LAYERS, "heads": 2, "width": 16, "context": CONTEXT}
    tree = {**shape, "norm": {"placement": placement}, **options}
    model = GPT(ModelConfig.model_validate(tree), VOCAB)
    initialize(model, model.config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(seed))


def snapshot(model: GPT, adams: bool = True) -> list[metrics.Record]:
    """The records of one update that halves every matrix of block 2."""
    model.zero_grad()
    model.loss(tokens(), tokens(1)).backward()
    adam = dict(model.named_parameters()) if adams else {}
    moments = {name: torch.ones_like(parameter) for name, parameter in adam.items()}
    stats = LayerStats(model, adam, 1e-8, moments)
    stats.measure_activations(tokens())
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            if parameter.ndim == 2:
                parameter /= 2
    stats.measure_update()
    assert stats.before == {}  # a copy of all matrices is not kept until it is read
    return stats.to_records(step=5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_layer_has_its_measures(placement: str):
    records = snapshot(make(placement))
    assert [record["layer"] for record in records] == list(range(LAYERS + 2))
    assert {record["step"] for record in records} == {5}
    inside = set(MEASURES) - {"log_z"} | {"grad_rms"}
    for record in records[1:-1]:
        assert set(record) == {"step", "layer", *inside}
        assert all(math.isfinite(value) for value in record.values())
        assert record["attention_beta"] > 0
        assert 0 < record["attention_entropy"] < math.log(CONTEXT)
    assert "log_z" in records[-1]
    assert ("grad_norm" in records[-1]) == PLACEMENTS[placement].final_norm


def test_a_placement_that_adds_in_another_way_has_no_beta(monkeypatch: pytest.MonkeyPatch):
    class Plain(PLACEMENTS["none"]):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attention(x) + self.mlp(x)

    monkeypatch.setitem(PLACEMENTS, "plain", Plain)
    record = snapshot(make("plain"))[1]
    assert "attention_beta" not in record
    assert record["stream_rms"] > 0


def test_measures_by_hand():
    model = make()
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    records = snapshot(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.load_state_dict(before)
    model.requires_grad_(False)

    x = model.embed(tokens())
    assert records[0]["stream_rms"] == pytest.approx(x.square().mean().sqrt().item())
    for number, (record, block) in enumerate(zip(records[1:], model.blocks, strict=False), 1):
        own = [g for name, g in gradients.items() if name.startswith(f"blocks.{number - 1}.")]
        squares = sum(g.square().sum().item() for g in own)
        count = sum(g.numel() for g in own)
        assert record["grad_norm"] == pytest.approx(math.sqrt(squares))
        assert record["grad_rms"] == pytest.approx(math.sqrt(squares / count))
        assert record["grad_over_eps"] == pytest.approx(math.sqrt(squares / count) / 1e-8)
        w2 = gradients[f"blocks.{number - 1}.mlp.out.weight"]
        assert record["w2_grad_norm"] == pytest.approx(w2.norm().item())
        assert record["update_ratio"] == pytest.approx(0.5 if number == 2 else 0)

        normed = block.attention_norm(x)
        q, k, _ = block.attention.project(normed)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(CONTEXT, CONTEXT).triu(1).bool(), -torch.inf)
        assert record["attention_logit"] == pytest.approx(scores.max().item())
        weights = scores.softmax(-1)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean().item()
        assert record["attention_entropy"] == pytest.approx(entropy, rel=1e-5)

        branch = block.attention(normed)
        h = x + branch
        assert record["attention_beta"] == pytest.approx((branch.var() / h.var()).item())
        branch = block.mlp(block.mlp_norm(h))
        x = h + branch
        assert record["mlp_beta"] == pytest.approx((branch.var() / x.var()).item())
        assert record["stream_rms"] == pytest.approx(x.square().mean().sqrt().item())
    log_z = model(tokens()).exp().sum(-1).log().mean().item()
    assert records[-1]["log_z"] == pytest.approx(log_z)


def test_the_gradient_is_compared_with_the_root_of_adams_second_moment():
    """Written once more from Adam's definition: v after two updates, without bias."""
    model = make()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(beta2=0.9, eps=1e-8))
    assert optimizer.second_moments() == ({}, 0)
    squares = []
    for seed in (3, 4):
        model.loss(tokens(seed), tokens(1)).backward()
        squares.append({n: p.grad.square().clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    model.loss(tokens(), tokens(1)).backward()
    moments, _ = optimizer.second_moments()
    held = weakref.ref(moments["token_embedding.weight"])
    stats = LayerStats(model, (), 1e-8, moments)
    del moments
    assert held() is None  # a copy of the optimizer's state is not kept until it is read
    ratios = []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.0."):
            v = (0.9 * 0.1 * squares[0][name] + 0.1 * squares[1][name]) / (1 - 0.9**2)
            ratios.append((parameter.grad / (v.sqrt() + 1e-8)).flatten())
    wanted = torch.cat(ratios).square().mean().sqrt().item()
    stats.measure_activations(tokens())
    assert stats.to_records(step=3)[1]["grad_over_root_v"] == pytest.approx(wanted, rel=1e-4)


def test_without_adam_there_is_no_epsilon():
    assert "grad_over_eps" not in snapshot(make(), adams=False)[1]


def test_epsilon_counts_where_adam_updates_and_nowhere_else(tiny: Make, tmp_path: Path):
    """Muon's matrices know no epsilon."""
    options = {"diagnostics": {"every": 20}, "sampling": {"tokens": 0}}
    ratios = {}
    for name in ("muon", "adamw", "sgd"):
        run(tiny(**options, optimizer={"name": name, "eps": 1e-4}), tmp_path / name)
        ratios[name] = [r.get("grad_over_eps") for r in lines(tmp_path / name, layers=True)]
    rms = [r["grad_rms"] for r in lines(tmp_path / "adamw", layers=True)]
    assert ratios["adamw"][:4] == pytest.approx([value / 1e-4 for value in rms[:4]])
    assert ratios["muon"][0] == pytest.approx(ratios["adamw"][0])  # the embeddings are Adam's
    assert ratios["muon"][1] != pytest.approx(ratios["adamw"][1], rel=0.01)
    assert set(ratios["sgd"]) == {None}


def test_as_many_sequences_as_the_config_says(tiny: Make, tmp_path: Path):
    seen = []
    for count in (1, 4):
        run(tiny(diagnostics={"every": 20, "sequences": count}), tmp_path / str(count))
        seen.append(lines(tmp_path / str(count), layers=True)[0]["stream_rms"])
    assert seen[0] != seen[1]


def test_a_snapshot_leaves_no_hook_and_restores_the_mode():
    model = make(dropout=0.5)
    snapshot(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_layer_is_found_by_name():
    model = make(tied_head=False, norm={"embedding": True})
    expected = {"token_embedding.weight": 0, "embedding_norm.weight": 0, "head.weight": LAYERS + 1}
    expected |= {"blocks.0.mlp.up.weight": 1, "blocks.3.attention_norm.bias": 4}
    expected |= {"final_norm.bias": LAYERS + 1}
    names = {name for name, _ in model.named_parameters()}
    assert {name: layer_of(name, model) for name in expected} == expected
    assert set(expected) <= names


# -- In a run ---------------------------------------------------------------------------------


def run(config: Config, out: Path) -> RunResult:
    return train(config, out, quiet=True)


def lines(out: Path, layers: bool) -> list[metrics.Record]:
    timing = {"tokens_per_second", "step_seconds"}
    return [
        {key: value for key, value in record.items() if key not in timing}
        for record in metrics.read(out / "metrics.jsonl")
        if ("layer" in record) == layers
    ]


@pytest.mark.parametrize("norm_type", ["layer", "batch"])
def test_diagnostics_do_not_change_training(tiny: Make, tmp_path: Path, norm_type: str):
    options = {"model": {"dropout": 0.2, "norm": {"type": norm_type}}}
    run(tiny(**options), tmp_path / "off")
    run(tiny(**options, diagnostics={"every": 3}), tmp_path / "on")
    assert lines(tmp_path / "off", layers=False) == lines(tmp_path / "on", layers=False)
    assert lines(tmp_path / "off", layers=True) == []
    seen = lines(tmp_path / "on", layers=True)
    assert [r["step"] for r in seen if r["layer"] == 0] == [1, 3, 6, 9, 12, 15, 18]


def test_a_resumed_run_has_each_snapshot_once(tiny: Make, tmp_path: Path):
    config = tiny(diagnostics={"every": 4})
    run(config, tmp_path / "whole")
    made: list[None] = []
    options = {"on_update": lambda: made.append(None), "stop": lambda: len(made) == 9}
    train(config, tmp_path / "parts", quiet=True, **options)
    run(config, tmp_path / "parts")
    assert lines(tmp_path / "whole", layers=True) == lines(tmp_path / "parts", layers=True)


def test_gradients_near_epsilon_raise_an_alarm(tiny: Make, tmp_path: Path, capsys):
    config = tiny(diagnostics={"every": 5}, optimizer={"eps": 1.0}, sampling={"tokens": 0})
    train(config, tmp_path / "run")
    alarms = [line for line in capsys.readouterr().err.splitlines() if "optimizer.eps" in line]
    assert len(alarms) == 1
    assert alarms[0].startswith("step 1: the gradients of layer 0 have an RMS of ")
    train(tiny(diagnostics={"every": 5}, sampling={"tokens": 0}), tmp_path / "usual")
    assert "optimizer.eps" not in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plot(tiny: Make, tmp_path: Path, capsys, precision: str):
    config = tiny(diagnostics={"every": 5}, training={"precision": precision})
    run(config, tmp_path / "run")
    with rendering():
        assert cli.run("diagnose", [str(tmp_path / "run")]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture == RunDirectory(tmp_path / "run").layers
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_single_snapshot_is_plotted_too():
    records = [{"step": 1, "layer": layer, "grad_norm": 1.0 + layer} for layer in range(3)]
    axes = Figure().subplots()
    layer_plot._plot_measure(axes, records, "grad_norm", MEASURES["grad_norm"])
    (mesh,) = axes.collections
    corners = mesh.get_coordinates()
    assert corners[0, -1, 0] - corners[0, 0, 0] == 1  # as wide as any other
    assert mesh.get_array().tolist() == [[1.0], [2.0], [3.0]]


def test_a_plot_of_a_run_that_failed_at_once(tiny: Make, tmp_path: Path):
    """Some measures have no number at all then."""
    optimizer = {"name": "sgd", "learning_rate": 1e22, "clip": None}
    config = tiny(diagnostics={"every": 1}, optimizer=optimizer, schedule={"warmup": "none"})
    assert run(config, tmp_path / "run").status == "diverged"
    assert any(r["grad_norm"] is None for r in lines(tmp_path / "run", layers=True)[4:])
    with rendering():
        assert cli.run("diagnose", [str(tmp_path / "run")]) == 0


def test_a_plot_of_nothing_is_rejected(tiny: Make, tmp_path: Path, capsys):
    run(tiny(), tmp_path / "run")
    for folder, words in ((tmp_path / "run", "--diagnostics.every"), (tmp_path, "is not a run")):
        with pytest.raises(SystemExit) as caught:
            cli.run("diagnose", [str(folder)])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


# -- Divergence -------------------------------------------------------------------------------


def test_a_non_finite_weight_is_found_first():
    model = make()
    with torch.no_grad():
        model.blocks[2].mlp.up.weight[3, 3] = math.inf
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place == FaultLocation("weight", 3, "blocks.2.mlp.up.weight")
    assert (
        describe_location(place, LAYERS) == "as a non-finite weight in block 3 of 4 (mlp.up.weight)"
    )


@pytest.mark.parametrize("name", ["token_embedding", "blocks.1.attention.qkv", "final_norm"])
def test_a_non_finite_activation_is_found_where_it_arises(name: str):
    model = make()

    def corrupt(module: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        return out.clone().index_fill_(-1, torch.tensor([2]), math.nan)

    module = model.get_submodule(name)
    module.register_forward_hook(corrupt)
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place == FaultLocation("activation", layer_of(name, model), name)


def test_attention_that_overflows_is_found_at_the_matrix_that_reads_it():
    """A placement without norms has no modules for them."""
    model = make(norm={"type": "none"})
    with torch.no_grad():
        qkv = model.blocks[0].attention.qkv
        qkv.weight[:32] = 1e20  # q k^T is infinite, and its softmax not a number
        qkv.bias[:32] = 0
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place == FaultLocation("activation", 1, "blocks.0.attention.out")


def test_overflowing_logits_are_located_in_the_head():
    model = make(tied_head=False)
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place == FaultLocation("logit", LAYERS + 1, "head")
    assert describe_location(place, LAYERS) == "as a non-finite logit after the last block (head)"


def test_a_gradient_is_found_from_the_loss_backwards():
    model = make()

    def corrupt(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan

    add = model.blocks[1].add
    add.register_forward_hook(lambda module, inputs, out: out.register_hook(corrupt) and None)
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place is not None
    assert (place.quantity, place.layer) == ("gradient", 2)


def test_the_gradient_that_came_first_is_named():
    """A NaN in the gradient of a matrix's output reaches the gradient of that matrix first."""
    model = make()
    up = model.blocks[1].mlp.up
    up.register_forward_hook(
        lambda module, inputs, out: out.register_hook(lambda g: g * math.nan) and None
    )
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place is not None
    assert place.quantity == "gradient"
    assert place.name in ("blocks.1.mlp.up.weight", "blocks.1.mlp.up.bias")


def test_a_norm_that_overflows_where_no_gradient_does():
    model = make()
    big = model.blocks[2].mlp.out
    big.register_forward_hook(
        lambda module, inputs, out: out.register_hook(lambda g: g * 1e25) and None
    )
    place = first_nonfinite(model, tokens(), tokens(1), 0.0)
    assert place is not None
    assert (place.quantity, place.layer) == ("gradient norm", 3)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_draws_a_single_mask():
    model = make(dropout=0.5)
    masks = []
    model.final_norm.register_forward_hook(lambda module, inputs, out: masks.append(out))
    assert first_nonfinite(model, tokens(), tokens(1), 0.0) is None
    assert len(masks) == 1


def test_values_that_arise_between_modules_are_located_in_the_block():
    place = FaultLocation("activation", 2, "blocks.1")
    assert describe_location(place, 4) == "as a non-finite activation in block 2 of 4"


def test_nothing_is_found_if_everything_is_finite():
    assert first_nonfinite(make(), tokens(), tokens(1), 1e-4) is None


WILD = {
    "model": {"norm": {"placement": "none"}, "init": {"regime": "xavier"}},
    "optimizer": {"name": "sgd", "momentum": 0.0, "clip": None},
    "schedule": {"warmup": "linear", "warmup_steps": 20},
    "sampling": {"tokens": 0},
}


def wild(tiny: Make, rate: float, **options: Any) -> Config:
    optimizer = {**WILD["optimizer"], "learning_rate": rate}
    return tiny(**{**WILD, "optimizer": optimizer, **options})


@pytest.mark.parametrize("read_every", [{"cpu": 1}, {}])
def test_a_diverged_run_reports_what_where_and_what_next(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_every: dict[str, int]
):
    """Also after a checkpoint, and where losses are read late, as from a GPU."""
    monkeypatch.setattr("gpt.run.log.READ_EVERY", read_every)
    config = wild(tiny, 10.0, checkpoint={"every": 2}, training={"log_every": 5})
    result = run(config, tmp_path / "run")
    assert result.status == "diverged"
    failure = result.failure
    assert failure is not None
    assert failure.step == result.step > 2
    assert failure.quantity in ("training loss", "gradient norm")
    assert failure.place is not None
    assert failure.place.quantity in ("activation", "gradient", "logit", "loss")
    assert f"step {failure.step}, first as a non-finite {failure.place.quantity}" in result.reason
    assert failure.advice[0].startswith("--model.norm.placement pre ")
    saved = json.loads((tmp_path / "run/result.json").read_text())
    assert saved["failure"]["place"]["name"] == failure.place.name
    assert train(config, tmp_path / "run", quiet=True).failure == failure  # read back


def test_both_ways_of_reading_find_the_same(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = wild(tiny, 10.0, training={"log_every": 7})
    first = run(config, tmp_path / "each")
    monkeypatch.setattr("gpt.run.log.READ_EVERY", {})
    assert run(config, tmp_path / "late").failure == first.failure


def test_a_non_finite_validation_loss_is_located(tiny: Make, tmp_path: Path):
    config = wild(tiny, 1e30, training={"steps": 1}, schedule={"warmup": "none"})
    result = run(config, tmp_path / "run")
    assert result.failure is not None
    assert result.failure.quantity == "validation loss"
    assert result.failure.place is not None
    assert result.failure.advice[0].startswith("--schedule.warmup linear --schedule.warmup-steps 1")


def test_a_non_finite_gradient_ends_the_run_before_it_reaches_the_weights(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss_fn = GPT.loss_fn

    def corrupted(self: GPT, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total_loss, loss = loss_fn(self, *arguments)
        return total_loss + (self.final_norm.weight[0] - 1).abs().sqrt(), loss  # slope inf at 1

    monkeypatch.setattr(GPT, "loss_fn", corrupted)
    result = run(tiny(sampling={"tokens": 0}), tmp_path / "run")
    assert (result.status, result.step) == ("diverged", 1)
    assert result.failure is not None
    assert result.failure.quantity == "gradient norm"
    assert result.failure.place == FaultLocation("gradient", 3, "final_norm.weight")
    assert not [tip for tip in result.failure.advice if "learning-rate" in tip]


def test_advice_follows_the_config(tiny: Make):
    cold = tiny(
        model={"norm": {"placement": "post"}},
        schedule={"warmup": "none"},
        optimizer={"clip": None, "learning_rate": 3e-3},
        training={"steps": 500},
    )
    flags = [tip.partition("  ")[0] for tip in advice(cold, None, 7)]
    assert flags == [
        "--schedule.warmup linear --schedule.warmup-steps 50",
        "--model.norm.placement pre",
        "--optimizer.learning-rate 0.001",
        "--optimizer.clip 1.0",
        "--training.nonfinite rollback",
    ]
    fixed = advice(tiny(data={"windows": "fixed"}), None, 7)
    assert fixed
    assert not [tip for tip in fixed if "rollback" in tip]  # to the same batch
    done = tiny(
        model={"norm": {"placement": "peri"}},
        schedule={"warmup_steps": 50},
        training={"steps": 500, "precision": "bf16", "nonfinite": "skip"},
    )
    place = FaultLocation("activation", 1, "blocks.0.attention.qkv")
    flags = [tip.partition("  ")[0] for tip in advice(done, place, 7)]
    assert flags == [
        "--optimizer.learning-rate 0.00033",
        "--model.attention.qk-norm true",
        "--training.precision fp32",
    ]
    norm = FaultLocation("activation", 1, "blocks.0.attention_norm")
    assert not [tip for tip in advice(done, norm, 7) if "qk-norm" in tip]
    flags = [tip.partition("  ")[0] for tip in advice(done, FaultLocation("logit", 3, "head"), 7)]
    assert "--training.z-loss 1e-4" in flags
    bare = tiny(model={"norm": {"type": "none"}}, optimizer={"name": "sgd"})
    flags = [tip.partition("  ")[0] for tip in advice(bare, None, 7)]
    assert flags[0] == "--model.norm.type layer"
    assert flags[1] == "--optimizer.name adamw --optimizer.learning-rate 1e-3"
    control = tiny(model={"norm": {"placement": "none", "type": "none"}})
    assert advice(control, None, 7)[0].startswith("--model.norm.placement pre --model.norm.type l")
    unbounded = tiny(model={"norm": {"final_norm": "off"}})
    assert advice(unbounded, None, 7)[0].startswith("--model.norm.final-norm auto ")


def test_no_advice_is_without_effect(tiny: Make):
    """The next batch of a fixed window is the one that failed; DeepNorm scales by depth itself."""
    fixed = tiny(data={"windows": "fixed"})
    assert not [tip for tip in advice(fixed, None, 7) if "rollback" in tip]
    deep = tiny(model={"norm": {"placement": "deepnorm"}, "init": {"regime": "xavier"}})
    assert not [tip for tip in advice(deep, None, 0) if "depth-scaled" in tip]


def test_before_the_first_update_no_advice_concerns_the_learning_rate(tiny: Make):
    config = tiny(
        model={"norm": {"placement": "none"}, "init": {"regime": "xavier"}},
        schedule={"warmup": "none"},
        optimizer={"name": "sgd", "clip": None},
    )
    flags = [tip.partition("  ")[0] for tip in advice(config, None, 0)]
    assert flags == [
        "--model.norm.placement pre",
        "--model.init.regime gpt2",
        "--model.init.depth-scaled on",
    ]


@pytest.mark.parametrize("place", [None, FaultLocation("logit", 3, "head")])
def test_advice_consists_of_flags_that_train_accepts(tiny: Make, tmp_path: Path, capsys, place):
    path = tmp_path / "c.yaml"
    config = wild(tiny, 0.1, training={"precision": "bf16"})
    path.write_text(config.to_yaml())
    for tip in advice(config, place, 0) + advice(config, place, 7):
        flags = tip.partition("  ")[0].split()
        assert cli.run("train", [str(path), *flags, "--print-config"]) == 0
        assert capsys.readouterr().out != config.to_yaml()
