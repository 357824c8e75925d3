"""Generate text from a run directory: `python sample.py --help`."""

import sys

from gpt.cli.common import command

if __name__ == "__main__":
    with command("sample.py"):  # turns errors and Ctrl-C into exit codes; the imports come after it
        from gpt.cli.sample import load, sample, write

        arguments, prompt = load(sys.argv[1:])  # from a flag, a file or a pipe
        pieces = sample(arguments, prompt)  # token by token, in gpt/generate.py
        sys.exit(write(pieces))
