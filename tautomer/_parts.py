"""A model that cannot be exported whole, rewritten part by part: the user's class around emitted submodules.

The shell is the user's own modules, copied one level deep so that their weights are shared and the original keeps its
children; each part stands where the submodule stood.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

from torch import nn

from tautomer.rewrite.attention_report import Place
from tautomer.rewrite.evidence import Evidence
from tautomer.rewrite.pass_base import Application, Estimate, Log, Note, Refusal
from tautomer.rewrite.report import Report, Size

Entry = TypeVar("Entry", Application, Refusal, Note, Estimate, Place)


def assemble(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of ``model`` with the submodules at the paths of ``parts`` replaced; everything else is shared."""
    made: dict[nn.Module, nn.Module] = {}

    def shell(module: nn.Module, path: str) -> nn.Module:
        if path in parts:
            return parts[path]
        if module not in made:
            twin = made[module] = copy.copy(module)
            for group in ("_parameters", "_buffers", "_modules"):
                twin.__dict__[group] = copy.copy(module.__dict__[group])
            for name, child in module._modules.items():
                if child is not None:
                    twin._modules[name] = shell(child, f"{path}.{name}" if path else name)
        return made[module]

    return shell(model, "")


def merge(model: str, target: str, reports: Mapping[str, Report]) -> Report:
    """One report of all parts, whose entries carry the part's path."""
    log = Log()
    for path, report in reports.items():
        log.applications += [_placed(entry, path) for entry in report.log.applications]
        for refusal in report.log.refusals:
            log.refuse(_placed(refusal, path))
        log.notes += [_placed(entry, path) for entry in report.log.notes]
        log.estimates += [_placed(entry, path) for entry in report.log.estimates]
        told = report.attentions
        log.attentions += [replace(x, places=tuple(_placed(place, path) for place in x.places)) for x in told]
    captured = (
        f"captured in parts: {', '.join(reports) if any(reports) else 'the whole'}; the rest runs as the user wrote it",
        *(f"{path}: {note}" for path, report in reports.items() for note in report.captured),
    )
    found = list(reports.values())
    gains = {f"{path} {name}": gain for path, report in reports.items() for name, gain in report.gains.items()}
    seconds = {phase: sum(report.seconds.get(phase, 0.0) for report in found) for phase in found[0].seconds}
    answered = [report.evidence for report in found if report.evidence is not None]
    evidence = reduce(Evidence.also, answered) if answered else None
    before, after = _sum([report.before for report in found]), _sum([report.after for report in found])
    return Report(model, target, log, captured, before, after, gains, evidence, None, seconds)


def _placed(entry: Entry, path: str) -> Entry:
    """``entry`` with the part's path in front of its place."""
    name, at, place = entry.id.partition("@")
    return replace(entry, id=f"{name}@{path}/{place}") if at else replace(entry, id=f"{name}@{path}")


def _sum(sizes: Sequence[Size]) -> Size:
    ops: dict[str, int] = {}
    for size in sizes:
        for name, count in size.ops.items():
            ops[name] = ops.get(name, 0) + count
    return Size(sum(s.parameters for s in sizes), sum(s.bytes for s in sizes), ops)
