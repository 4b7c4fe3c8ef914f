"""Hold a rewritten program to its claim.

    oracle = the captured graph promoted to float64        (interpret.py: not model.double())

1. Forward. Both programs run in float64, at several sizes. Outputs must agree; every value that a pass declared to
   stand in a relation (a stream without its mean) must stand in it. A disagreement is located at its first node.
2. Gradients, where the claim speaks of them, block by block (gradients.py).
3. The whole once in the user's own dtype: no less accurate against the oracle than the original was.

A claim that is none of equality is not judged but measured: how far the outputs move. What they are (structure, shape, dtype,
finite where they were) must stay even then.

Dropout is off on both sides: two programs may draw their random numbers in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .claims import Claim
from .errors import ClaimBroken
from .evidence import (
    AMPLIFIED,
    FORWARD,
    GRADIENT,
    ROUNDING,
    Evidence,
    by_a_rounding,
    errors_against,
    floating,
    magnitude,
    relative_error,
)
from .gradients import compare_gradients
from .interpret import interpret
from .program import Program, line, place, source_of
from .relations import related
from .samples import Sample, samples


def check_program(old: Program, new: Program, claim: Claim, *, own_dtype: bool = True) -> Evidence:
    """Check that ``new`` keeps ``claim``, which is one of equality, towards ``old``.

    Raises:
        ClaimBroken: with the first node that differs, its source line, and the number.
    """
    forward, sizes, relations, notes = 0.0, [], 0, []
    original = rewritten = 0.0
    recorded: tuple[Sample, Mapping[str, Any]] | None = None
    for sample in samples(old):
        try:
            outputs, values = _record(old, sample)
        except Exception as failure:  # a size the model itself does not take is no counterexample
            if recorded is None:
                raise
            notes.append(f"not checked at {sample.sizes}: the original fails there ({type(failure).__name__})")
            continue
        recorded = recorded or (sample, values)
        error, held = _compare(old, new, sample, outputs, values, claim)
        forward, relations = max(forward, error), relations + held
        sizes.append(sample.sizes)
        if own_dtype:
            a, b = _own_dtype(old, new, sample, outputs)
            original, rewritten = max(original, a), max(rewritten, b)
    if own_dtype:
        _on_the_example(old, new, original)
    gradient, count = None, 0
    if claim.gradient in ("bitwise", "equal") and recorded is not None:
        gradient, count, unchecked = compare_gradients(old, new, recorded[1])
        notes.extend(unchecked)
        if not gradient <= GRADIENT:
            raise ClaimBroken(f"gradients differ by {gradient:.1e} in float64; the claim is '{claim.name}'")
    return Evidence(forward, gradient, count, original if own_dtype else None, rewritten if own_dtype else None,
                    tuple(sizes), relations, tuple(notes))  # fmt: skip


@torch.no_grad()
def measure_program(old: Program, new: Program) -> float:
    """How far the outputs of ``new`` are from those of ``old``: the worst relative error in float64, on the example's values.

    An output that is not floating counts the share of its entries that differ.

    Raises:
        ClaimBroken: an output is of another kind, or not finite where it was.
    """
    moved = None
    for sample in samples(old):
        try:
            before = interpret(old, sample.inputs, noise=False)
        except Exception:  # a size the model itself does not take
            if moved is None:
                raise
            continue
        try:
            after = interpret(new, sample.inputs, noise=False)
        except Exception as failure:
            problem = str(failure).splitlines()[0]
            raise ClaimBroken(f"the rewritten program does not run at {sample.sizes}: {problem}") from failure
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            if (change := _another_kind(a, b)) is not None:
                raise ClaimBroken(f"output {index} {change} at {sample.sizes}")
        if moved is None:  # other samples are random: how far outputs move there says nothing of the user's data
            wide = (interpret(program, sample.inputs, dtype=torch.float64, noise=False) for program in (new, old))
            moved = max((_moved(a, b) for a, b in zip(*wide, strict=True)), default=0.0)
    return moved or 0.0


def _another_kind(old: Any, new: Any) -> str | None:
    """How ``new`` is no value of the same kind as ``old``, as a phrase."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if type(old) is type(new) and old == new else f"was {old!r} and is {new!r} now"
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"was {old.dtype}{list(old.shape)} and is {new.dtype}{list(new.shape)} now"
    lost = floating(old) and not bool((new.isfinite() | ~old.isfinite()).all())
    return "is not finite any more" if lost else None


def _moved(new: Any, old: Any) -> float:
    if isinstance(old, Tensor) and not floating(old):
        return float((new != old).double().mean()) if old.numel() else 0.0
    return relative_error(new, old)


