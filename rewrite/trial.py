"""A rule tried without a model: its own left side, in every spelling, is the model.

    for every sample and every spelling:    it fires, both sides agree in float64, gradients too, and once is enough
    for every near miss:                    it does not fire, or the two sides are still equal

A near miss is a spelling with one literal, axis, flag or dtype changed, with one more reader inside, or with a weight that
is computed at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .compose import compose
from .emit import GraphOps
from .errors import ClaimBroken, Refused
from .evidence import FORWARD, relative_error
from .interpret import interpret
from .metadata import Metadata, refresh
from .ops import form_of
from .pass_base import Context
from .program import Program
from .rules import Rule
from .symbols import SYMBOLS, AnyOf, Call, Fact, Variable, trace

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = ("weight", "parameter")
_FEW = 4  # spellings of a sample whose errors are measured in every dtype


@dataclass(frozen=True)
class Trial:
    """What a trial saw: the rule's row of the trust table.

    Attributes:
        spellings: how many ways of writing the left side were tried, operands exchanged included.
        fired: at how many of them the rule fired.
        near_misses: how many near misses were tried.
        refused: how many of them did not fire.
        harmed: at how many it fired and changed the result; at the others it was right all the same.
        error: the worst relative error over all spellings, in float64.
        errors: by dtype, the worst relative errors of the right and of the left side against the left side in float64, on
            the same rounded operands; a dtype in which the rule does not fire or the ops do not run is left out.
        failures: what is wrong with the rule, one sentence each.
    """

    spellings: int = 0
    fired: int = 0
    near_misses: int = 0
    refused: int = 0
    harmed: int = 0
    error: float = 0.0
    errors: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


def try_rule(rule: Rule) -> Trial:
    """Try ``rule`` on its own samples.

    Raises:
        ClaimBroken: it has no samples, a spelling does not fire, the sides disagree, it fires twice, or a near miss
            fires and changes the result.

    Example: ``assert try_rule(FoldNormShift()).spellings``
    """
    trial = examine(rule)
    if trial.failures:
        raise ClaimBroken(trial.failures[0])
    return trial


def examine(rule: Rule) -> Trial:
    """The same, without raising: what is wrong is counted, and said in ``failures``."""
    samples = list(rule.samples())
    if not samples:
        return Trial(failures=(f"{rule.name} has no samples, so nothing can be said about it",))
    failures: list[str] = []
    outcomes = [_fires_once(rule, program, failures) for sample in samples for program in spellings(rule, sample)]
    errors = [error for error in outcomes if error is not None]
    misses = [_near_miss(rule, program, failures) for program in near_misses(rule, samples[0])]
    by_dtype = {dtype: _errors(rule, samples, dtype) for dtype in DTYPES}
    return Trial(
        len(outcomes),
        len(errors),
        len(misses),
        misses.count("refused"),
        misses.count("harmed"),
        max(errors, default=0.0),
        {dtype: (max(new), max(old)) for dtype, pairs in by_dtype.items() if pairs for new, old in [zip(*pairs, strict=True)]},
        tuple(failures),
    )


def _fires_once(rule: Rule, program: Program, failures: list[str]) -> float | None:
    """The error in float64; None if the rule does not fire."""
    original, context = program.copy(), Context()
    rule.run(program, context)
    if not context.log.applications:
        why = [refusal.reason for refusal in context.log.refusals]
        failures.append(f"{rule.name} does not fire on {original}\n{why[0] if why else ''}")
        return None
    error = _difference(original, program)
    if error > FORWARD and rule.claim.exact:
        failures.append(f"{rule.name} changes the result by {error:.1e} on\n{original}\n->\n{program}")
    again = Context()
    rule.run(program, again)
    if again.log.applications:
        failures.append(f"{rule.name} fires again on its own result:\n{program}")
    return error


def _near_miss(rule: Rule, program: Program, failures: list[str]) -> Literal["refused", "harmed", "equal"]:
    """What came of a near miss. Nothing but the pattern and ``where`` protects it: the check is off."""
    original, context = program.copy(), Context(check=False)
    rule.run(program, context)
    if not context.log.applications:
        return "refused"
    if not rule.claim.exact or (error := _difference(original, program)) <= FORWARD:
        return "equal"
    failures.append(f"{rule.name} fires on a near miss and changes the result by {error:.1e}:\n{original}\n->\n{program}")
    return "harmed"


def _errors(rule: Rule, samples: Sequence[Mapping[str, Any]], dtype: torch.dtype) -> list[tuple[float, float]]:
    """Errors of the right and of the left side, run in ``dtype``, against the left side in float64."""
    pairs = []
    for program in (p for sample in samples for p in islice(_plain_spellings(rule, _in_dtype(sample, dtype)), _FEW)):
        original, context = program.copy(), Context(check=False)
        rule.run(program, context)
        if context.log.applications:
            with contextlib.suppress(RuntimeError):  # a kernel that this CPU has not in this dtype
                exact = interpret(original, original.example, dtype=torch.float64)
                new, old = (interpret(p, p.example) for p in (program, original))
                pairs.append((max(map(relative_error, new, exact)), max(map(relative_error, old, exact))))
    return pairs


def _in_dtype(sample: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``sample`` with floating tensors of ``dtype``, and literals that name the dtype of the first of them."""
    floats = {name: x for name, x in sample.items() if isinstance(x, Tensor) and x.is_floating_point()}
    own = next((x.dtype for x in floats.values()), None)
    literals = {name: dtype for name, x in sample.items() if own is not None and x is own}
    return {**sample, **literals, **{name: x.to(dtype) for name, x in floats.items()}}


