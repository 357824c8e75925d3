"""Train a GPT from a YAML config: `python train.py --help`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before there is anything to save

from gpt.cli import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train())
