"""`steadygpt plan CONFIG.yaml`: what a run will cost, and which model a budget deserves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from gpt.cli import prepare
from gpt.cli.flags import parse
from gpt.cli.paths import explained
from gpt.config import Between, Config, Hours, describe_differences, load
from gpt.errors import InputError, as_flag
from gpt.hardware.processes import check_processes
from gpt.io.console import show, write_result

Flops = Annotated[float, Between(1.0, 1e30)]
Tokens = Annotated[int, Between(1, 10**15)]
RATE = """
The learning rate is that of the original size. Larger models usually need a smaller one, unless
model.parametrization is mup; try a few on a tenth of the steps."""


# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "budget", "hours", "tokens", "json_", "model.layers", "model.width", "model.context",
    "training.steps", "training.batch_tokens", "training.processes",
)  # fmt: skip


class Arguments(prepare.Arguments):
    """Describe what a run takes, or print the config of the model that a budget deserves.

    Examples:
      %(prog)s quickstart
      %(prog)s quickstart --hours 1
      %(prog)s quickstart --budget 1e15 > resized.yaml
    """

    budget: Flops | None = None
    """FLOPs of training: print the config of the model that makes the best use of them."""
    hours: Hours | None = None
    """The same for hours on this machine."""
    tokens: Tokens | None = None
    """The same for training tokens."""
    json_: bool = False
    """Print JSON: bytes, seconds and FLOPs."""


def main(argv: Sequence[str], prog: str = "steadygpt plan") -> int:
    """`steadygpt plan CONFIG.yaml ...`; returns the exit code."""
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    with explained(arguments.config, prog, "config"):
        config = load(arguments.config, options)
    if config.training.processes != "auto":
        check_processes(config, config.training.processes)
    given = arguments.model_dump(include={"budget", "hours", "tokens"}, exclude_none=True)
    if len(given) > 1:
        raise InputError(f"{' and '.join(map(as_flag, given))}: give only one of them")

    from gpt.plan.budget import BUDGETS
    from gpt.plan.report import describe, find_data, make

    planned = config
    for name, value in given.items():
        origin = f"{as_flag(name)} {value:g}"
        planned = BUDGETS[name](config, find_data(config).vocab_size, value, origin)
    plan = make(planned)
    if given and plan.refusal is not None:
        raise InputError(f"{origin}: {plan.refusal}")
    if arguments.json_:
        tree = {**plan.to_json(), **({"config": planned.model_dump(mode="json")} if given else {})}
        write_result(json.dumps(tree, indent=2) + "\n")
    elif given:
        changes = describe_differences(config.differences(planned))
        text = [
            f"{config.name}, resized for {origin}. Changed:",
            *changes,
            "",
            describe(plan),
            RATE,
        ]
        lines = "\n".join(text).splitlines()
        write_result("".join(f"# {line}".rstrip() + "\n" for line in lines) + planned.to_yaml())
    else:
        show(f"{config.name}\n{describe(plan)}")
    if plan.refusal is not None:
        raise plan.refusal
    return 0
