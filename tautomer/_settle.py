"""Rewrite as far as the result can be written back: what cannot is given up, with its sentence, and the rest is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from tautomer.backends.correspondence import Fault
from tautomer.passes.cleanup.drop_unused_weights import DropUnusedWeights
from tautomer.passes.cleanup.name_weights import NameWeights
from tautomer.rewrite.errors import UsageError, require
from tautomer.rewrite.pass_base import Application, Context, Log, Pass, Refusal
from tautomer.rewrite.pipeline import Outcome, run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.target import Target

LAST = (DropUnusedWeights, NameWeights)
_LAST_NAMES = {kind.name for kind in LAST}


class Plan(Protocol):
    """What is to be written back, and what stands against it."""

    @property
    def faults(self) -> tuple[Fault, ...]: ...


P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Job(Generic[P]):
    """One program to rewrite; ``plan`` says how a rewritten one is written back."""

    captured: Program
    passes: tuple[Pass, ...]
    context: Context
    target: Target | None
    plan: Callable[[Program], P]

    def settle(self, check: bool) -> tuple[Program, Outcome, P]:
        """The rewriting without what cannot be written back, each of which is a refusal.

        Raises:
            Refused: not even the captured program can be.
        """
        refusals: list[Refusal] = []
        checked = self.context.data is not None  # what measures is not done twice, if it can be written back at once
        while True:
            program, outcome, plan = self.attempt(refusals, check and checked)
            if plan.faults:
                refusals += self.blamed(plan.faults[0], outcome, refusals)
            elif checked or not check:
                break
            else:
                checked = True
        placed = {refusal.rewrite for refusal in refusals if "@" in refusal.id}
        for refusal in refusals:
            if "@" in refusal.id or refusal.rewrite not in placed:
                outcome.log.refuse(refusal)
        return program, outcome, plan

    def attempt(self, refusals: Sequence[Refusal], check: bool) -> tuple[Program, Outcome, P]:
        program = self.captured.copy()
        given_up = {refusal.id for refusal in refusals}
        context = replace(self.context, skip=(*self.context.skip, *given_up), log=Log())
        passes = [rewrite for rewrite in self.passes if rewrite.name not in given_up]
        try:
            outcome = run_passes(passes, program, context, target=self.target, check=check)
        except UsageError as short:  # of a budget: what was given up is not among what it counts on
            raise _without(refusals, short) if refusals else short from None
        return program, outcome, self.plan(program)

    def blamed(self, fault: Fault, outcome: Outcome, refusals: Sequence[Refusal]) -> list[Refusal]:
        """The applications to give up for a fault: those at the paths it blames, else all of the last pass it needs."""
        known = {refusal.id for refusal in refusals}  # a pass that was told to skip these and did not goes as a whole
        for path in fault.blame:
            made = [a for a in outcome.log.applications if path_of(a.id) == path]
            found = [a for a in made if a.id not in known]
            if found:
                return [_given_up(application, fault) for application in found]
        names = dict.fromkeys(a.rewrite for a in reversed(outcome.log.applications))
        wholes = [Refusal(name, name, _sentence(fault)) for name in names if name not in _LAST_NAMES]
        mends = (w for w in wholes if fault not in self.attempt([*refusals, w], check=False)[2].faults)
        require(wholes, fault.reason)  # no rewrite is to blame: it cannot be written back as it is
        whole = next(mends, wholes[0])
        made = [a for a in outcome.log.applications if a.rewrite == whole.rewrite and path_of(a.id)]
        return [whole, *(_given_up(a, fault) for a in made)]


def path_of(entry: str) -> str:
    """The module path in the id of an application or a refusal."""
    return entry.partition("@")[2].rpartition("/")[0]


def _given_up(application: Application, fault: Fault) -> Refusal:
    return Refusal(application.rewrite, application.id, _sentence(fault), application.source)


def _without(refusals: Sequence[Refusal], error: UsageError) -> UsageError:
    """What is out of reach once something was given up, which is said."""
    names = ", ".join(dict.fromkeys(refusal.rewrite for refusal in refusals))
    what = f"{error.what}, without what was chosen and given up ({names}): {refusals[0].reason}"
    return UsageError(what, where=error.where, hint=f"{error.hint}; or tautomer.optimize(…), which writes to no module")


_GIVEN_UP = "it cannot be written back: "


def was_given_up(refusal: Refusal) -> bool:
    """Whether a rewrite was made, and only could not be written back."""
    return refusal.reason.startswith(_GIVEN_UP)


def _sentence(fault: Fault) -> str:
    return f"{_GIVEN_UP}{fault.reason}"
