"""A pass: one rewrite of a whole program, with a name, a claim and a source. What it did and declined goes to the log.

Every rewrite is a pass. A ``Rule`` (rules.py) is the local kind, written as two sides of an equation; a rewrite that
must see the whole graph (residual streams, budgets) derives from ``Pass`` directly: it computes its facts once, plans,
then applies.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import fx

from .attention_report import AttentionReport
from .calibration import Data
from .claims import Claim
from .memory_plan import MemoryPlan
from .program import CHECKPOINT, PLAN, Program, path_of, source_of
from .target import Target

Phase = Literal["canonical", "raise", "rewrite", "choose", "cleanup"]
FIXED = "tautomer_fixed"
"""Metadata of a node that must stay as it is: the sentence that says why."""


IN_A_CHECKPOINT = "it is in a checkpoint, which keeps what it is given and nothing of what it computes: nothing would be freed"


def fixed(node: fx.Node) -> str | None:
    """Why no rewrite may take ``node`` away or put another value in its place; None if one may."""
    return node.meta.get(FIXED)


Purpose = Literal["speed", "memory", "size", "form"]
"""What a rewrite is for. Only "speed" asks the target whether it pays; "form" rewrites enable others or tidy up."""


@dataclass(frozen=True)
class Application:
    """One place where a rewrite fired.

    Attributes:
        rewrite: the pass's name.
        id: ``name@place``; what ``skip=`` takes.
        source: the user's source line, if known.
        note: what is worth saying about this application, or "".
        error: the worst relative error measured in float64 on the rewritten region, None if it was not checked alone.
        claim: the name of what the rewrite promises, "algebraic".
    """

    rewrite: str
    id: str
    source: str | None = None
    note: str = ""
    error: float | None = None
    claim: str = ""


@dataclass(frozen=True)
class Refusal:
    """One place where a rewrite declined, with the sentence that says why.

    Attributes: as of ``Application``; ``reason`` is the sentence, on lines of its own followed by the graph around the
        place where the new nodes could not stand there.
    """

    rewrite: str
    id: str
    reason: str
    source: str | None = None


@dataclass(frozen=True)
class Note:
    """Something a user should know that is neither an application nor a refusal. Attributes as of ``Application``."""

    rewrite: str
    id: str
    text: str
    source: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A number that a rewrite predicted of one place, and what was measured there when all places were rewritten.

    Attributes: as of ``Application``;
        what: the number, "relative error of the output".
    """

    rewrite: str
    id: str
    what: str
    predicted: float
    measured: float
    source: str | None = None


@dataclass(frozen=True)
class Miss:
    """How far a rule came at the place where it came furthest.

    Attributes:
        rule: its name.
        depth: how many ops of the pattern had matched.
        expected: what the pattern asks for, as text.
        found: what the graph has there, as text.
        node: the node of the graph nearest to the disagreement, by name.
        pattern_line: the line of the rule, ``file:line: code``.
        source: the user's source line, if known.
        reason: the sentence of ``where``, if the whole pattern matched.
        place: the module path, or the node's name.
    """

    rule: str
    depth: int
    expected: str
    found: str
    node: str
    pattern_line: str
    source: str | None
    reason: str
    place: str

    @property
    def sentence(self) -> str:
        if self.reason:
            return f"{self.rule} matched at {self.place} but refused: {self.reason}"
        at = f" ({self.source})" if self.source else ""
        return f"{self.rule} matched {self.depth} ops, then wanted {self.expected} at {self.place} and found {self.found}{at}"

    def __str__(self) -> str:
        """The sentence on lines of its own, with the line of the rule that asked."""
        if self.reason:
            return self.sentence + (f"\n    {self.source}" if self.source else "")
        lines = (("wanted", self.expected, self.pattern_line), ("found", self.found, self.source))
        told = [f"    {word:<6} {what}" + (f"\n           {where}" if where else "") for word, what, where in lines]
        return "\n".join([f"{self.rule} matched {self.depth} ops at {self.place}, then", *told])


@dataclass
class Log:
    """What happened, in order.

    Attributes:
        misses: the nearest miss of each rule that found nothing, if something looked like it.
        kept: what the backward of the captured program keeps, in bytes, and ``plan`` what was chosen, if there is a budget of
            memory.
        estimates: errors, predicted and measured.
        attentions: what each rewrite that replaces attentions made of them.
    """

    applications: list[Application] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    kept: int | None = None
    plan: MemoryPlan | None = None
    estimates: list[Estimate] = field(default_factory=list)
    attentions: list[AttentionReport] = field(default_factory=list)
    _refused: set[Refusal] = field(default_factory=set, repr=False, compare=False)

    def refuse(self, refusal: Refusal) -> None:
        """Enter a refusal, once."""
        if refusal not in self._refused:
            self._refused.add(refusal)
            self.refusals.append(refusal)


