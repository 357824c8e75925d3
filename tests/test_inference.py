"""Fast ways to sample against the plain one: other layers, fixed shapes, compiled steps."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt import inference
from gpt.config import ModelConfig, Sampling, Weights
from gpt.errors import InputError
from gpt.generation import Decoder, generate_tokens
from gpt.inference import Int8Linear, PackedLinear, SlicedLinear, can_pack, optimize_for_inference
from gpt.model.gpt2 import ACTIVATIONS, GPT
from gpt.model.init import initialize
from gpt.model.norm import NORMS
from gpt.model.placement import PLACEMENTS

VOCAB = 61
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="slices are for MKL")
needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN's layouts need AVX2 or more")
needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's compiler writes vector code that its headers lack without AVX2",
)
SWITCHES: list[dict[str, Any]] = [
    {"attention": {"qk_norm": True}},
    {"attention": {"soft_cap": 0.5}},
    {"logit_soft_cap": 0.5},
    {"init": {"regime": "xavier"}},  # whose logits are divided by sqrt(d)
    {"tied_head": False},
    {"bias": False},
    *({"mlp": {"activation": name}} for name in ACTIVATIONS),
]


def is_valid(options: dict[str, Any]) -> bool:
    try:
        shaped(options)
    except ValueError:
        return False
    return True


def shaped(options: dict[str, Any]) -> ModelConfig:
    shape = {"layers": 4, "heads": 4, "width": 32, "context": 24}
    return ModelConfig.model_validate({**shape, **options})


MODELS = [  # placements with their default norm and batch norm, norms in pre-norm and DLCL
    *({"norm": {"placement": p}} for p in PLACEMENTS),
    *({"norm": {"placement": p, "type": "batch"}} for p in PLACEMENTS),
    *({"norm": {"placement": p, "type": t}} for p in ("pre", "dlcl") for t in NORMS),
    *SWITCHES,
]
ONCE = {str(options): options for options in MODELS if is_valid(options)}
every_model = pytest.mark.parametrize("options", ONCE.values(), ids=ONCE)


def make(options: dict[str, Any]) -> GPT:
    """A model whose parameters are all moved, so that each of them has an effect."""
    model = GPT(shaped(options), VOCAB)
    initialize(model, model.config, seed=1)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model.eval()


def tokens(length: int = 20) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def read(model: GPT, x: Tensor, **options: Any) -> Tensor:
    """(2, V) logits after reading x in pieces, with caches that were used before."""
    with Decoder(model, 2, **options) as decoder:
        for piece in x.flip(1).split([4, 1, x.shape[1] - 5], dim=1):
            decoder.read(piece)
        decoder.reset()
        for piece in x.split([5, 1, 1, x.shape[1] - 8, 1], dim=1):
            logits = decoder.read(piece)
        assert decoder.length == x.shape[1]
    return logits.clone()


def drawn(model: GPT, **options: Any) -> list[list[int]]:
    sampling = Sampling(temperature=1.0, top_k=20)
    steps = generate_tokens(
        model, [1, 2, 3], samples=2, tokens=40, sampling=sampling, seed=5, stop=0, **options
    )
    return list(steps)


def distance(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference, relative to the standard deviation of the expected logits."""
    return ((found.float() - expected).square().mean().sqrt() / expected.std()).item()


@torch.no_grad()
@every_model
def test_fixed_shapes_give_the_plain_logits(options: dict[str, Any]):
    model = make(options).double()
    for size in (20, None):
        found = read(model, tokens(), fixed=True, size=size)
        torch.testing.assert_close(found, model(tokens())[:, -1], atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"norm": {"placement": p}} for p in PLACEMENTS] + SWITCHES, ids=str
)
@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        pytest.param(1, SlicedLinear, marks=needs_mkl),
        pytest.param(2, PackedLinear, marks=needs_packing),
    ],
)
def test_other_layouts_give_the_plain_logits(
    samples: int, kind: type, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inference, "MIN_SIZE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # does not divide any width here
    model = make(options)
    expected, texts = model(tokens())[:, -1], drawn(model)
    optimize_for_inference(model, "fp32", samples)
    kinds = {type(m) for m in model.modules()}
    assert kind in kinds
    assert nn.Linear not in kinds
    torch.testing.assert_close(read(model, tokens()), expected, atol=1e-5, rtol=1e-5)
    assert drawn(model) == texts


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3, 100])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (61, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_slices_give_the_full_product(
    threads: int, shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    sliced = SlicedLinear(linear.weight, linear.bias)
    assert len(sliced.slices) == threads
    for x in (torch.randn(1, shape[1]), torch.randn(2, 5, shape[1])):
        torch.testing.assert_close(sliced(x), linear(x), atol=1e-5, rtol=1e-5)


def test_small_matrices_are_not_changed():
    model = make({})
    before = {name: id(module) for name, module in model.blocks.named_modules()}
    optimize_for_inference(model, "fp32", samples=1)
    assert {name: id(module) for name, module in model.blocks.named_modules()} == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["bf16", "int8"])
@every_model
def test_fewer_bits_give_nearly_the_plain_logits(options: dict[str, Any], name: Weights):
    model = make(options)
    expected = model(tokens())[:, -1]
    optimize_for_inference(model, name, samples=2)
    assert 0 < distance(read(model, tokens()), expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_int8_weights_round_to_half_a_step(bias: bool):
    linear = nn.Linear(64, 48, bias=bias)
    linear.weight[3] = 0
    linear.weight[5] *= 1e3
    made = Int8Linear(linear.weight, linear.bias)
    matrix = made.weight.float() * made.scale.float()[:, None]
    assert made.weight.abs().max() <= 127
    assert made.weight.abs().amax(1)[5] >= 126
    half = made.scale.float()[:, None] / 2
    assert ((matrix - linear.weight).abs() <= half * 1.001).all()
    x = torch.randn(2, 3, 64)
    expected = nn.functional.linear(x.bfloat16().float(), matrix, linear.bias)
    torch.testing.assert_close(made(x), expected, atol=2e-2, rtol=1e-2)


def test_int8_weights_need_a_cpu():
    with torch.device("meta"):
        model = GPT(shaped({}), VOCAB)
    with pytest.raises(InputError, match=r"weights int8: needs a CPU; on meta use bf16"):
        optimize_for_inference(model, "int8", samples=1)


def test_fixed_shapes_generate_the_same_text_beyond_the_context_and_again():
    model = make({})
    plain = drawn(model)
    assert len(plain) > 24  # beyond the context
    decoder = Decoder(model, 2, fixed=True)
    assert [drawn(model, decoder=decoder) for _ in range(2)] == [plain, plain]


@pytest.mark.slow
@needs_vectors
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_step_is_compiled_once_and_gives_the_plain_logits():
    model = make({})
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        found = read(model, tokens(), compiled=True)
    expected = model(tokens())[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
