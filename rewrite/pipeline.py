"""Run an ordered tuple of passes on a program, and answer for the result.

    ask the target whether it pays → apply → check against the captured program → hand back, or roll back

The check is made once on every chain of rewrites that claim equality. Only if it fails are its passes replayed one by
one, each checked, and the one that broke its claim is rolled back and reported; the others stand. A rewrite that claims
less stands alone between two chains: what it did to the outputs is measured, and the chain after it is held to equality
with what it made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from time import perf_counter
from typing import Any

from ._torch import no_new_guards
from .claims import ALGEBRAIC, BITWISE, FORWARD_ORDER, GRADIENT_ORDER, Claim
from .engine import apply_rules
from .errors import ClaimBroken, Refused
from .evidence import Difference, Evidence
from .pass_base import Application, Context, Log, Pass, Purpose, Refusal
from .program import Program
from .rules import Rule, note_misses
from .target import Gain, Target
from .verification import check_program, measure_program


@dataclass
class Outcome:
    """What a pipeline did to a program.

    Attributes:
        log: applications, refusals and notes.
        gains: what the target said about each pass that asked, by name.
        withdrawn: passes whose claim broke, with the sentence.
        evidence: of the whole; None if nothing fired or checking was off.
        seconds: time spent by phase ("rewriting", "verification").
        purposes: what those that fired are for.
    """

    log: Log
    gains: dict[str, Gain] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    purposes: frozenset[Purpose] = frozenset()


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
    admitted = [p for p in passes if p.phase == "choose" or _pays(p, program, target, outcome)]
    outcome.seconds |= {"profit": perf_counter() - start, "rewriting": 0.0}
    before = original
    for chain in _chains(admitted):
        if _run_chain(chain, program, before, target, context, outcome, check):
            program.forget()
            before = program.copy()
    fired = {application.rewrite for application in context.log.applications}
    outcome.purposes = frozenset(p.purpose for p in passes if p.name in fired)
    if outcome.evidence is not None and outcome.evidence.differences:
        with _timed(outcome, "verification"):
            outcome.evidence = replace(outcome.evidence, moved=measure_program(original, program))
    return outcome


def _chains(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Neighbours that claim equality together, every other pass alone.

    Approximate gradients are no neighbours of equal ones, which would go unchecked beside them.
    """
    chains: list[list[Pass]] = []
    for (exact, _), members in groupby(passes, key=lambda p: (p.claim.exact, p.claim.gradient == "approximate")):
        found = list(members)
        chains.extend([found] if exact else [[p] for p in found])
    return chains


def _run_chain(
    members: Sequence[Pass], program: Program, before: Program, target: Target | None, context: Context, outcome: Outcome,
    check: bool,
) -> bool:  # fmt: skip
    """Apply and answer for a chain; whether anything fired. ``before`` is the program as it is now."""
    start, fuel = _mark(context.log), context.fuel
    try:
        return _try_chain(members, program, before, target, context, outcome, check)
    except _GaveUp as gave_up:
        program.restore(before.copy())
        context.fuel = fuel
        _forget(context.log, start)
        rewrite = gave_up.rewrite
        outcome.log.refuse(Refusal(rewrite.name, rewrite.name, f"rolled back: {gave_up}"))
        left = [member for member in members if member is not rewrite]
        return _run_chain(left, program, before, target, context, outcome, check)


def _try_chain(
    members: Sequence[Pass], program: Program, before: Program, target: Target | None, context: Context, outcome: Outcome,
    check: bool,
) -> bool:  # fmt: skip
    """As of ``_run_chain``.

    Raises:
        _GaveUp: a pass met what it cannot do with part of its work done.
    """
    start, fuel = _mark(context.log), context.fuel
    chain: list[Pass] = []
    for group in _groups(members):
        # A form is chosen for what was recognised by then, not for what was captured.
        paying = [p for p in group if p.phase != "choose" or _pays(p, program, target, outcome)]
        chain += paying
        with _timed(outcome, "rewriting"), no_new_guards(program.fake_mode):
            _apply(paying, program, context)
    if not check or len(context.log.applications) == start[0]:
        return False
    with _timed(outcome, "verification"):
        try:
            evidence: Evidence | None = _answer(chain, program, before, context.log, start)
        except ClaimBroken as broken:
            context.fuel = fuel
            _forget(context.log, start)
            program.restore(before.copy())
            evidence = None
            if len(chain) == 1:
                _withdraw(chain[0], broken, outcome)
            else:
                evidence = _apply_one_by_one(chain, program, before, context, outcome)
    if evidence is not None:
        outcome.evidence = outcome.evidence.also(evidence) if outcome.evidence is not None else evidence
    return evidence is not None


