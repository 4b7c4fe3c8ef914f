"""Run an ordered tuple of passes on a program, and answer for the result.

    ask the target whether it pays → apply → check against the captured program → hand back, or roll back

The check is made once, on the whole chain of rewrites. Only if it fails are the passes replayed one by one, each
checked, and the one that broke its claim is rolled back and reported; the others stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from time import perf_counter

from ._torch import no_new_guards
from .claims import ALGEBRAIC, BITWISE, FORWARD_ORDER, GRADIENT_ORDER, Claim
from .engine import apply_rules
from .errors import ClaimBroken
from .evidence import Evidence
from .pass_base import Context, Log, Pass, Refusal
from .program import Program
from .rules import Rule, note_misses
from .target import Gain, Target
from .verification import check_program


@dataclass
class Outcome:
    """What a pipeline did to a program.

    Attributes:
        log: applications, refusals and notes.
        gains: what the target said about each pass that asked, by name.
        withdrawn: passes whose claim broke, with the sentence.
        evidence: of the whole; None if nothing fired or checking was off.
        seconds: time spent by phase ("rewriting", "verification").
    """

    log: Log
    gains: dict[str, Gain] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run_passes(
    passes: Sequence[Pass],
    program: Program,
    context: Context | None = None,
    *,
    target: Target | None = None,
    check: bool = True,
) -> Outcome:
    """Rewrite ``program`` in place.

    Args:
        passes: in order; neighbouring rules of one phase run together to a fixpoint.
        target: asked whether a pass whose purpose is speed pays; None asks nobody.
        check: hold every application, and the whole, to its claim.
    """
    context = context or Context()
    context.check = check
    outcome = Outcome(context.log)
    program.forget()
    original = program.copy()
    start = perf_counter()
    admitted = [p for p in passes if _pays(p, program, target, outcome)]
    outcome.seconds["profit"] = perf_counter() - start
    fuel = context.fuel
    _apply_all(admitted, program, context, outcome)
    if not check or not context.log.applications:
        return outcome
    start = perf_counter()
    try:
        outcome.evidence = check_program(original, program, claim_of(context.log, passes))
    except ClaimBroken:
        context.fuel = fuel
        context.log.applications.clear()
        context.log.notes.clear()
        context.log.misses.clear()
        program.restore(original.copy())
        outcome.evidence = _apply_one_by_one(admitted, program, original, context, outcome)
    outcome.seconds["verification"] = perf_counter() - start
    return outcome


def _pays(rewrite: Pass, program: Program, target: Target | None, outcome: Outcome) -> bool:
    """Ask the target, once per pass whose purpose is speed; a refusal is reported with both numbers."""
    gain = target.gain(rewrite.name, program) if target is not None and rewrite.purpose == "speed" else None
    if gain is None:
        return True
    outcome.gains[rewrite.name] = gain
    if not gain.pays:
        assert target is not None
        outcome.log.refuse(Refusal(rewrite.name, rewrite.name, f"does not pay on {target.name}: {gain.note}"))
    return gain.pays


def _apply_all(passes: Sequence[Pass], program: Program, context: Context, outcome: Outcome) -> None:
    start = perf_counter()
    with no_new_guards(program.fake_mode):
        for group in _groups(passes):
            _apply(group, program, context)
    outcome.seconds["rewriting"] = outcome.seconds.get("rewriting", 0.0) + perf_counter() - start


def _apply(group: Sequence[Pass], program: Program, context: Context) -> None:
    rules = [p for p in group if isinstance(p, Rule)]
    if rules:
        apply_rules(rules, program, context)
        note_misses(rules, program, context)
        return
    for rewrite in group:
        rewrite.run(program, context)
    program.graph.lint()


def _groups(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Neighbouring rules of one phase together, every other pass alone."""
    groups: list[list[Pass]] = []
    for (is_rule, _), members in groupby(passes, key=lambda p: (isinstance(p, Rule), p.phase)):
        found = list(members)
        groups.extend([found] if is_rule else [[p] for p in found])
    return groups


def _apply_one_by_one(
    passes: Sequence[Pass], program: Program, original: Program, context: Context, outcome: Outcome
) -> Evidence | None:
    """Replay, checking after every pass; one whose claim breaks is undone and named.

    Rules that run together are admitted one after the other: each joins those that stood the check before it.
    """
    evidence: Evidence | None = None
    for group in _groups(passes):
        standing: list[Pass] = []
        for rewrite in group:
            before, fired = program.copy(), len(context.log.applications)
            noted, fuel = len(context.log.notes), context.fuel
            with no_new_guards(program.fake_mode):
                _apply([*standing, rewrite], program, context)
            try:
                if len(context.log.applications) > fired:
                    evidence = check_program(original, program, claim_of(context.log, passes))
                standing.append(rewrite)
            except ClaimBroken as broken:
                program.restore(before)
                context.fuel = fuel
                outcome.withdrawn[rewrite.name] = broken.what
                reason = f"rolled back, its claim broke: {broken.what}"
                context.log.refuse(Refusal(rewrite.name, rewrite.name, reason, broken.where))
                del context.log.applications[fired:]
                del context.log.notes[noted:]
    return evidence


def claim_of(log: Log, passes: Sequence[Pass]) -> Claim:
    """The claim of a chain of rewrites: the weakest forward and the weakest gradient among those that fired."""
    fired = {application.rewrite for application in log.applications}
    claims = [rewrite.claim for rewrite in passes if rewrite.name in fired] or [BITWISE]
    forward = max((claim.forward for claim in claims), key=FORWARD_ORDER.index)
    gradient = max((claim.gradient for claim in claims), key=GRADIENT_ORDER.index)
    return replace(ALGEBRAIC("the weakest of the rewrites that fired"), forward=forward, gradient=gradient)
