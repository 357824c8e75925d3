"""`python -m gpt.cli.reference > docs/configuration.md`: every option, from its definition.

Names, types, defaults and meanings come from the JSON schemas of the formats. Their units, and the
papers and programs that the options come from, are in the two tables here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gpt.compare.grid import Grid
from gpt.config import Config
from gpt.config.values import Section, unquoted
from gpt.io.console import set_encoding
from gpt.scaling.ladder import Ladder

Schema = Mapping[str, Any]

UNITS = {
    "data.learn_bytes": "bytes",
    "data.vocab_size": "tokens",
    "diagnostics.every": "updates",
    "diagnostics.sequences": "sequences",
    "diagnostics.sharpness": "sequences",
    "checkpoint.every": "updates",
    "checkpoint.keep": "checkpoints",
    "checkpoint.keep_every": "updates",
    "evaluation.every": "updates",
    "evaluation.give_up_after": "evaluations",
    "evaluation.patience": "evaluations",
    "evaluation.sequences": "sequences",
    "flops": "FLOPs",
    "hours": "hours",
    "model.attention.soft_cap": "logits",
    "model.context": "tokens",
    "model.layers": "blocks",
    "model.logit_soft_cap": "logits",
    "model.mlp.multiple": "widths",
    "model.mup_base_width": "channels",
    "model.width": "channels",
    "sampling.every": "updates",
    "sampling.tokens": "tokens",
    "sampling.top_k": "tokens",
    "schedule.rewarm": "updates",
    "schedule.warmup_steps": "updates",
    "search.most_runs": "runs",
    "tokens_per_parameter": "tokens per parameter",
    "training.batch_sequences": "sequences",
    "training.batch_tokens": "tokens",
    "training.log_every": "updates",
    "training.loss_chunk": "tokens",
    "training.micro_batch": "sequences",
    "training.nonfinite_limit": "updates",
    "training.process_timeout": "seconds",
    "training.processes": "processes",
    "training.steps": "updates",
}


def _arxiv(name: str, number: str) -> str:
    return f"[{name}](https://arxiv.org/abs/{number})"


SOURCES = {
    "data.tokenizer": _arxiv("Sennrich et al. 2016", "1508.07909") + "; GPT-2",
    "data.windows": "random: nanoGPT",
    "diagnostics.noise_scale": _arxiv("McCandlish et al. 2018", "1812.06162"),
    "diagnostics.sharpness": _arxiv("Cohen et al. 2022", "2207.14484"),
    "evaluation.patience": "Prechelt 1998",
    "model.attention.qk_norm": _arxiv("Henry et al. 2020", "2010.04245"),
    "model.attention.soft_cap": _arxiv("Gemma 2, 2024", "2408.00118"),
    "model.bias": "GPT-2",
    "model.dropout": "Srivastava et al. 2014",
    "model.init.depth_scaled": "GPT-2",
    "model.init.regime": "GPT-2; Glorot and Bengio 2010; "
    + _arxiv("Nguyen and Salazar 2019", "1910.05895"),
    "model.logit_soft_cap": _arxiv("Gemma 2, 2024", "2408.00118"),
    "model.mlp.activation": _arxiv("Hendrycks and Gimpel 2016", "1606.08415")
    + "; "
    + _arxiv("Shazeer 2020", "2002.05202"),
    "model.mlp.multiple": _arxiv("Vaswani et al. 2017", "1706.03762"),
    "model.norm.alpha0": _arxiv("Zhu et al. 2025", "2503.10622"),
    "model.norm.embedding": _arxiv("Kim et al. 2025", "2502.02732"),
    "model.norm.final_norm": "GPT-2",
    "model.norm.placement": "each: [the norm lab](norm-lab.md#where-the-norm-goes)",
    "model.norm.type": _arxiv("Ba et al. 2016", "1607.06450")
    + "; "
    + _arxiv("Zhang and Sennrich 2019", "1910.07467"),
    "model.parametrization": _arxiv("Yang et al. 2022", "2203.03466"),
    "model.tied_head": _arxiv("Press and Wolf 2017", "1608.05859"),
    "optimizer.clip": _arxiv("Pascanu et al. 2013", "1211.5063"),
    "optimizer.eps": _arxiv("Kingma and Ba 2015", "1412.6980"),
    "optimizer.independent_decay": _arxiv("Wortsman et al. 2023", "2309.14322"),
    "optimizer.name": "each: [gpt/optim.py](../gpt/optim.py)",
    "optimizer.weight_decay": _arxiv("Loshchilov and Hutter 2019", "1711.05101"),
    "sampling.min_p": _arxiv("Nguyen et al. 2024", "2407.01082"),
    "sampling.top_k": _arxiv("Fan et al. 2018", "1805.04833"),
    "sampling.top_p": _arxiv("Holtzman et al. 2020", "1904.09751"),
    "schedule.body": _arxiv("Loshchilov and Hutter 2017", "1608.03983"),
    "schedule.rewarm": _arxiv("Ibrahim et al. 2024", "2403.08763"),
    "schedule.warmup": _arxiv("Vaswani et al. 2017", "1706.03762"),
    "training.nonfinite": "rollback: " + _arxiv("Chowdhery et al. 2022", "2204.02311"),
    "training.parallel": _arxiv("Li et al. 2020", "2006.15704")
    + "; "
    + _arxiv("Zhao et al. 2023", "2304.11277"),
    "training.z_loss": _arxiv("Chowdhery et al. 2022", "2204.02311"),
}

START = """\
# Configuration

