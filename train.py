"""Train a GPT from a YAML config: `python train.py --help`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

from gpt.cli.common import command
from gpt.cli.train import load, report, train

if __name__ == "__main__":
    with command("train.py"):  # errors and signals become exit codes
        arguments, config = load(sys.argv[1:])  # YAML and flags, in one validated Config
        result = train(arguments, config)  # the loop is in gpt/training.py
        sys.exit(report(result))  # losses, files, what to do next
