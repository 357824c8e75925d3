"""steadygpt: a small GPT-2 training framework that measures and compares training stability.

    from gpt import load, train
    result = train(load("quickstart"))

Names are imported when they are first used, so that `import gpt` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.config import Config, load
    from gpt.errors import InputError
    from gpt.model.gpt2 import GPT
    from gpt.run.directory import RunResult
    from gpt.run.loading import load_run
    from gpt.training import train

__version__ = "0.2.0"
__all__ = [
    "GPT",
    "Config",
    "InputError",
    "RunResult",
    "load",
    "load_run",
    "train",
]

_HOMES = {
    "GPT": "gpt.model.gpt2",
    "Config": "gpt.config.options",
    "InputError": "gpt.errors",
    "RunResult": "gpt.run.directory",
    "load": "gpt.config.loading",
    "load_run": "gpt.run.loading",
    "train": "gpt.training",
}

if not TYPE_CHECKING:  # hidden from type checkers, which therefore report unknown names

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'gpt' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)
