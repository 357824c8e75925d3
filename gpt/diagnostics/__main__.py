"""`python -m gpt.diagnostics RUN_DIR`: the command `diagnose`, in gpt/cli/diagnose.py."""

import sys

from gpt.cli import run

if __name__ == "__main__":
    sys.exit(run("diagnose"))
