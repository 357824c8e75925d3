"""Compare training stability over a grid of runs: `python compare.py --help`."""

import sys

from gpt.cli.common import command

if __name__ == "__main__":
    with command("compare.py"):  # turns errors and Ctrl-C into exit codes; the imports come after
        from gpt.cli.compare import compare, load, report

        arguments, comparison = load(sys.argv[1:])  # a grid and its cells, a Config each
        summary = compare(arguments, comparison)  # runs, verdicts, statistics: gpt/compare/
        sys.exit(report(summary, comparison))
