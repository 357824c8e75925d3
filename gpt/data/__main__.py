"""`python -m gpt.data CONFIG.yaml`: the command `prepare`, in gpt/cli/prepare.py."""

import sys

from gpt.cli import run

if __name__ == "__main__":
    sys.exit(run("prepare"))
