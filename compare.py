"""Compare training stability over a grid of runs: `python compare.py --help`."""

import sys

from gpt.cli import compare

if __name__ == "__main__":
    sys.exit(compare())
