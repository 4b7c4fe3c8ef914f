"""Do two models agree? The contract of ``tautomer.verify``, for any two captured programs.

The oracle is the reference promoted to float64. The candidate is run as it is, with the weights it has:

    err(candidate, oracle)  <=  2 err(reference, oracle) + 64 eps      in their own dtype, at several sizes

so nobody chooses a tolerance: the candidate may not be less accurate than what there was. Gradients, when asked for,
are compared in float64 through the candidate's weight map if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .claims import Claim
from .errors import ClaimBroken, UsageError
from .evidence import FLOOR, GRADIENT, ROUNDING, Evidence, errors_against, floating, magnitude, relative_error
from .interpret import interpret
from .program import Program, arguments
from .samples import Sample, as_given, samples
from .verification import allowed
from .weights import evaluate
from .weights import leaves as leaves_of


def check_equivalence(reference: Program, candidate: Program, claim: Claim, *, gradients: bool = False) -> Evidence:
    """Check that ``candidate`` keeps ``claim`` towards ``reference``; they must take the same flat inputs.

    Raises:
        ClaimBroken: the outputs, or the gradients if asked for, do not agree. An AssertionError.
        UsageError: the two do not take the same inputs or do not give the same number of outputs.
    """
    if len(reference.placeholders) != len(candidate.placeholders):
        raise UsageError(
            f"{reference.name} takes {len(reference.placeholders)} inputs, {candidate.name} takes {len(candidate.placeholders)}"
        )
    if reference.signature.out_spec != candidate.signature.out_spec:
        raise ClaimBroken(f"{reference.name} and {candidate.name} do not return the same structure (keys, classes, lengths)")
    if draws(reference) != draws(candidate):
        raise ClaimBroken(f"only one of {reference.name} and {candidate.name} draws random numbers (dropout in training mode)")
    worst = original = 0.0
    sizes, notes = list[str](), list[str]()
    example = as_given(reference)
    for sample in (example, *samples(reference)):
        try:
            oracle = _run(reference, sample, torch.float64)
        except Exception as failure:
            if sample is example:
                raise
            notes.append(f"not checked at {sample.sizes}: the reference fails there ({type(failure).__name__})")
            continue
        was, now = _compare(reference, candidate, sample, oracle, claim)
        original, worst = max(original, was), max(worst, now)
        sizes.append(sample.sizes)
    gradient, count = None, 0
    if gradients:
        gradient, count = _compare_gradients(reference, candidate, example, claim)
    return Evidence(worst, gradient, count, original, worst, tuple(sizes), 0, tuple(notes))


def draws(program: Program) -> bool:
    """Whether a run draws random numbers: an active dropout, or any other op that does."""
    return any(_draws(node) for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _draws(node: fx.Node) -> bool:
    given = arguments(node)
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(given["dropout_p"] != 0.0)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    return bool(given.get("train", True) is not False and given.get("p", 1.0) != 0.0)


@torch.no_grad()
def _run(program: Program, sample: Sample, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    return interpret(program, sample.inputs, dtype=dtype, noise=False)


def _compare(
    reference: Program, candidate: Program, sample: Sample, oracle: tuple[Any, ...], claim: Claim
) -> tuple[float, float]:
    before = _run(reference, sample)
    try:
        after = _run(candidate, sample)
    except Exception as failure:
        raise ClaimBroken(f"{candidate.name} fails at {sample.sizes}, where {reference.name} runs: {failure}") from failure
    if len(after) != len(before):
        raise UsageError(f"{reference.name} gives {len(before)} outputs, {candidate.name} gives {len(after)}")
    was = now = 0.0
    for index, (a, b, o) in enumerate(zip(before, after, oracle, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            raise ClaimBroken(
                f"output {index} is {list(a.shape)} {a.dtype} in {reference.name} and {list(b.shape)} {b.dtype} "
                f"in {candidate.name}, at {sample.sizes}"
            )
        error_before, error_after = errors_against(a, b, o)
        was, now = max(was, error_before), max(now, error_after)
        limit = allowed(error_before, a.dtype) if isinstance(a, Tensor) and floating(a) else 0.0
        if claim.forward == "bitwise" and not _identical(a, b):
            raise ClaimBroken(f"output {index} is not bit for bit the same at {sample.sizes}; the claim is '{claim.name}'")
        if claim.exact and not error_after <= limit:
            raise ClaimBroken(
                f"output {index} of {candidate.name} is off by {error_after:.1e} at {sample.sizes}; "
                f"{reference.name} itself is off by {error_before:.1e} there (relative to its float64 oracle)"
            )
    return was, now


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return type(a) is type(b) and bool(a == b)


def _compare_gradients(reference: Program, candidate: Program, sample: Sample, claim: Claim) -> tuple[float, int]:
    """Worst relative gradient error of inputs and of the parameters that both sides have, and how many were compared."""
    first = {name: _twin(reference, reference, name) or name for name in reference.weights.leaves}  # of the names of a tied one
    leaves = {
        name: tensor.detach().to(torch.float64).requires_grad_()
        for name, tensor in reference.weights.leaves.items()
        if tensor.is_floating_point() and tensor.requires_grad and first[name] == name
    }
    mapped = {name: weight for name in candidate.weights if (weight := candidate.weights[name]).edited}
    mine = _gradients(reference, sample, leaves, lambda name: leaves.get(first[name]) if name in first else None)
    theirs = _gradients(candidate, sample, leaves, lambda name: _shared(reference, candidate, name, leaves))
    floor = max((magnitude(g) for g in mine.values() if g is not None), default=0.0) * FLOOR
    had = {
        _twin(reference, candidate, leaf) or leaf
        for name in candidate.weights
        for leaf in leaves_of(candidate.weights[name].expression)
    }
    compared = [name for name in mine if name not in leaves or name in had]
    if leaves and not any(name in leaves for name in compared):
        raise UsageError(
            f"no gradient of a parameter can be compared: {candidate.name} has none of the parameters of {reference.name}",
            hint="give both the same parameter names, or leave gradients=False",
        )
    worst = 0.0
    for name in compared:
        zero = torch.zeros_like(_first(mine[name], theirs[name]))
        a, b = (zero if g is None else g for g in (mine[name], theirs[name]))
        worst = max(worst, relative_error(b, a, floor=floor))
    count = len(compared)
    dtype = next((t.dtype for t in reference.weights.leaves.values() if t.is_floating_point()), torch.float32)
    limit = GRADIENT if mapped or dtype is torch.float64 else 4 * ROUNDING * torch.finfo(dtype).eps
    if claim.gradient in ("bitwise", "equal") and not worst <= limit:
        raise ClaimBroken(f"gradients of {candidate.name} differ by {worst:.1e} from those of {reference.name}")
    return worst, count


def _first(*found: Tensor | None) -> Tensor:
    return next((x for x in found if x is not None), torch.zeros(()))


def _gradients(program: Program, sample: Sample, leaves: Mapping[str, Tensor], weight: Any) -> dict[str, Tensor | None]:
    """Gradients of one fixed random functional of the outputs, in float64, by leaf and input name."""
    inputs = [
        x.detach().to(torch.float64).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in sample.inputs
    ]

    def value(name: str) -> Tensor:
        shared = weight(name)
        return shared if shared is not None else program.weights.value(name, torch.float64)

    outputs = interpret(program, inputs, dtype=torch.float64, weight=value, noise=False)
    generator = torch.Generator().manual_seed(0)
    live, cotangents = [], []
    for output in outputs:
        if isinstance(output, Tensor) and output.is_floating_point():
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
            if output.requires_grad:
                live.append(output)
                cotangents.append(cotangent)
    names = [n.name for n, x in zip(program.placeholders, inputs, strict=True) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [*(x for x in inputs if isinstance(x, Tensor) and x.requires_grad), *leaves.values()]
    found = torch.autograd.grad(live, wanted, cotangents, allow_unused=True) if live and wanted else [None] * len(wanted)
    keys = [*(f"input {index}" for index, _ in enumerate(names)), *leaves]
    return dict(zip(keys, found, strict=True))


def _shared(reference: Program, candidate: Program, name: str, leaves: Mapping[str, Tensor]) -> Tensor | None:
    """A weight of the candidate as a function of the reference's leaves, if it is one."""
    weight = candidate.weights[name]
    if weight.edited:

        def value(leaf: str) -> Tensor:
            shared = leaves.get(_twin(reference, candidate, leaf) or "")
            return candidate.weights.leaf(leaf) if shared is None else shared

        return evaluate(weight.expression, value)
    return leaves.get(_twin(reference, candidate, name) or "")


def _twin(reference: Program, candidate: Program, name: str) -> str | None:
    """The reference's name of a leaf of the candidate: the same memory, or the same name and values."""
    tensor = candidate.weights.leaves[name]
    for other, leaf in reference.weights.leaves.items():
        if leaf.shape == tensor.shape and leaf.stride() == tensor.stride() and leaf.data_ptr() == tensor.data_ptr() != 0:
            return other
    twin = reference.weights.leaves.get(name)
    same = twin is not None and twin.shape == tensor.shape and twin.dtype == tensor.dtype and torch.equal(twin, tensor)
    return name if same else None
