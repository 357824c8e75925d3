"""The configuration: YAML and command-line overrides in, one validated `Config` out.

`options` lists every option, `values` the kinds of value they take, `loading` reads and checks
them. Nothing here imports torch, so that `--help`, `--print-config` and error messages are
immediate. `python -m gpt.config` prints the JSON schema for editors.
"""

from gpt.config.loading import base_of, load, option_paths, read, validate
from gpt.config.options import (
    Config,
    DataConfig,
    Differences,
    Generation,
    HubConfig,
    MixedSource,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    Sampling,
    ScheduleConfig,
    SourceConfig,
    describe_differences,
    may_change,
)
from gpt.config.strict_yaml import MAX_BYTES, read_yaml
from gpt.config.trees import leaves, merge, nest
from gpt.config.values import (
    Between,
    Count,
    Device,
    FileName,
    FileNames,
    Hours,
    Rate,
    SampleCount,
    Seconds,
    Section,
    Seed,
    Weights,
    WorkerCount,
    is_reserved,
)

__all__ = [
    "MAX_BYTES",
    "Between",
    "Config",
    "Count",
    "DataConfig",
    "Device",
    "Differences",
    "FileName",
    "FileNames",
    "Generation",
    "Hours",
    "HubConfig",
    "MixedSource",
    "ModelConfig",
    "NormConfig",
    "OptimizerConfig",
    "Rate",
    "SampleCount",
    "Sampling",
    "ScheduleConfig",
    "Seconds",
    "Section",
    "Seed",
    "SourceConfig",
    "Weights",
    "WorkerCount",
    "base_of",
    "describe_differences",
    "is_reserved",
    "leaves",
    "load",
    "may_change",
    "merge",
    "nest",
    "option_paths",
    "read",
    "read_yaml",
    "validate",
]