@dataclass
class Context:
    """What a pass runs under: the log it writes, and which applications the user admits.

    Attributes:
        log: receives every application and every refusal.
        check: hold every application to its claim on its region.
        only: if not empty, only applications whose id or module path is listed (a prefix counts) fire, and those that are of
            the program as a whole.
        skip: applications whose id or module path is listed (a prefix counts) do not fire.
        fuel: how many more applications may fire in all; None is no limit. For bisection.
        data: example calls for a pass that measures; None if the user gave none.
        target: where a pass that spends time measures it; None if nobody said.
    """

    log: Log = field(default_factory=Log)
    check: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    fuel: int | None = None
    data: Data | None = None
    target: Target | None = None

    def lets(self, rewrite: Pass, node: fx.Node) -> bool:
        """Whether the user, and the plan if there is one, lets ``rewrite`` fire at ``node``."""
        if rewrite.purpose == "memory" and PLAN in node.meta and rewrite.name not in node.meta[PLAN].rewrites:
            return False
        if self.fuel is not None and self.fuel <= 0:
            return False
        of_the_whole = node.op == "output"  # weights that nothing reads any more, say: no module is chosen by leaving them
        if self.only and not of_the_whole and not any(_selects(entry, rewrite, node) for entry in self.only):
            return False
        return not any(_selects(entry, rewrite, node) for entry in self.skip)

    def admits(self, rewrite: Pass, node: fx.Node) -> bool:
        """Whether ``rewrite``, which fits at ``node``, may fire there: the user lets it, and the node is not fixed, nor would it
        keep less in a part that is run again, which are refusals. Spends no fuel."""
        if not self.lets(rewrite, node):
            return False
        again = rewrite.purpose == "memory" and CHECKPOINT in node.meta
        reason = IN_A_CHECKPOINT if again else fixed(node)
        if reason is not None:
            self.refused(rewrite, node, reason)
        return reason is None

    def applied(self, rewrite: Pass, node: fx.Node, note: str = "", error: float | None = None) -> None:
        """Record an application at ``node`` and spend its fuel."""
        if self.fuel is not None:
            self.fuel -= 1
        self.log.applications.append(
            Application(rewrite.name, identify(rewrite, node), source_of(node), note, error, rewrite.claim.name)
        )

    def refused(self, rewrite: Pass, node: fx.Node, reason: str) -> None:
        """Record a refusal at ``node``; the same refusal is recorded once."""
        self.log.refuse(Refusal(rewrite.name, identify(rewrite, node), reason, source_of(node)))

    def noted(self, rewrite: Pass, node: fx.Node, text: str) -> None:
        """Record what a user should know about ``node``."""
        self.log.notes.append(Note(rewrite.name, identify(rewrite, node), text, source_of(node)))

    def estimated(self, rewrite: Pass, node: fx.Node, what: str, predicted: float, measured: float) -> None:
        """Record what was predicted of ``node`` and what was measured there."""
        self.log.estimates.append(Estimate(rewrite.name, identify(rewrite, node), what, predicted, measured, source_of(node)))


class Pass(ABC):
    """A rewrite of a whole program.

    Class attributes:
        name: kebab-case of the class name; set automatically.
        claim: what it promises.
        paper: where it comes from ("" for folklore).
        phase: when it runs in a recipe.
        purpose: what it is for.
    """

    name: ClassVar[str]
    claim: ClassVar[Claim]
    paper: ClassVar[str] = ""
    phase: ClassVar[Phase] = "rewrite"
    purpose: ClassVar[Purpose] = "form"

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, program: Program, context: Context) -> None:
        """Rewrite ``program`` in place, recording applications and refusals in ``context``."""

    def __str__(self) -> str:
        return self.name


def identify(rewrite: Pass, node: fx.Node) -> str:
    """The id of an application: ``fold-norm-shift@transformer.h.0.attn/linear_3``."""
    path = path_of(node)
    return f"{rewrite.name}@{path}/{node.name}" if path else f"{rewrite.name}@{node.name}"


def _selects(entry: str, rewrite: Pass, node: fx.Node) -> bool:
    """Whether a user's ``skip=`` or ``only=`` entry names this application: by pass, by id, or by module path."""
    path = path_of(node)
    return entry in (rewrite.name, identify(rewrite, node)) or path == entry or path.startswith(entry + ".")
