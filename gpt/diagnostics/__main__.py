"""`python -m gpt.diagnostics RUN_DIR`: the door `diagnose` of gpt/cli/__init__.py."""

import sys

from gpt.cli import diagnose

if __name__ == "__main__":
    sys.exit(diagnose(prog="python -m gpt.diagnostics"))
