"""Compare training stability over a grid of runs: `python compare.py --help`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

from gpt.cli.common import command
from gpt.cli.compare import compare, load, report

if __name__ == "__main__":
    with command("compare.py"):  # errors and signals become exit codes
        arguments, comparison = load(sys.argv[1:])  # a grid, and a Config for each of its cells
        summary = compare(arguments, comparison)  # runs, verdicts, statistics: gpt/compare/
        sys.exit(report(summary, comparison))