<!-- Made by `python -m gpt.cli.reference > docs/configuration.md`; a test compares the two. -->

A run is described by a YAML file. It names only what it changes; everything else has the default
that is listed here:

```yaml
base: quickstart               # a file, relative to this one, or the name of a shipped config
model:
  layers: 6
  norm: {placement: post}
schedule: {warmup: none}
```

Every option is also a flag, which overrides the file: `--model.norm.placement post`,
`--schedule.warmup-steps 50` (with `-` or `_`), `--model.bias` or `--no-model.bias`,
`--optimizer.clip null`. From Python: `load("quickstart", {"model.layers": 6})`.
`steadygpt train CONFIG --print-config` shows the result. An option that would have no effect, and a
combination that makes no sense, are refused with the reason.
[norm-lab.yaml](../configs/norm-lab.yaml) shows every variant in one file.

"null" as a default means that the option is not set.
"""
PARTS: dict[str, tuple[type[Section], str]] = {
    "A run": (Config, "The options of a config file."),
    "A comparison": (
        Grid,
        "The options of a grid file, which `steadygpt compare` runs. How to write one: "
        "[compare.md](compare.md#the-grid).",
    ),
    "A scaling study": (
        Ladder,
        "The options of a ladder file, which `steadygpt scaling` runs. How to write one: "
        "[scaling.md](scaling.md#a-ladder).",
    ),
}


def page() -> str:
    """The whole page, in Markdown."""
    text = [START]
    for title, (section, words) in PARTS.items():
        schema = section.model_json_schema()
        text.append(f"## {title}\n\n{words}\n")
        text += _tables(schema, schema.get("$defs", {}), "")
    return "\n".join(text)


def _tables(section: Schema, sections: Schema, prefix: str) -> Iterator[str]:
    """The table of a section, and then those of its subsections.

    Args:
        sections: all, by the names of their classes.
        prefix: dotted path of the section, with a dot at its end.
    """
    if prefix:
        yield f"### {prefix.rstrip('.')}\n\n{section['description']}\n"
    rows, below = [], []
    for name, option in section["properties"].items():
        inner = _section_in(option)
        if "$ref" in option:
            below.append((name, inner))
            continue
        path = f"{prefix}{name}"
        required = name in section.get("required", ())
        default = "required" if required else _value(option.get("default", {}))
        meaning = " ".join(option.get("description", "").split())
        if inner in ("Search", "Contrast"):
            below.append((name, inner))
            meaning += f" See [{path}](#{path})."
        unit, source = UNITS.get(path, ""), SOURCES.get(path, "")
        cells = [f"`{path}`", _kind(option), default, unit, _escaped(meaning), source]
        rows.append(f"| {' | '.join(cells)} |")
    if rows:
        yield "| option | value | default | unit | meaning | source |"
        yield "|---|---|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for name, inner in below:
        yield from _tables(sections[inner], sections, f"{prefix}{name}.")


def _section_in(option: Schema) -> str:
    """The class of the section, or of the sections, that are an option's value; else ""."""
    for branch in (option, option.get("items", {}), *option.get("anyOf", ())):
        if "$ref" in branch:
            return str(branch["$ref"]).rpartition("/")[2]
    return ""


def _kind(schema: Schema) -> str:
    """What a value may be, in words."""
    if "anyOf" in schema:
        kinds = [_kind(branch) for branch in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{name}`" for name in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "a mapping"
    if schema.get("type") == "array":
        return "a list" if "items" not in schema else f"a list: {_kind(schema['items'])}"
    words = {"integer": "integer", "number": "number", "boolean": "`true`, `false`"}
    words |= {"null": "`null`", "object": "a mapping"}
    kind = words.get(schema.get("type", ""), "path" if schema.get("format") == "path" else "text")
    if "minimum" in schema and (schema["minimum"], schema["maximum"]) != (0, 2**63 - 1):
        kind += f" from {_value(schema['minimum'])}"
        kind += f" to {_value(schema['maximum'])}" if schema["maximum"] < 1e6 else ""
    return kind


def _value(value: object) -> str:
    if value in ("", [], {}):
        return "none"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{int(value):,}" if abs(value) < 1e9 else f"{value:g}"
    return f"`{unquoted(value)}`"


def _escaped(text: str) -> str:
    """A text whose signs mean nothing in Markdown, except for its `code`."""
    text = text.replace("|", "\\|")
    parts = text.split("`")
    parts[::2] = [re.sub(r"([_*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(page())
