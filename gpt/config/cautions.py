"""Options of a config that are valid, but that its author may not have meant.

Two mistakes cost many a run: to set an option that the chosen variant does not read, and to switch
to another optimizer with the learning rate of the one before. Both are decided by layers: the base
files, the file and the flags, each on top of those before. Only what was set together with a
variant, or on top of it, was meant for it; so a flag that switches `optimizer.name` causes no
warning about the momentum in the file, nor does an arm of a comparison about its base.

These are warnings, in place of a default rate for each optimizer: a good rate also depends on the
width, the batch and the schedule, and a file's rate stays whatever else a flag changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt.config.options import Config, DataConfig, SourceConfig
from gpt.config.trees import leaves
from gpt.config.values import Only, Section, TunedFor

Layers = Sequence[Mapping[str, Any]]
Settings = dict[str, list[tuple[int, Any]]]  # option -> the layers that set it, and their values


def cautions(config: Config, layers: Layers) -> list[str]:
    """A line for each option that has no effect, or whose value was chosen for another variant.

    Args:
        config: the options, resolved.
        layers: the nested mappings that were merged into it, the lowest first.
    """
    settings: Settings = {}
    for index, layer in enumerate(layers):
        for key, value in leaves(layer):
            settings.setdefault(key, []).append((index, value))
    return list(_of_section(config, settings, ""))


def _of_section(section: Section, settings: Settings, prefix: str) -> Iterator[str]:
    """The lines about the options of a section, whose dotted paths begin with `prefix`."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, Only):
                yield from _without_effect(section, settings, prefix, name, mark)
            elif isinstance(mark, TunedFor):
                yield from _tuned_for_another(section, settings, prefix, name, mark)
        if isinstance(value, Section):
            yield from _of_section(value, settings, f"{prefix}{name}.")


def _without_effect(
    section: Section, settings: Settings, prefix: str, name: str, mark: Only
) -> Iterator[str]:
    variant, key = getattr(section, mark.other), f"{prefix}{name}"
    if mark.applies(variant) or (name in SourceConfig.model_fields and _is_inherited(section)):
        return
    since = _last_layer(settings, f"{prefix}{mark.other}")
    for each in settings:
        layer = _last_layer(settings, each)
        meant = layer >= since and layer not in _resolved_layers(section, settings, prefix)
        if (each == key or each.startswith(f"{key}.")) and meant:
            yield f"{each} has no effect {mark.describe(variant, prefix)}"


def _is_inherited(section: Section) -> bool:
    """Whether other sources inherit the options of this one, and may read what it does not."""
    return isinstance(section, DataConfig) and bool(section.mix or section.validation)


def _resolved_layers(section: Section, settings: Settings, prefix: str) -> set[int]:
    """Layers that list every option of a section, as the config.yaml of a run does."""
    names = [n for n in type(section).model_fields if not isinstance(getattr(section, n), Section)]
    return set.intersection(*({i for i, _ in settings.get(f"{prefix}{n}", ())} for n in names))


def _tuned_for_another(
    section: Section, settings: Settings, prefix: str, name: str, mark: TunedFor
) -> Iterator[str]:
    key, other = f"{prefix}{name}", f"{prefix}{mark.other}"
    layer, variant = _last_layer(settings, key), getattr(section, mark.other)
    below = [value for index, value in settings.get(other, ()) if index <= layer]
    before = str([type(section).model_fields[mark.other].default, *below][-1])
    if layer < _last_layer(settings, other) and mark.differ(before, variant):
        value = f"{key} {getattr(section, name):g}"
        origin = f"was set for {other} {before}" if layer >= 0 else f"is the default, for {before}"
        yield f"{value} {origin}; {variant} may need another: set {key} too"


def _last_layer(settings: Settings, key: str) -> int:
    """The highest layer that sets an option; -1 if it has its default."""
    return settings.get(key, [(-1, None)])[-1][0]
