"""`steadygpt completion SHELL`: completion of commands, options, values and files with Tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from gpt.cli.flags import parse
from gpt.config import Section
from gpt.io.console import write_result


class Arguments(Section):
    """Print a script that makes a shell complete commands, options, values and files with Tab.
    Have each shell run it: in ~/.bashrc, ~/.zshrc (after compinit) or ~/.config/fish/config.fish.

    Examples:
      eval "$(%(prog)s bash)"
      eval "$(%(prog)s zsh)"
      %(prog)s fish | source
    """

    shell: Literal["bash", "zsh", "fish"] = Field(title="bash|zsh|fish")
    """The shell that reads the script."""


def main(argv: Sequence[str], prog: str = "steadygpt completion") -> int:
    """`steadygpt completion SHELL`; returns the exit code."""
    arguments, _ = parse(Arguments, prog, argv)
    from argcomplete.shell_integration import shellcode

    write_result(shellcode(["steadygpt"], shell=arguments.shell))
    return 0
