"""A summary of a config before anything runs: device, size, batch, epochs.

The banner of a run and `--dry-run` both come from `describe`; what the run costs is in gpt/plan.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gpt.config import Config, ModelConfig
from gpt.data.prepared import Dataset
from gpt.io.console import labeled
from gpt.model.gpt2 import GPT
from gpt.model.init import depth_scaled
from gpt.model.placement import PLACEMENTS, has_final_norm
from gpt.run.cautions import describe_validation
from gpt.trainer import Trainer


def describe_run(
    config: Config, trainer: Trainer, dataset: Dataset, directory: Path, *, done: int
) -> str:
    """A few lines that describe the run that `trainer` is about to compute; see `describe`."""
    return describe(
        config,
        trainer.model,
        device=trainer.device,
        processes=trainer.processes,
        micro_batch=trainer.micro_batch,
        dataset=dataset,
        directory=directory,
        done=done,
    )


def describe(
    config: Config,
    model: GPT,
    *,
    device: torch.device,
    micro_batch: int,
    processes: int = 1,
    dataset: Dataset | None,
    directory: Path,
    done: int,
) -> str:
    """A few lines that describe the run about to start.

    Args:
        model: on any device, "meta" included; only its size counts.
        processes: how many share a batch, each in micro-batches of `micro_batch` sequences.
        dataset: the prepared data, None if it is not prepared yet.
        done: updates that an earlier session has made.
    """
    parameters, embeddings = model.num_parameters(), model.num_embedding_parameters()
    batch_tokens = config.batch_sequences * config.model.context
    total = config.training.steps * batch_tokens
    schedule = config.schedule
    warmup = f"{schedule.warmup} warm-up of {schedule.warmup_steps:,} steps"
    if schedule.effective_warmup_steps >= config.training.steps:
        warmup += " (the whole run or longer)"
    parts = config.batch_sequences // processes // micro_batch
    shared = f", {processes} processes ({config.training.parallel})" if processes > 1 else ""
    if dataset is None:
        data = "not prepared yet"
    else:
        passes = f"{total / dataset.train_tokens:.2f} epochs"
        passes = "one batch of them" if config.data.windows == "fixed" else passes
        data = f"{dataset.train_tokens:,} training tokens, {passes}; {describe_validation(dataset)}"
    rows = {
        "steps": f"{config.training.steps:,}" + (f", of which {done:,} are done" if done else ""),
        "device": f"{device.type}, {config.training.precision}{shared}",
        "model": f"{parameters:,} parameters, {parameters - embeddings:,} without embeddings",
        "blocks": _blocks(config.model, config.init_from),
        "batch": f"{batch_tokens:,} tokens per step: {config.batch_sequences} sequences of "
        f"{config.model.context}" + (f", in {parts} micro-batches" if parts > 1 else ""),
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
        f"{warmup if schedule.effective_warmup_steps else 'no warm-up'}, then {schedule.body}",
        "data": f"{data}; {config.data.tokenizer} vocabulary of {model.vocab_size:,}",
    }
    return "\n".join([config.name, *labeled(rows.items()), f"  directory  {directory}"])


def _blocks(config: ModelConfig, init_from: str | None) -> str:
    """The options of the blocks, and where their weights come from, in one line."""
    kind = (config.norm.type or "layer") if PLACEMENTS[config.norm.placement].has_norms else "none"
    final = "with" if has_final_norm(config) else "without"
    initial = f"{config.init.regime} weights" + (" x 1/sqrt(2L)" if depth_scaled(config) else "")
    parts = [
        f"{config.layers} x {config.norm.placement}",
        "no norms" if kind == "none" else f"{kind} norm, {final} a final one",
        config.mlp.activation,
        initial if init_from is None else f"weights of {init_from}",
        *([f"muP from width {config.mup_base_width}"] if config.mup_base_width else []),
    ]
    return "; ".join(parts)
