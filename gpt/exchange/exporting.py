"""A trained network as a folder in the Hugging Face layout, which transformers loads offline.

    config.json, generation_config.json, model.safetensors     written here
    tokenizer.json, tokenizer_config.json                      by gpt/data/tokenizer.py
    README.md                                                  by card.py

Writing them does not need transformers. A network that no layout can express is refused with
the options that have no counterpart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint import save_tensors
from gpt.config import ModelConfig
from gpt.config.layouts import LAYOUTS, Layout, without_counterpart
from gpt.config.source import WEIGHTS
from gpt.data.tokenizer import Encoding, to_hf
from gpt.errors import InputError
from gpt.io.files import PARTIAL_PREFIX, fsync
from gpt.model.gpt2 import GPT


def layout_for(model: ModelConfig) -> str:
    """The `model_type` of the layout that can express a network, a key of `LAYOUTS`.

    Raises:
        InputError: none can; names the options without counterpart.
    """
    placements = {layout.placement: kind for kind, layout in LAYOUTS.items()}
    kind = placements.get(model.norm.placement)
    if kind is None:
        raise InputError(
            f"model.norm.placement: {model.norm.placement} has no counterpart in transformers; "
            + " and ".join(f"{p} has {LAYOUTS[k].architecture}" for p, k in placements.items())
        )
    missing = without_counterpart(LAYOUTS[kind], model)
    if missing:
        options = "; ".join(f"model.{option}: {value}" for option, value in missing.items())
        raise InputError(
            f"{options}: without counterpart in {LAYOUTS[kind].architecture} of transformers, "
            "so the network cannot be exported"
        )
    return kind


def check_target(out: Path) -> None:
    """Check that a folder can be made at `out`, which does not exist or is an empty folder.

    Raises:
        InputError: something is there, or `out` is the working directory or within a file.
    """
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"{out}: cannot be made, because {parent} is not a folder")
    if out.resolve() == Path.cwd():  # it is replaced, and the shell would be left without a folder
        raise InputError(f"{out}: is the working directory; name a new folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: exists and is not a folder; name another one")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty, and nothing in it is overwritten; name another one")


def export(model: GPT, encoding: Encoding, out: Path, card: str) -> None:
    """Write a network and its vocabulary as the folder `out`; after an error, nothing is left.

    Args:
        card: the text of README.md.

    Raises:
        InputError: the network cannot be expressed, or `out` holds something.
        OSError: the folder cannot be written.
    """
    check_target(out)
    kind = layout_for(model.config)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), encoding.eot_token)
    texts = {
        "config.json": _to_json(
            {
                "architectures": [LAYOUTS[kind].architecture],
                "model_type": kind,
                **LAYOUTS[kind].to_config(model.config),
                "vocab_size": model.vocab_size,
                **ends,
                "pad_token_id": None,  # or OPT would not train the embedding of end of text
            }
        ),
        "generation_config.json": _to_json({**ends, "max_length": model.config.context}),
        **to_hf(encoding, model.config.context),
        "README.md": card,
    }
    tensors = to_tensors(LAYOUTS[kind], model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{PARTIAL_PREFIX}{out.name}-{os.getpid()}")
    try:
        partial.mkdir()
        for name, text in texts.items():
            (partial / name).write_text(text, "utf-8")
        save_tensors(tensors, partial / WEIGHTS, {"format": "pt"})
        shutil.copymode(partial / "config.json", partial / WEIGHTS)
        for path in partial.iterdir():
            fsync(path)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
        fsync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.no_grad()
def to_tensors(layout: Layout, model: GPT) -> dict[str, Tensor]:
    """The tensors of a layout, in fp32 on the CPU, with the numbers of our network.

    A scale of the logits, which a tied head has with some initial weights, becomes part of the last
    norm: s W (γ x + β) = W (s γ x + s β).
    """
    own = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    last = f"blocks.{model.config.layers - 1}.mlp_norm"
    last = "final_norm" if "final_norm.weight" in own else last
    for name in (f"{last}.weight", f"{last}.bias"):
        if name in own:
            own[name] = own[name] * model.logit_scale
    tensors = {}
    for part in layout.modules(model.config.layers):
        if f"{part.ours}.weight" not in own:  # a tied head
            continue
        weight = own[f"{part.ours}.weight"]
        bias = own.get(f"{part.ours}.bias", weight.new_zeros(len(weight)))
        for name, matrix, vector in zip(
            part.theirs, weight.chunk(len(part.theirs)), bias.chunk(len(part.theirs)), strict=True
        ):
            if part.extra_rows:
                matrix = torch.cat([matrix.new_zeros(part.extra_rows, matrix.shape[1]), matrix])
            matrix = matrix.T if part.transposed else matrix
            tensors[f"{name}.weight"] = matrix.clone(memory_format=torch.contiguous_format)
            if part.biased:
                tensors[f"{name}.bias"] = vector.clone()
    return tensors


def _to_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
