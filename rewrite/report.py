"""The report: what fired, what did not and why, how exact, what it cost, whether it paid. A rich text, and data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from .attention_report import TRAIN, AttentionReport, Place
from .claims import ARCHITECTURE
from .evidence import Evidence
from .memory_plan import MemoryPlan
from .pass_base import Application, Estimate, Log, Note, Refusal
from .printed import printed
from .program import Program, target_name
from .target import Gain


@dataclass(frozen=True)
class Size:
    """How big a program is: entries of the parameters it reads, bytes of all weights it reads, calls by op."""

    parameters: int
    bytes: int
    ops: dict[str, int]

    @classmethod
    def of(cls, program: Program) -> Size:
        read = {str(node.target) for node in program.graph.find_nodes(op="get_attr") if node.target in program.weights}
        storages = {program.weights.storage(name): program.weights[name] for name in sorted(read)}
        ops = Counter(target_name(node) for node in program.graph.nodes if node.op == "call_function")
        return cls(
            sum(weight.meta.numel() for weight in storages.values() if weight.kind == "parameter"),
            sum(weight.meta.numel() * weight.meta.element_size() for weight in storages.values()),
            dict(ops.most_common()),
        )


@dataclass(frozen=True)
class Timing:
    """Median time of one call on the example, both programs alternating in one run, in milliseconds."""

    before_ms: float
    after_ms: float
    target: str

    @property
    def ratio(self) -> float:
        """after / before; below 1 is faster."""
        return self.after_ms / self.before_ms


@dataclass
class Report:
    """What ``optimize`` did.

    Attributes:
        model: the user's class.
        target: where it should pay.
        log: every application, refusal, note and estimate.
        captured: what the capture had to do, one sentence each.
        before, after: sizes of the captured and of the rewritten program.
        gains: what the target said about each rewrite that is for speed.
        evidence: what verification measured; None if nothing fired or ``check=False``.
        timing: both programs measured on the target; None if the target was not run.
        seconds: time spent, by phase.
    """

    model: str
    target: str
    log: Log
    captured: tuple[str, ...]
    before: Size
    after: Size
    gains: dict[str, Gain] = field(default_factory=dict)
    evidence: Evidence | None = None
    timing: Timing | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def applications(self) -> tuple[Application, ...]:
        return tuple(self.log.applications)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(self.log.refusals)

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(self.log.notes)

    @property
    def plan(self) -> MemoryPlan | None:
        """What was chosen block by block, if there was a budget of memory."""
        return self.log.plan

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        return tuple(self.log.estimates)

    @property
    def attentions(self) -> tuple[AttentionReport, ...]:
        """What each rewrite that replaces attentions made of them; ``tautomer.draw(report, path)`` draws it.

        As the applications have it: what is written in place may settle later than what a rewrite planned.
        """
        made, why = {a.id for a in self.applications}, {refusal.id: refusal.reason for refusal in self.refusals}

        def settled(place: Place) -> Place:
            if (place.id in made) == place.replaced:
                return place
            return replace(place, replaced=not place.replaced, reason="" if place.id in made else why.get(place.id, place.reason))

        return tuple(replace(found, places=tuple(map(settled, found.places))) for found in self.log.attentions)

    def fired(self, rewrite: str) -> int:
        """How many times a rewrite fired."""
        return sum(application.rewrite == rewrite for application in self.log.applications)

    def as_dict(self) -> dict[str, Any]:
        """The same facts as plain data (JSON-ready)."""
        data = asdict(self)
        del data["log"]["_refused"]
        data["log"]["attentions"] = [asdict(found) for found in self.attentions]
        return data

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.model} for {self.target}", style="bold")
        yield from (Text(f"  {note}", style="dim") for note in self.captured)
        if self.plan is not None:
            yield self.plan
        yield self._fired()
        if self.notes:
            yield Group(*(Text(f"  {_where(note)}: {note.text}") for note in self.notes))
        yield from map(self._estimated, dict.fromkeys(estimate.what for estimate in self.estimates))
        yield from self.attentions
        if self._other_refusals() or self.log.misses:
            yield self._refused()
        yield Group(*map(Text, self._measured()))

    def __str__(self) -> str:
        return printed(self)

    def _fired(self) -> Table | Text:
        counts = Counter(application.rewrite for application in self.log.applications)
        if not counts:
            return Text("  nothing fired")
        table = Table("fired", "times", "first at", box=None, pad_edge=True)
        for name, count in counts.items():
            first = next(a for a in self.log.applications if a.rewrite == name)
            table.add_row(name, str(count), _where(first))
        return table

    def _estimated(self, what: str) -> Table:
        table = Table(what, "predicted", "measured", box=None, pad_edge=True)
        for estimate in self.estimates:
            if estimate.what == what:
                table.add_row(Text(_where(estimate)), f"{estimate.predicted:.3f}", f"{estimate.measured:.3f}")
        return table

    def _refused(self) -> Table:
        table = Table("did not fire", "times", "why", box=None, pad_edge=True)
        for (name, reason), count in Counter((r.rewrite, r.reason.partition("\n")[0]) for r in self._other_refusals()).items():
            table.add_row(name, str(count), Text(reason))  # a shape in brackets is no markup
        for miss in self.log.misses:
            table.add_row(miss.rule, "–", Text(f"nearest miss: {miss.sentence}"))
        return table

    def _other_refusals(self) -> list[Refusal]:
        """Those that are not told place by place."""
        told = {place.id for attentions in self.attentions for place in attentions.places}
        return [refusal for refusal in self.refusals if refusal.id not in told]

    def _measured(self) -> list[str]:
        lines = [
            f"  parameters {self.before.parameters:,} → {self.after.parameters:,}, "
            f"calls {sum(self.before.ops.values())} → {sum(self.after.ops.values())}"
        ]
        lines += [f"  {name}: {gain.note}" for name, gain in self.gains.items() if gain.pays and self.fired(name)]
        if self.evidence is not None:
            lines += _answered_for(self.evidence, {found.method for found in self.attentions})
        elif self.log.applications:
            lines.append("  NOT CHECKED (check=False)")
        if self.timing is not None:
            lines.append(
                f"  {self.timing.target}: {self.timing.before_ms:.2f} ms → {self.timing.after_ms:.2f} ms "
                f"({self.timing.ratio:.2f} of the time, medians of alternating calls)"
            )
        lines.append("  " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items()))
        return lines


def _answered_for(evidence: Evidence, told: set[str]) -> list[str]:
    """What was checked of the rewrites that claim equality, what was measured of those that do not."""
    lines = [f"  checked: {evidence}"] if evidence.sizes else []
    lines += [f"  not checked: {note}" for note in evidence.notes]
    lines += [f"  {difference}" for difference in evidence.differences]
    if evidence.moved is not None and len(evidence.differences) > 1:
        lines.append(f"  in all: outputs differ from the original's by {evidence.moved:.1e} (relative)")
    if any(d.claim == ARCHITECTURE.name and d.rewrite not in told for d in evidence.differences):
        lines.append(f"  {TRAIN}")
    return lines


def _where(entry: Application | Refusal | Note | Estimate) -> str:
    return entry.id.split("@", 1)[-1]
