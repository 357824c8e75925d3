"""`python -m gpt.data CONFIG.yaml`: the door `prepare` of gpt/cli/__init__.py."""

import sys

from gpt.cli import prepare

if __name__ == "__main__":
    sys.exit(prepare(prog="python -m gpt.data"))
