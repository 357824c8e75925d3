"""`python -m gpt.checkpoint verify DIR`: the command `checkpoint`, in gpt/cli/checkpoint.py."""

import sys

from gpt.cli import run

if __name__ == "__main__":
    sys.exit(run("checkpoint"))
