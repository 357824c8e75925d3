"""Generate text from a run directory: `python sample.py --help`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

from gpt.cli.common import command
from gpt.cli.sample import load, sample, write

if __name__ == "__main__":
    with command("sample.py"):  # errors and signals become exit codes
        arguments, prompt = load(sys.argv[1:])  # from a flag, a file or a pipe
        pieces = sample(arguments, prompt)  # token by token, in gpt/generation.py
        sys.exit(write(pieces))
