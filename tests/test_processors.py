"""Results differ only by rounding between the vector units that torch can use on this CPU.

Each is tried in its own process, since `ATEN_CPU_CAPABILITY` is read when torch starts and a
wrong call of a private operator may kill the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import yaml
from conftest import ROOT

from gpt.config import Config

pytestmark = pytest.mark.slow
CAPABILITIES = ["default", "avx2", "avx512"]
every_capability = pytest.mark.parametrize("capability", CAPABILITIES)
START = """
import sys
import torch

torch.set_num_threads(1)
if torch.backends.cpu.get_cpu_capability().lower() != sys.argv[1]:
    sys.exit(77)
"""
SIZES = """
import copy
import random
from torch import nn
from gpt.inference import Int8Linear, PackedLinear, SlicedLinear, can_multiply_int8, can_pack

torch.set_grad_enabled(False)
random.seed(0)
torch.manual_seed(0)
vectors = sys.argv[1] != "default"
torch.get_num_threads = lambda: 3  # slices; the products themselves take one thread


def check(name, make, linear, x, expected, tolerance):
    print(name, *linear.weight.shape, *x.shape, file=sys.stderr, flush=True)  # named if it crashes
    y = make(linear.weight, linear.bias)(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def plain(weight, bias):
    return lambda x: nn.functional.linear(x, weight, bias)


for inputs in [*range(1, 301), 16, 48, 768, 3072]:
    outputs, rows = random.randint(1, 300), random.randint(1, 5)
    linear = nn.Linear(inputs, outputs, bias=random.random() < 0.5)
    wide = torch.randn(rows, 3, inputs + 1)
    views = wide[:, -1, 1:], wide[:, :, :-1], wide[:0, 0, 1:]  # which start anywhere
    x = views[inputs % 3]
    expected = copy.deepcopy(linear).double()(x.double())
    check("fp32, one sample", SlicedLinear, linear, x, expected, 1e-4)
    if can_pack():
        pack = lambda weight, bias: PackedLinear(weight, bias, rows)
        check("fp32, several samples", pack, linear, x, expected, 1e-4)
    made = Int8Linear(linear.weight, linear.bias)
    assert made.fused == can_multiply_int8(made.weight) == (vectors and inputs % 16 == 0)
    matrix = made.weight.double() * made.scale.double()[:, None]
    product = x.bfloat16().double() @ matrix.T + (0 if linear.bias is None else linear.bias)
    check("int8", Int8Linear, linear, x, product, 1e-2)
    x, linear = x.bfloat16(), linear.bfloat16()
    expected = copy.deepcopy(linear).double()(x.double())
    check("bf16", plain, linear, x, expected, 2e-2)
assert can_pack() == (vectors and torch.backends.mkldnn.is_available())
"""
RUNS = """
import contextlib
import io
import json
from pathlib import Path
from gpt.cli import run

folder, found = Path(sys.argv[2]), {}
for config in sorted(folder.glob("*.yaml")):
    out = str(folder / sys.argv[1] / config.stem)
    assert run("train", [str(config), "--out-dir", out]) == 0
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    for weights in ("fp32", "bf16", "int8"):
        for samples in ("1", "3"):
            flags = ["--weights", weights, "--num-samples", samples, "--max-new-tokens", "40"]
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                assert run("sample", [out, "--prompt", "The", *flags]) == 0
            assert len(stdout.getvalue()) > 30
    found[config.stem] = losses
print(json.dumps(found))
"""


def run(script: str, capability: str, *arguments: object) -> str:
    """Output of the script with torch restricted to that capability."""
    ran = subprocess.run(
        [sys.executable, "-c", START + script, capability, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)},
        timeout=240,
    )
    if ran.returncode == 77:
        pytest.skip(f"this CPU has no {capability}")
    assert ran.returncode == 0, f"exit code {ran.returncode} after {ran.stderr[-2000:]}"
    return ran.stdout


@every_capability
def test_products_of_every_size_are_right(capability: str):
    run(SIZES, capability)


@pytest.fixture(scope="module")
def losses(
    tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, list[float]]]:
    """Losses of two runs of 20 steps, each then sampled from with all weights."""
    folder = tmp_path_factory.mktemp("processors")
    model = {"layers": 2, "heads": 2, "width": 40, "context": 16}  # 40 is not a multiple of 16
    plain = tiny(model=model)
    muon = tiny(model=model, optimizer={"name": "muon"}, training={"precision": "bf16"})
    for name, config in {"plain": plain, "muon": muon}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return cache(lambda capability: json.loads(run(RUNS, capability, folder).splitlines()[-1]))


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_losses_of_runs_agree_up_to_rounding(
    capability: str, losses: Callable[[str], dict[str, list[float]]]
):
    plain, found = losses("default"), losses(capability)
    assert len(plain["plain"]) == len(plain["muon"]) == 20
    assert found["plain"] == pytest.approx(plain["plain"], abs=1e-4)
    assert found["muon"] == pytest.approx(plain["muon"], abs=2e-2)
