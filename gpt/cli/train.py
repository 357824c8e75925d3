"""`train.py CONFIG.yaml`: train a GPT."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gpt.cli.common import EXIT_CODES, StopSignals, repeated, typed
from gpt.cli.flags import parse
from gpt.cli.paths import explained, run_of_checkpoint
from gpt.config import Config, Count, FileName, Seconds, Section, source
from gpt.config import load as load_config
from gpt.config.shipped import names
from gpt.config.values import CountOrZero
from gpt.errors import InputError
from gpt.hardware.processes import (
    after_restart,
    check_processes,
    is_launched,
    launched,
    leads,
)
from gpt.hardware.size import check_cpu_training
from gpt.io.console import Console, show, write_result
from gpt.io.files import read_small
from gpt.tracking import check_installed

if TYPE_CHECKING:
    from gpt.run.directory import RunResult


LAST_UPDATES = 20  # whose mean loss is shown at the end
# The options that `--help` shows; `--help-all` shows all.
COMMON = (
    "name", "out_dir", "resume", "dry_run", "processes", "data.path", "model.layers",
    "model.norm.placement", "optimizer.learning_rate", "training.steps",
)  # fmt: skip


class Arguments(Section):
    """Train a GPT from a YAML config. Every option of the config is also a flag.

    Examples:
      %(prog)s quickstart
      %(prog)s quickstart --optimizer.learning-rate 3e-3 --name faster
      %(prog)s own-text --data.path my-texts --name mine
      %(prog)s post-norm --schedule.warmup none --no-model.bias
    """

    config: FileName = Field(
        title="CONFIG.yaml",
        description="A YAML file, or the name of a shipped config: " + ", ".join(names("config")),
    )
    out_dir: FileName | None = Field(None, title="DIR")
    """The run directory (default: runs/NAME)."""
    resume: FileName = Field("auto", title="auto|never|CHECKPOINT")
    """auto: resume an unfinished run in the directory; never: require a fresh directory; a
    checkpoint folder, or latest, best or a step of runs/NAME: start a fresh directory from it."""
    dry_run: bool = False
    """Describe what would be trained, and write nothing."""
    print_config: bool = False
    """Print the resolved config as YAML."""
    processes: Literal["auto"] | Count | None = Field(None, title="N|auto")
    """Short for --training.processes: the processes on this machine that share each batch."""
    max_restarts: CountOrZero = 3
    """How often those processes start again, from the last checkpoint, after one was killed."""
    max_seconds: Seconds | None = Field(None, title="SECONDS")
    """Save and exit with code 75 after this time, for batch queues (default: no limit)."""


def main(argv: Sequence[str], prog: str = "train.py") -> int:
    """`train.py CONFIG.yaml ...`; returns the exit code."""
    arguments, config = load(argv, prog)
    result = train(arguments, config)
    return report(result, prog)


def load(argv: Sequence[str], prog: str = "train.py") -> tuple[Arguments, Config]:
    """Read the command line and the config.

    Raises:
        InputError: either is invalid.
    """
    arguments, options = parse(Arguments, prog, argv, Config, common=COMMON)
    out_dir, started_from = arguments.out_dir, run_of_checkpoint(Path(arguments.resume))
    if started_from is not None and not (out_dir and (Path(out_dir) / "config.yaml").is_file()):
        out_dir = str(started_from)  # whose init_from may be gone
    if arguments.processes is not None:
        options.setdefault("training", {})["processes"] = arguments.processes
    with explained(arguments.config, prog, "config"):
        return arguments, load_config(arguments.config, options, out_dir=out_dir)


def train(arguments: Arguments, config: Config) -> RunResult | None:
    """Train; or print the config or the plan, if asked to, and return None."""
    out_dir = Path(arguments.out_dir or f"runs/{config.name}")
    if arguments.print_config:
        write_result(config.to_yaml())
        return None
    check_installed(config.tracking)
    check_cpu_training(config)
    if arguments.dry_run:
        show(_plan(config, out_dir, arguments.resume))
        return None
    starts_afresh = arguments.resume in ("auto", "never") and not out_dir.exists()
    if config.init_from is not None and starts_afresh:  # an unreachable hub is reported early
        source.locate(source.describe(config.init_from))

    if config.training.processes != 1 and not is_launched():
        from gpt.cli import launch

        processes = launch.count(config, out_dir)
        if processes > 1:
            return launch.train(
                config,
                out_dir,
                processes=processes,
                resume=arguments.resume,
                max_restarts=arguments.max_restarts,
                max_seconds=arguments.max_seconds,
            )
    import torch

    from gpt import training

    torch.set_flush_denormal(True)  # before torch starts its other threads, which inherit it
    with StopSignals(arguments.max_seconds, quiet=not leads()) as stop:
        return training.train(config, out_dir, resume=after_restart(arguments.resume), stop=stop)


def report(result: RunResult | None, prog: str = "train.py") -> int:
    """Print the result, and return the exit code."""
    if result is None:
        return 0
    if leads():
        show(_describe(result, prog))
    return EXIT_CODES[result.status]


def _plan(config: Config, out_dir: Path, resume: str) -> str:
    """What would be trained, without training."""
    from gpt.plan import report
    from gpt.run.banner import describe
    from gpt.run.cautions import cautions
    from gpt.run.resume import open_run

    opened = open_run(config, out_dir, resume, fetch=False)
    if opened.result is not None:
        return f"{out_dir}: {opened.result.status}, nothing is left to do: {opened.result.reason}"
    lines, weights = opened.describe_changes(config), opened.pretrained
    if weights is not None:
        lines.append(weights.summary(config.model))
    plan = report.make(config)
    dataset = plan.data.dataset
    if plan.refusal is not None:
        raise plan.refusal
    processes = launched() if is_launched() else config.training.processes
    if processes != "auto":
        check_processes(config, processes)
    described = describe(
        config,
        plan.model,
        processes=1 if processes == "auto" else processes,
        device=plan.device,
        micro_batch=plan.memory.micro_batch,
        dataset=dataset,
        directory=out_dir,
        done=opened.checkpoint.step if opened.checkpoint else 0,
    )
    Console().warn(cautions(config, dataset))
    return "\n".join([*lines, described, report.describe(plan)])


def _describe(result: RunResult, prog: str) -> str:
    from gpt import checkpoint as store
    from gpt import metrics
    from gpt.run.directory import RunDirectory

    run = RunDirectory(result.directory)
    lines = [f"{result.status}: {result.reason}"]
    if result.status == "interrupted":
        return "\n".join([*lines, "  to resume:", f"  {repeated(prog)}"])
    if result.status == "finished":
        records = metrics.read(run.metrics)
        losses = [r["loss"] for r in records if r.get("loss") is not None]
        last = losses[-LAST_UPDATES:]
        lines.append(
            f"  validation loss  {result.val_loss:.4f} nats per token, "
            f"{result.val_bits_per_byte:.4f} bits per byte (lowest {result.best_val_loss:.4f} nats)"
        )
        if last:
            mean = f"{sum(last) / len(last):.4f} nats per token"
            lines.append(f"  training loss    {mean}, mean of the last {len(last)} updates")
        with contextlib.suppress(InputError):  # a result without its environment.json
            lines += _what_it_means(result.val_loss, run.guessing_losses(), losses)
        before = [r.get("val_loss") for r in records if r["step"] == 0]
        if result.best_val_loss in before:
            lines.append("  No evaluation was better than the one before the first update.")
    if run.plot.is_file():
        lines.append(f"  plot             {run.plot}")
    samples = sorted(run.samples.glob("step-*.txt"))
    if samples:
        lines.append(f"  sample           {samples[-1]}:")
        text = read_small(samples[-1]).decode("utf-8", "replace").removesuffix("\n")
        lines += ["  | " + line for line in text.split("\n")]
    saved = (run.checkpoints / "latest").is_file()
    if result.status == "diverged" and saved:
        lines.append("  The last good checkpoint is kept.")
    if result.failure is not None:
        lines.append("  What to try next, one change at a time, each in another --out-dir:")
        lines += [f"    {tip}" for tip in result.failure.advice]
    if saved:
        best = store.read_pointer(run.checkpoints, "best")
        if best is not None:
            lines.append(f"  best checkpoint  {best} (lowest saved loss; sampled by default)")
        command = [*typed("sample", prog), str(result.directory), "--num-samples", "3"]
        lines.append(f"  more samples     {shlex.join(command)}")
    return "\n".join(lines)


def _what_it_means(
    loss: float | None, guessing: Mapping[str, float], training: Sequence[float]
) -> list[str]:
    """The losses of guessing, and whether the model has learned more than the first, H₁."""
    from gpt.metrics import LEARNED_MARGIN

    losses = ", ".join(f"{level:.4f} {how}" for how, level in guessing.items())
    lines = [f"  guessing         {losses}"]
    if loss is not None and loss >= min(guessing.values()) - LEARNED_MARGIN:
        from gpt.compare.analysis.verdicts import still_falling

        lines.append("  The model has learned no more than token frequencies.")
        if still_falling(training):
            lines.append("  Its training loss is still falling: more steps may help.")
    return lines
