"""Train a GPT from a YAML config: `python train.py --help`."""

import sys

from gpt.cli import train

if __name__ == "__main__":
    sys.exit(train())