def _difference(a: Program, b: Program) -> float:
    outputs = (interpret(p, p.example, dtype=torch.float64) for p in (a, b))
    return max(map(relative_error, *reversed(list(outputs))))


# -- the left side as a program -------------------------------------------------------------------------------


def spellings(rule: Rule, sample: Mapping[str, Any]) -> Iterator[Program]:
    """One program per way of writing the left side, and one more per exchange of a commutative pair."""
    for program in _plain_spellings(rule, sample):
        yield program.copy()
        for node in program.graph.nodes:
            if node.op == "call_function" and _commutes(node):
                swapped = program.copy()
                twin = next(n for n in swapped.graph.nodes if n.name == node.name)
                twin.args = (twin.args[1], twin.args[0], *twin.args[2:])
                yield swapped


def _commutes(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor) and isinstance(node.args[1], fx.Node)


def _plain_spellings(rule: Rule, sample: Mapping[str, Any]) -> Iterator[Program]:
    variables, roots = trace(rule.before)
    for chosen in _choices(roots, {}):
        yield _spell(variables, roots, chosen, sample, rule.name)


def _choices(roots: Any, chosen: dict[int, Any]) -> Iterator[dict[int, Any]]:
    """Every assignment of the alternatives that are reached."""
    open_choice = next(_open(roots, chosen), None)
    if open_choice is None:
        yield chosen
        return
    for alternative in open_choice.alternatives:
        yield from _choices(roots, {**chosen, id(open_choice): alternative})


def _open(pattern: Any, chosen: dict[int, Any]) -> Iterator[AnyOf]:
    if isinstance(pattern, AnyOf):
        if id(pattern) in chosen:
            yield from _open(chosen[id(pattern)], chosen)
        else:
            yield pattern
    for child in pattern.args if isinstance(pattern, Call) else pattern if isinstance(pattern, (list, tuple)) else ():
        yield from _open(child, chosen)


