"""`steadygpt coordcheck CONFIG.yaml`: whether updates depend on the width; in muP they do not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from gpt.cli import prepare
from gpt.cli.flags import parse
from gpt.cli.paths import explained
from gpt.config import Config, Count, FileName, load
from gpt.config.values import Channels
from gpt.errors import InputError
from gpt.io.console import show

if TYPE_CHECKING:
    from gpt.coordinates import Change

Widths = Annotated[
    tuple[Channels, ...],
    BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
]


# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "widths", "steps", "seeds", "out", "model.parametrization", "model.mup_base_width",
    "optimizer.name", "optimizer.learning_rate",
)  # fmt: skip


class Arguments(prepare.Arguments):
    r"""Measure how far a few updates move the activations of networks of several widths.

    Examples:
      %(prog)s pre-norm --widths 48,96,192
      %(prog)s pre-norm --model.parametrization mup \
          --model.mup-base-width 48
    """

    widths: Widths | None = Field(None, title="WIDTH,WIDTH,...")
    """At least two widths (default: 1, 2 and 4 times the config's)."""
    steps: Count = 3
    """Updates at the full learning rate, without warm-up; at least 6 for radam."""
    seeds: Count = 3
    """Networks of each width."""
    out: FileName = Field("coordcheck.png", title="FILE.png")
    """Where to save the plot; an existing file is not replaced."""


def main(argv: Sequence[str], prog: str = "steadygpt coordcheck") -> int:
    """`steadygpt coordcheck CONFIG.yaml ...`; returns the exit code."""
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    with explained(arguments.config, prog, "config"):
        config = load(arguments.config, options)
    if config.init_from is not None:
        raise InputError(f"init_from: {config.init_from}: only new networks are checked")
    widths = arguments.widths or tuple(n * config.model.width for n in (1, 2, 4))
    if len(set(widths)) < max(2, len(widths)):
        raise InputError("--widths: needs at least two widths, all different")
    out = Path(arguments.out)
    if os.path.lexists(out):
        raise InputError(f"--out: {out} exists already; name another file")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise InputError(f"--out: {out.parent} is not a folder that can be written to")
    dataset = prepare.prepare(config)

    from gpt import coordinates

    changes = coordinates.check(config, dataset, widths, arguments.steps, arguments.seeds)
    show(_table(changes, widths))
    show(f"the change {coordinates.verdict(changes)}")
    title = f"{config.name}: change after {arguments.steps} updates"
    coordinates.plot(changes, widths, out, title)
    show(str(out))
    return 0


def _table(changes: Sequence[Change], widths: Sequence[int]) -> str:
    """RMS of each change at each width, and the slope."""
    rows = [["RMS of the change at width", *map(str, widths), "slope"]]
    for change in changes:
        rows.append([change.name, *(f"{x:.3g}" for x in change.rms), f"{change.slope:+.2f}"])
    first = max(len(row[0]) for row in rows)
    return "\n".join(
        row[0].ljust(first) + "".join(cell.rjust(10) for cell in row[1:]) for row in rows
    )
