"""The command line: `steadygpt COMMAND`, and the scripts that run one command each.

Every command is a module here; its `main` is a straight line: load, do, print. Progress goes to
stderr, results to stdout. torch is imported only once there is something to run, so that `--help`
and error messages are immediate.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from gpt import __version__
from gpt.cli import tab
from gpt.cli.common import command
from gpt.errors import nearest
from gpt.io.console import show

# Command -> its name in its messages when it is not run as `steadygpt COMMAND`.
COMMANDS = {
    "train": "train.py",
    "sample": "sample.py",
    "eval": "steadygpt eval",
    "compare": "compare.py",
    "scaling": "steadygpt scaling",
    "prepare": "python -m gpt.data",
    "checkpoint": "python -m gpt.checkpoint",
    "diagnose": "python -m gpt.diagnostics",
    "coordcheck": "steadygpt coordcheck",
    "plan": "steadygpt plan",
    "runs": "steadygpt runs",
    "plot": "steadygpt plot",
    "export": "steadygpt export",
    "clean": "steadygpt clean",
    "completion": "steadygpt completion",
}
USAGE = """\
usage: steadygpt COMMAND ...   (COMMAND --help for details)

  train CONFIG.yaml        train a GPT
  sample RUN_DIR           generate text from a run
  eval RUN_DIR ...         measure loss, perplexity and bits per byte
  compare GRID.yaml        compare training stability over a grid of runs
  scaling LADDER.yaml      fit Chinchilla's law to a ladder of model sizes
  prepare CONFIG.yaml      prepare a config's data without training
  checkpoint verify DIR    check that checkpoints are intact
  diagnose RUN_DIR         plot the statistics of a run's layers
  coordcheck CONFIG.yaml   check that updates do not depend on the width (muP)
  plan CONFIG.yaml         show a run's cost, or which model a budget deserves
  runs [DIR]               list runs: status, losses, time, options that differ
  plot RUN ...             plot the losses of several runs in one picture
  export RUN_DIR OUT       write a run's model for Hugging Face transformers
  clean [DIR ...]          remove unneeded checkpoints and prepared data
  completion SHELL         let Tab complete commands in bash, zsh or fish

  -V, --version            print the version"""


def main() -> int:
    """`steadygpt COMMAND ...`; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if tab.is_completing():
        name = tab.typed_command()
        if name not in COMMANDS:
            commands = argparse.ArgumentParser()
            commands.add_argument("command", choices=COMMANDS)
            commands.add_argument("--version", action="version")
            tab.complete(commands, words_before=1)
    if name in COMMANDS:
        return run(name, sys.argv[2:], f"steadygpt {name}")
    if name == "help" and len(sys.argv) > 2 and sys.argv[2] in COMMANDS:
        return run(sys.argv[2], ["--help"], f"steadygpt {sys.argv[2]}")
    if name in ("-h", "--help", "--help-all", "help"):
        show(USAGE)
        return 0
    if name in ("-V", "--version"):
        show(f"steadygpt {__version__}")
        return 0
    hint = nearest(name, [*COMMANDS, "--version"])
    show(f"steadygpt: {name}: no such command{hint}; steadygpt --help lists all", sys.stderr)
    return 2


def run(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command in this process and return its exit code.

    Args:
        argv: its arguments; None takes those of the process.
        prog: its name in messages.

    Raises:
        SystemExit: with the exit code, where the command ends early.
    """
    prog = prog or COMMANDS[name]
    with command(prog):
        module = importlib.import_module(f"gpt.cli.{name}")
        code: int = module.main(sys.argv[1:] if argv is None else argv, prog)
    return code