def _answer(chain: Sequence[Pass], program: Program, before: Program, log: Log, start: _Mark) -> Evidence:
    """What verification finds of the applications since ``start``.

    Raises:
        ClaimBroken: a claim does not hold.
    """
    claim = claim_of(log.applications[start[0] :], chain)
    if claim.exact:
        return check_program(before, program, claim)
    moved = measure_program(before, program)
    return Evidence(0.0, differences=(Difference(chain[0].name, chain[0].claim.name, moved),))


_Mark = tuple[int, ...]


def _mark(log: Log) -> _Mark:
    return tuple(map(len, _entries(log)))


def _forget(log: Log, mark: _Mark) -> None:
    for entries, length in zip(_entries(log), mark, strict=True):
        del entries[length:]


def _entries(log: Log) -> tuple[list[Any], ...]:
    """What a rewrite that is undone has not done; what it refused stays said."""
    return log.applications, log.notes, log.misses, log.estimates, log.attentions


@contextmanager
def _timed(outcome: Outcome, phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    outcome.seconds[phase] = outcome.seconds.get(phase, 0.0) + perf_counter() - start


def _pays(rewrite: Pass, program: Program, target: Target | None, outcome: Outcome) -> bool:
    """Ask the target, once per pass whose purpose is speed; a refusal is reported with both numbers.

    A form that targets choose among is left alone by a target that has no opinion.
    """
    gain = target.gain(rewrite.name, program) if target is not None and rewrite.purpose == "speed" else None
    if gain is None:
        return target is None or rewrite.phase != "choose"
    outcome.gains[rewrite.name] = gain
    if not gain.pays:
        assert target is not None
        outcome.log.refuse(Refusal(rewrite.name, rewrite.name, f"does not pay on {target.name}: {gain.note}"))
    return gain.pays


def _apply(group: Sequence[Pass], program: Program, context: Context) -> None:
    rules = [p for p in group if isinstance(p, Rule)]
    if rules:
        apply_rules(rules, program, context)
        note_misses(rules, program, context)
        return
    for rewrite in group:
        try:
            rewrite.run(program, context)
        except Refused as refusal:
            raise _GaveUp(rewrite, str(refusal)) from refusal
    program.graph.lint()


class _GaveUp(Exception):
    """A pass that sees the whole graph was refused in the middle of it."""

    def __init__(self, rewrite: Pass, reason: str) -> None:
        super().__init__(reason)
        self.rewrite = rewrite


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
    start = _mark(context.log)
    for group in _groups(passes):
        standing: list[Pass] = []
        for rewrite in group:
            before, mark, fuel = program.copy(), _mark(context.log), context.fuel
            with no_new_guards(program.fake_mode):
                _apply([*standing, rewrite], program, context)
            try:
                if len(context.log.applications) > mark[0]:
                    evidence = _answer(passes, program, original, context.log, start)
                standing.append(rewrite)
            except ClaimBroken as broken:
                program.restore(before)
                context.fuel = fuel
                _forget(context.log, mark)
                _withdraw(rewrite, broken, outcome)
    return evidence


def _withdraw(rewrite: Pass, broken: ClaimBroken, outcome: Outcome) -> None:
    """Report that ``rewrite`` was rolled back."""
    outcome.withdrawn[rewrite.name] = broken.what
    reason = f"rolled back, its claim broke: {broken.what}"
    outcome.log.refuse(Refusal(rewrite.name, rewrite.name, reason, broken.where))


def claim_of(applications: Sequence[Application], passes: Sequence[Pass]) -> Claim:
    """The claim of a chain of rewrites: the weakest forward and the weakest gradient among those that fired."""
    fired = {application.rewrite for application in applications}
    claims = [rewrite.claim for rewrite in passes if rewrite.name in fired] or [BITWISE]
    forward = max((claim.forward for claim in claims), key=FORWARD_ORDER.index)
    gradient = max((claim.gradient for claim in claims), key=GRADIENT_ORDER.index)
    return replace(ALGEBRAIC("the weakest of the rewrites that fired"), forward=forward, gradient=gradient)
