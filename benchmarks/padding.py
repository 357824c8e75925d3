"""The padding lesson: why language models normalize over channels and not over the batch.

    python benchmarks/padding.py [--out docs/results/padding/padding.png]

The same 8 sequences of 32 real tokens, 64 channels, go through batch norm and layer norm, alone and
together with more and more padding (zeros, like the embedding of a padding token). The plot and the
table show how far the outputs for the real tokens move: their RMS change, where outputs have RMS 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gpt.config import ModelConfig, validate
from gpt.model.norm import make_norm

SEQUENCES, REAL, WIDTH = 8, 32, 64
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
NORMS = {"batch": ("batch norm", "#d95f02", "o"), "layer": ("layer norm", "#08519c", "s")}


def tokens() -> Tensor:
    """(8, 32, 64): each channel has a mean and a spread of its own, as activations have."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(WIDTH, generator=generator)
    spread = torch.rand(WIDTH, generator=generator) + 0.5
    return mean + spread * torch.randn(SEQUENCES, REAL, WIDTH, generator=generator)


@torch.no_grad()
def moved(norm: nn.Module, x: Tensor, share: float) -> float:
    """RMS change of the normalized real tokens when `share` of all positions is padding."""
    padding = torch.zeros(SEQUENCES, round(REAL * share / (1 - share)), WIDTH)
    beside = norm(torch.cat([x, padding], dim=1))[:, :REAL]
    return (beside - norm(x)).square().mean().sqrt().item()


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/padding/padding.png"))
    out: Path = parser.parse_args().out
    x = tokens()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    changes = {}
    for name, (label, color, marker) in NORMS.items():
        tree = {"width": WIDTH, "heads": 1, "norm": {"type": name}}
        norm = make_norm(validate(ModelConfig, tree)).train()
        changes[name] = [moved(norm, x, share) for share in SHARES]
        axes.plot([100 * s for s in SHARES], changes[name], color=color, marker=marker, label=label)
    axes.set_xlabel("padding, % of all positions")
    axes.set_ylabel("change of the real tokens\n(RMS; outputs have RMS 1)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print("| padding | batch norm | layer norm |")
    print("|---|---|---|")
    for index, share in enumerate(SHARES):
        print(f"| {share:.0%} | {changes['batch'][index]:.3f} | {changes['layer'][index]:.3f} |")


if __name__ == "__main__":
    main()
