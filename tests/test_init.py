"""Initial weights, a controlled factor of comparisons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gpt.config import ModelConfig, NormConfig
from gpt.model.gpt2 import GPT
from gpt.model.init import REGIMES, fingerprints, initialize, logit_scale
from gpt.model.placement import PLACEMENTS

VOCAB = 1000


def make(seed: int = 0, **options: Any) -> GPT:
    shape = {"layers": 8, "heads": 4, "width": 128, "context": 128}
    model = GPT(ModelConfig.model_validate({**shape, **options}), VOCAB)
    initialize(model, model.config, seed)
    return model


def spread(values: torch.Tensor) -> float:
    assert abs(values.mean().item()) < 0.1 * values.std().item()
    return values.std().item()


def test_initial_weights_have_gpt2s_standard_deviations():
    model = make()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            sigma = 0.02 / math.sqrt(16) if name.endswith(".out.weight") else 0.02
            assert parameter.std().item() == pytest.approx(sigma, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.1 * sigma


def test_models_share_the_initial_weights_of_common_parameters():
    pre, post = (
        dict(make(norm={"placement": name}).named_parameters()) for name in ("pre", "post")
    )
    assert set(pre) - set(post) == {"final_norm.weight", "final_norm.bias"}
    assert all(torch.equal(pre[name], post[name]) for name in post)
    deeper = dict(make(layers=5, init={"depth_scaled": "off"}).named_parameters())
    name = "blocks.1.attention.qkv.weight"
    assert torch.equal(pre[name], deeper[name])
    assert not torch.equal(dict(make(seed=2).named_parameters())[name], pre[name])


D = 128
SIGMAS = {  # embedding, q, out, up, mlp.out, head
    "gpt2": [0.02, 0.02, 0.02 / 4, 0.02, 0.02 / 4, 0.02],
    "xavier": [
        math.sqrt(0.5),
        math.sqrt(1 / D),
        math.sqrt(1 / D),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (D + VOCAB)),
    ],
    "small": [
        math.sqrt(0.5),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (5 * D)),
        math.sqrt(2 / (D + VOCAB)),
    ],
}


def test_the_standard_deviations_of_every_regime_are_listed():
    assert list(SIGMAS) == list(REGIMES), "add them to SIGMAS, by hand"


@pytest.mark.parametrize("regime", SIGMAS)
def test_a_regimes_standard_deviations(regime: str):
    model = make(tied_head=False, init={"regime": regime})
    block = model.blocks[3]
    measured = [
        spread(model.token_embedding.weight),
        *(spread(part) for part in block.attention.qkv.weight.chunk(3)),
        spread(block.attention.out.weight),
        spread(block.mlp.up.weight),
        spread(block.mlp.out.weight),
        spread(model.head.weight),
    ]
    embedding, q, out, up, mlp_out, head = SIGMAS[regime]
    assert measured == pytest.approx([embedding, q, q, q, out, up, mlp_out, head], rel=0.03)
    assert spread(model.position_embedding.weight) == pytest.approx(embedding, rel=0.03)


@pytest.mark.parametrize("regime", ["xavier", "small"])
def test_the_stream_starts_with_variance_1_and_tied_logits_near_1(regime: str):
    model = make(init={"regime": regime})
    x = torch.arange(128)[None]
    assert model.embed(x).var().item() == pytest.approx(1, rel=0.05)
    assert 0.5 < model(x).std().item() < 1.5
    assert logit_scale(model.config) == pytest.approx(D**-0.5)
    assert make(tied_head=False, init={"regime": regime}).logit_scale == 1
    assert make().logit_scale == 1


def test_fused_matrices_are_initialized_separately():
    model = make(init={"regime": "xavier"}, mlp={"activation": "swiglu"})
    for part in model.blocks[0].mlp.up.weight.chunk(2):
        assert spread(part) == pytest.approx(math.sqrt(2 / (D + part.shape[0])), rel=0.03)


SCALED = {  # "auto": on for gpt2, unless the placement scales depth itself
    name: {
        regime: regime == "gpt2" and name not in ("deepnorm", "b2t", "lns", "sub")
        for regime in REGIMES
    }
    for name in PLACEMENTS
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("switch", ["auto", "on", "off"])
def test_depth_scaling_is_independent_of_the_regime(placement: str, regime: str, switch: str):
    options = {"norm": {"placement": placement}, "layers": 8, "width": 16}
    scaled = make(**options, init={"regime": regime, "depth_scaled": switch}).blocks[5]
    plain = make(**options, init={"regime": regime, "depth_scaled": "off"}).blocks[5]
    expected = {"auto": SCALED[placement][regime], "on": True, "off": False}[switch]
    for name in ("attention.out", "mlp.out", "mlp.up", "attention.qkv"):
        mine, other = (m.get_submodule(name).weight for m in (scaled, plain))
        factor = 0.25 if expected and name.endswith(".out") else 1.0
        torch.testing.assert_close(mine, factor * other)


def test_initialize_resets_everything():
    """Including a placement's own weights and running averages."""
    for placement in PLACEMENTS:
        model = make(norm={"placement": placement})
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        initialize(model, model.config, seed=0)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    model = make(norm={"type": "batch"})
    model(torch.arange(128)[None])
    initialize(model, model.config, seed=0)
    assert not model.final_norm.running_mean.any()


def test_weights_that_nothing_resets_are_an_error():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    model = make()
    model.final_norm = Scale()
    with pytest.raises(TypeError, match="final_norm: Scale has weights but no reset_parameters"):
        initialize(model, model.config, seed=0)


def test_fingerprints_distinguish_a_rescaled_draw_from_another_draw():
    def prints(placement: str, seed: int) -> dict[str, dict[str, object]]:
        config = ModelConfig(layers=2, heads=2, width=16, norm=NormConfig(placement=placement))
        model = GPT(config, 40)
        initialize(model, config, seed)
        return fingerprints(model)

    pre, post, deepnorm = (prints(name, 0) for name in ("pre", "post", "deepnorm"))
    other = prints("pre", 1)
    name = "blocks.1.mlp.up.weight"
    assert pre[name] == post[name]
    assert pre[name]["shape"] == [64, 16]
    assert pre[name]["sha256"] != deepnorm[name]["sha256"]
    assert pre[name]["signs"] == deepnorm[name]["signs"]
    assert deepnorm[name]["rms"] == pytest.approx(pre[name]["rms"] * (8 * 2) ** -0.25, rel=1e-5)
    assert pre[name]["signs"] != other[name]["signs"]
