"""Train a GPT from a YAML config: `python train.py --help`."""

import sys

from gpt.cli.common import command

if __name__ == "__main__":
    with command("train.py"):  # turns errors and Ctrl-C into exit codes; the imports come after it
        from gpt.cli.train import load, report, train

        arguments, config = load(sys.argv[1:])  # YAML and flags: one validated Config
        result = train(arguments, config)  # the loop is in gpt/training.py
        sys.exit(report(result))  # losses, files, what to do next
