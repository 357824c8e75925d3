"""Generate text from a run directory: `python sample.py --help`."""

import sys

from gpt.cli import sample

if __name__ == "__main__":
    sys.exit(sample())
