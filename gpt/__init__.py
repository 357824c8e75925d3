"""steadygpt: a small GPT-2 training framework that measures and compares training stability.

    from gpt import generate, load, plot, train
    result = train(load("quickstart", {"training.steps": 100}), "runs/short")
    print(generate(result, "def "))
    plot(result, "runs/quickstart")

Names are imported when they are first used, so that `import gpt` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.config import Config, load
    from gpt.errors import InputError
    from gpt.model.gpt2 import GPT
    from gpt.run.directory import RunResult
    from gpt.run.loading import TrainedRun, generate, load_run
    from gpt.training import train
    from gpt.watch.curves import read_metrics
    from gpt.watch.picture import plot
    from gpt.watch.table import list_runs

__version__ = "0.2.0"
__all__ = [
    "GPT",
    "Config",
    "InputError",
    "RunResult",
    "TrainedRun",
    "generate",
    "list_runs",
    "load",
    "load_run",
    "plot",
    "read_metrics",
    "train",
]

_HOMES = {
    "GPT": "gpt.model.gpt2",
    "Config": "gpt.config.options",
    "InputError": "gpt.errors",
    "RunResult": "gpt.run.directory",
    "TrainedRun": "gpt.run.loading",
    "generate": "gpt.run.loading",
    "list_runs": "gpt.watch.table",
    "load": "gpt.config.loading",
    "load_run": "gpt.run.loading",
    "plot": "gpt.watch.picture",
    "read_metrics": "gpt.watch.curves",
    "train": "gpt.training",
}

if not TYPE_CHECKING:  # hidden from type checkers, which therefore report unknown names

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'gpt' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__"])
