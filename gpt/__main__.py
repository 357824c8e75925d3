"""`steadygpt COMMAND ...`, also `python -m gpt COMMAND ...`."""

import signal
import sys


def main() -> int:
    """Run a command; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback
    from gpt.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
