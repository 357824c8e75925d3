"""Whether the arms were matched: the same inputs, the same initial weights, the same software.

A comparison is fair only if cells of one seed and setting differ in nothing but their arm and
learning rate. Each of them is compared with the first, by the digests that training wrote into
metrics.jsonl and environment.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt.compare.analysis.outcomes import Outcome

SAME_FACTS = ("data_fingerprint", "device", "torch", "git_commit")  # of environment.json


@dataclass(frozen=True)
class Match:
    """What matched between cells of one seed and setting, over all comparisons with the first.

    Attributes:
        cells: cells that were compared with the first of their seed and setting.
        same_inputs: those that saw the same sequences in the same order, up to the last that both
            logged; batches may be of different sizes.
        parameters: parameter tensors that both have, by name and shape.
        equal: those that started with the same values.
        rescaled: those that started with the same values times a constant.
        exceptions: what did not match, in words.
    """

    cells: int
    same_inputs: int
    parameters: int
    equal: int
    rescaled: int
    exceptions: tuple[str, ...]


def match(outcomes: Sequence[Outcome]) -> Match:
    """Compare every cell with the first one of its seed and setting."""
    first: dict[str, Outcome] = {}
    cells = same = parameters = equal = rescaled = 0
    exceptions: list[str] = []
    everywhere: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.verdict is None or not outcome.inputs:  # diverged before its first update
            continue
        exceptions += _other_facts(outcome, everywhere)
        key = repr((outcome.seed, outcome.cell.setting))
        other = first.setdefault(key, outcome)
        if other is outcome:
            continue
        names = f"{outcome.cell.id} and {other.cell.id}"
        cells += 1
        if _same_inputs(outcome.inputs, other.inputs or {}):
            same += 1
        else:
            exceptions.append(f"{names} saw different inputs")
        ours, others = (_fact(each, "initial_weights") for each in (outcome, other))
        for name in ours.keys() & others.keys():
            a, b = ours[name], others[name]
            if a["shape"] != b["shape"]:
                continue
            parameters += 1
            equal += a["sha256"] == b["sha256"]
            rescaled += a["sha256"] != b["sha256"] and a["signs"] == b["signs"]
            if a["signs"] != b["signs"]:
                exceptions.append(f"{names} start with different values of {name}")
    return Match(cells, same, parameters, equal, rescaled, tuple(exceptions))


def _same_inputs(mine: Mapping[int, str], theirs: Mapping[int, str]) -> bool:
    """Whether the digests agree at the last number of sequences after which both have one."""
    common = mine.keys() & theirs.keys()
    return not common or mine[max(common)] == theirs[max(common)]


def _other_facts(outcome: Outcome, first: dict[str, Outcome]) -> list[str]:
    """How a run differs from the first run; for its data, from the first with its data config.

    Args:
        first: fact and data config -> the first run; this run is added where there is none.
    """
    found = []
    for fact in SAME_FACTS:
        data = outcome.cell.config.data if fact == "data_fingerprint" else ""
        other = first.setdefault(f"{fact} {data}", outcome)
        one, two = _fact(outcome, fact), _fact(other, fact)
        if one != two:
            found.append(f"{outcome.cell.id} and {other.cell.id} differ in {fact}: {one} and {two}")
    return found


def _fact(outcome: Outcome, name: str) -> Any:
    environment = outcome.environment or {}
    return {**environment, **environment.get("versions", {})}.get(name)
