"""`python -m gpt.checkpoint verify DIR`: the door `checkpoint` of gpt/cli/__init__.py."""

import sys

from gpt.cli import checkpoint

if __name__ == "__main__":
    sys.exit(checkpoint(prog="python -m gpt.checkpoint"))