def _spell(variables: tuple[Variable, ...], roots: tuple[Any, ...], chosen: dict[int, Any], sample: Mapping[str, Any],
           name: str, runtime: str = "") -> Program:  # fmt: skip
    tensors = {v: sample[v.name] for v in variables if isinstance(sample[v.name], Tensor)}
    weights = {v.name: tensor for v, tensor in tensors.items() if v.kind in _WEIGHTS and v.name != runtime}
    inputs = {v.name: tensor for v, tensor in tensors.items() if v.name not in weights}

    def results(op: GraphOps, nodes: Mapping[str, fx.Node]) -> list[Any]:
        bound, made = {**sample, **nodes}, dict[int, Any]()

        def value(pattern: Any) -> Any:
            if isinstance(pattern, Variable):
                return bound[pattern.name]
            if isinstance(pattern, AnyOf):
                return value(chosen[id(pattern)])
            if isinstance(pattern, Fact):
                return getattr(op, pattern.name)(value(pattern.of))
            if isinstance(pattern, Call):
                if id(pattern) not in made:
                    args, kwargs = _arguments(pattern)
                    made[id(pattern)] = op.apply(pattern.op, *map(value, args), **{k: value(v) for k, v in kwargs.items()})
                return made[id(pattern)]
            return [value(p) for p in pattern] if isinstance(pattern, (list, tuple)) else pattern

        return [value(root) for root in roots]

    return compose(name, weights, inputs, results)


def _arguments(call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a symbolic call as a user would write them: trailing defaults left out, keywords by name."""
    form = form_of(call.op.target)
    if form is None:
        return list(call.args), {}
    schema = call.op.target._schema.arguments  # type: ignore[attr-defined]
    positional = [a for a, argument in zip(call.args, schema, strict=True) if not argument.kwarg_only]
    while positional and _plain_default(positional[-1], form.defaults[len(positional) - 1]):
        positional.pop()
    named = ((s.name, a, s.default_value) for a, s in zip(call.args, schema, strict=True) if s.kwarg_only)
    return positional, {name: a for name, a, default in named if not _plain_default(a, default)}


def _plain_default(x: Any, default: Any) -> bool:
    return not isinstance(x, SYMBOLS) and type(x) is type(default) and x == default


# -- near misses ----------------------------------------------------------------------------------------------


def near_misses(rule: Rule, sample: Mapping[str, Any]) -> Iterator[Program]:
    """The first spellings, each with one thing wrong."""
    for program in _plain_spellings(rule, sample):
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            for place, argument in (*enumerate(node.args), *node.kwargs.items()):
                for wrong in _wrong(argument):
                    yield from _changed(program, node.name, place, wrong)
            if node not in program.output.all_input_nodes and isinstance(node.meta["val"], Tensor):
                yield _with_reader(program, node.name)
    variables, roots = trace(rule.before)
    for variable in variables:
        if variable.kind in _WEIGHTS and isinstance(sample[variable.name], Tensor):
            yield _spell(variables, roots, next(_choices(roots, {})), sample, rule.name, runtime=variable.name)


def _wrong(x: Any) -> list[Any]:
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, int):
        return [x + 1, x - 1]
    if isinstance(x, float):
        return [x * 1.5, -x]
    if isinstance(x, torch.dtype):
        return [torch.float16]
    if isinstance(x, str):
        return [x[:-2] + x[:-3:-1]]
    if isinstance(x, (list, tuple)) and all(isinstance(i, int) for i in x):
        return [[i - 1 for i in x], [*x, x[0] - 1]] if x else []
    return []


def _changed(program: Program, name: str, place: int | str, wrong: Any) -> Iterator[Program]:
    changed = program.copy()
    node = next(n for n in changed.graph.nodes if n.name == name)
    if isinstance(place, int):
        node.update_arg(place, wrong)
    else:
        node.update_kwarg(place, wrong)
    metadata = Metadata(changed.fake_mode)
    try:
        for node in changed.graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = refresh(node, metadata, {})
        interpret(changed, changed.example, dtype=torch.float64)
    except (Refused, RuntimeError, IndexError, ValueError, TypeError):
        return  # this wrong value is no program at all
    yield changed


def _with_reader(program: Program, name: str) -> Program:
    copied = program.copy()
    node = next(n for n in copied.graph.nodes if n.name == name)
    copied.output.args = ((*copied.output.args[0], node),)  # type: ignore[misc]
    return copied
