"""The model card of an exported network: README.md, which hubs show first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gpt import __version__
from gpt.config import Config
from gpt.config.source import HUB_NAME

# Options that name files, or things on the hub. Of a path, only the last part goes into the card,
# since a card may be published; what may be a name on the hub (OWNER/NAME) stays as it is.
OF_FILES = {"path", "vocabulary", "cache_dir", "spare_dir"}
OF_FILES_OR_HUB = {"init_from", "name"}
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [steadygpt, {architecture}]
---

# {name}

A language model of {parameters:,} parameters, trained with steadygpt {version} and exported after
{step:,} updates ({tokens:,} tokens).

```python
from transformers import pipeline
generate = pipeline("text-generation", model=".")  # the folder of this file
print(generate({prompt!r}, max_new_tokens=100)[0]["generated_text"])
```

| | |
|---|---|
{rows}

The prompt and the new tokens together must fit into the context. Losses are in nats per token. The
validation text was not used in training.

## License

Not stated: whoever publishes this model chooses a license that suits the training text, and adds it
as `license:` to the first lines of this file.

## Config

All options of the run; `data_fingerprint` identifies the prepared training and validation tokens.

```yaml
{config}```
"""


def model_card(
    config: Config,
    *,
    architecture: str,
    parameters: int,
    vocabulary: str,
    step: int,
    environment: dict[str, Any],
    losses: dict[str, float],
) -> str:
    """The text of README.md.

    Args:
        vocabulary: its kind and size, in words.
        step: updates made.
        environment: the run's environment.json.
        losses: training and validation losses by name, in nats per token.
    """
    options = _without_folders(config.model_dump(mode="json"))
    rows = {
        "architecture": architecture,
        "context": f"{config.model.context:,} tokens",
        "vocabulary": vocabulary,
        "training data": f"source: {config.data.source}",
        "data fingerprint": environment.get("data_fingerprint"),
        "initial weights": options["init_from"],
        **{name: f"{loss:.4f}" for name, loss in losses.items()},
    }
    return CARD.format(
        name=config.name,
        architecture=architecture,
        parameters=parameters,
        version=__version__,
        step=step,
        tokens=step * config.batch_sequences * config.model.context,
        prompt=config.sampling.prompt or "The",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
        config=yaml.safe_dump(options, sort_keys=False, allow_unicode=True),
    )


def _without_folders(value: Any, option: str = "") -> Any:
    """Options, nested, in which paths are shortened to their last parts."""
    if isinstance(value, dict):
        return {key: _without_folders(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each, option) for each in value]
    if not isinstance(value, str) or option not in OF_FILES | OF_FILES_OR_HUB:
        return value
    kept = option in OF_FILES_OR_HUB and HUB_NAME.fullmatch(value)
    return value if kept else Path(value).name