@torch.no_grad()
def _record(program: Program, sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The float64 outputs of the original, and the value of every node by name."""
    values: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if program.expression(node) is None:  # W, t(W): a recorded weight would be a second model
            values[node.name] = value

    return interpret(program, sample.inputs, dtype=torch.float64, observe=keep, noise=False), values


@torch.no_grad()
def _compare(
    old: Program, new: Program, sample: Sample, outputs: tuple[Any, ...], values: Mapping[str, Any], claim: Claim
) -> tuple[float, int]:
    """Worst output error and number of relations held, in float64."""
    held, lies = 0, list[tuple[fx.Node, float]]()
    first: list[tuple[fx.Node, float]] = []
    state: dict[str, Any] = {}  # buffers that the graph writes: after the run, what it left in them

    def compare(node: fx.Node, value: Any) -> None:
        nonlocal held
        name = node.meta.get("origin", node.name)
        if node.op == "get_attr":
            state[node.name] = value
        if node.op in ("get_attr", "placeholder") or name not in values or not isinstance(value, Tensor):
            return
        stated = "relation" in node.meta
        if not stated and first:
            return  # nothing more to locate
        held += stated
        # What is left after removing a mean may be tiny: it is measured on what it was removed from.
        floor = magnitude(values[name]) if stated else 0.0
        error = relative_error(value, related(node, values[name]) if stated else values[name], floor=floor)
        if error > FORWARD:
            (lies if stated else first).append((node, error))

    results = interpret(new, sample.inputs, dtype=torch.float64, observe=compare, noise=False)
    left = [relative_error(value, values[name]) for name, value in state.items() if name in values]
    errors = list(map(relative_error, results, outputs))
    error = max([*errors, *left], default=0.0)
    if error > FORWARD and _beyond_rounding(old, sample, outputs, errors, left):
        node, size = (lies + first or [(new.output, error)])[0]
        raise ClaimBroken(
            f"outputs differ by {error:.1e} in float64 at {sample.sizes}; the claim is '{claim.name}'. "
            f"First different value: {line(node)} at {place(node)}, by {size:.1e}",
            where=source_of(node),
        )
    if lies and lies[0][1] > max(_conditioning(old, sample, outputs), default=0.0):
        node, size = lies[0]
        raise ClaimBroken(
            f"{line(node)} at {place(node)} is not what the rewrite says it is, by {size:.1e}", where=source_of(node)
        )
    return error, held


def _beyond_rounding(
    old: Program, sample: Sample, outputs: tuple[Any, ...], errors: Sequence[float], left: Sequence[float]
) -> bool:
    """Whether an error is more than the amplified rounding of that output; of what a buffer is left with, than that of any."""
    moved = _conditioning(old, sample, outputs)
    pairs = [*zip(errors, moved, strict=True), *((error, max(moved, default=0.0)) for error in left)]
    return any(error > FORWARD and error > limit for error, limit in pairs)


def _conditioning(program: Program, sample: Sample, outputs: tuple[Any, ...]) -> list[float]:
    """How far each of the original's own outputs moves when every weight moves by one float64 rounding, times a safety.

    Asked only when the plain tolerance fails: a program that amplifies one rounding beyond it cannot be held to it.
    """
    generator = torch.Generator().manual_seed(0)

    def jittered(name: str) -> Tensor:
        return by_a_rounding(program.weights.value(name, torch.float64), generator)

    moved = interpret(program, sample.inputs, dtype=torch.float64, weight=jittered, noise=False)
    return [AMPLIFIED * by if math.isfinite(by) else 0.0 for by in map(relative_error, moved, outputs)]


def allowed(original: float, dtype: torch.dtype) -> float:
    """The error a rewritten program may have in its own dtype where the original has ``original``."""
    return max(2 * original + ROUNDING * torch.finfo(dtype).eps, FORWARD)


@torch.no_grad()
def _own_dtype(old: Program, new: Program, sample: Sample, oracle: tuple[Any, ...]) -> tuple[float, float]:
    """Errors of both programs in their own dtype against the oracle.

    Raises:
        ClaimBroken: the rewritten one is less accurate than twice the original plus a few roundings.
    """
    before, after = interpret(old, sample.inputs, noise=False), interpret(new, sample.inputs, noise=False)
    worst = (0.0, 0.0)
    for index, (a, b, o) in enumerate(zip(before, after, oracle, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and b.dtype != a.dtype:
            raise ClaimBroken(f"output {index} was {a.dtype} and is {b.dtype} now")
        was, now = errors_against(a, b, o)
        limit = allowed(was, a.dtype) if isinstance(a, Tensor) and floating(a) else 0.0
        if not now <= limit:
            name = str(getattr(a, "dtype", type(a).__name__)).removeprefix("torch.")
            raise ClaimBroken(f"in {name} output {index} is off by {now:.1e} where the original is off by {was:.1e}")
        worst = (max(worst[0], was), max(worst[1], now))
    return worst


@torch.no_grad()
def _on_the_example(old: Program, new: Program, original: float) -> None:
    """The user's own example, in the user's dtype: both sides may differ by what each may differ from the oracle.

    Raises:
        ClaimBroken: they differ by more.
    """
    before, after = interpret(old, old.example, noise=False), interpret(new, old.example, noise=False)
    for index, (a, b) in enumerate(zip(before, after, strict=True)):
        _, error = errors_against(a, b, a)
        limit = original + allowed(original, a.dtype) if isinstance(a, Tensor) and floating(a) else 0.0
        if not error <= limit:
            raise ClaimBroken(
                f"on the example itself output {index} moves by {error:.1e}; the original's own error is {original:.1e}"
            )
