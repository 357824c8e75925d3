"""`steadygpt export RUN_DIR OUT`: a run's model in the Hugging Face layout."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from gpt.cli.common import typed
from gpt.cli.flags import parse
from gpt.cli.paths import find_checkpoint
from gpt.config import FileName, Section
from gpt.io.console import show


class Arguments(Section):
    """Write a run's model and vocabulary as a folder that Hugging Face transformers loads.

    Examples:
      %(prog)s runs/quickstart exported
      %(prog)s runs/quickstart exported --checkpoint latest
    """

    run_dir: FileName = Field(title="RUN_DIR")
    """A run directory, such as runs/quickstart, or one of its checkpoints."""
    out: FileName = Field(title="OUT")
    """The folder to write, which must be empty or not exist yet."""
    checkpoint: FileName = Field("best", title="best|latest|STEP")
    """best (by validation loss), latest, or a step such as 250."""


def main(argv: Sequence[str], prog: str = "steadygpt export") -> int:
    """`steadygpt export RUN_DIR OUT`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)
    given = arguments.checkpoint if "checkpoint" in arguments.model_fields_set else None
    run, checkpoint = find_checkpoint(arguments.run_dir, given, prog)
    show(export(run, Path(arguments.out), checkpoint, prog))
    return 0


def export(run_dir: Path, out: Path, checkpoint: str, prog: str) -> str:
    """Write the folder; returns what it holds, in a few lines.

    Raises:
        InputError: the run has no such checkpoint, its network has no counterpart in transformers,
            or `out` holds something.
    """
    from gpt import metrics
    from gpt.config.layouts import LAYOUTS
    from gpt.exchange import exporting
    from gpt.exchange.card import model_card
    from gpt.io.files import read_json
    from gpt.run.directory import RunDirectory
    from gpt.run.loading import load_run

    run = RunDirectory(run_dir)
    config = run.read_config()
    architecture = LAYOUTS[exporting.layout_for(config.model)].architecture
    exporting.check_target(out)
    model, encoding, step = load_run(run_dir, checkpoint)
    losses = {}
    for name, key in (("training loss", "loss"), ("validation loss", "val_loss")):
        known = [r for r in metrics.read_up_to(run.metrics, step) if r.get(key) is not None]
        if known:
            at = known[-1]["step"]
            losses[name if at == step else f"{name} after {at:,} updates"] = known[-1][key]
    environment = read_json(run.environment, dict[str, Any]) if run.environment.is_file() else {}
    card = model_card(
        config,
        architecture=architecture,
        parameters=model.num_parameters(),
        vocabulary=f"{encoding.n_vocab:,} tokens ({encoding.name})",
        step=step,
        environment=environment,
        losses=losses,
    )
    exporting.export(model, encoding, out, card)
    tune = [*typed("train", prog), "finetune", "--init-from", str(out)]
    return (
        f"{out}: {run_dir}, step {step}, as {architecture}, {model.num_parameters():,} parameters\n"
        f"  in Python    transformers.pipeline('text-generation', model={str(out)!r})\n"
        f"  fine-tune    {shlex.join([*tune, '--data.path', 'MY.txt'])}"
    )
