"""What was measured when a claim was checked, and the one table of tolerances.

Errors are relative in the maximum norm: max|a - b| / max|b|. The table is never loosened to make something pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 1e-12
"""Equality over the reals, measured in float64: the order of summation moves, nothing else."""

GRADIENT = 1e-10
"""The same for gradients, which sum over every position."""

FLOOR = 1e-3
"""A gradient far below the largest is compared on this share of it: it is a difference of terms of that size."""

ROUNDING = 64
"""In the user's own dtype a rewritten program may err twice as much as the original did, plus this many roundings."""

AMPLIFIED = 32
"""What moves by more than the above when every weight moves by one float64 rounding is held to this many times that move."""

_PIECE = 2**20


@dataclass(frozen=True)
class Difference:
    """How far one rewrite whose claim is no equality moved the outputs.

    Attributes:
        rewrite: its name.
        claim: its claim's name.
        error: worst relative error of an output in float64, on the example's values, against the program before it.
    """

    rewrite: str
    claim: str
    error: float

    def __str__(self) -> str:
        return f"{self.rewrite}: outputs differ by {self.error:.1e} (relative), as its claim '{self.claim}' allows"


@dataclass(frozen=True)
class Evidence:
    """What verification found.

    All but ``differences`` and ``moved`` speak of the rewrites that claim equality.

    Attributes:
        forward: worst relative error of an output in float64.
        gradient: worst relative error of a gradient in float64; None if the claim does not speak of gradients.
        gradients: how many gradients (of weights and inputs) were compared.
        original: error of the original in its own dtype against the float64 oracle.
        rewritten: error of the rewritten program in that dtype against the same oracle.
        sizes: the input sizes checked.
        relations: how many values inside the graph were held to a stated relation (a centred stream has zero mean).
        notes: what was not checked, and why.
        differences: what each rewrite that claims less did to the outputs.
        moved: how far all of them together moved the outputs from the original's; None if there are none.
    """

    forward: float
    gradient: float | None = None
    gradients: int = 0
    original: float | None = None
    rewritten: float | None = None
    sizes: tuple[str, ...] = ()
    relations: int = 0
    notes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    moved: float | None = None

    def also(self, other: Evidence) -> Evidence:
        """The evidence of two steps of one chain: the worst of each."""
        return Evidence(
            max(self.forward, other.forward),
            _worst(self.gradient, other.gradient),
            self.gradients + other.gradients,
            _worst(self.original, other.original),
            _worst(self.rewritten, other.rewritten),
            tuple(dict.fromkeys((*self.sizes, *other.sizes))),
            self.relations + other.relations,
            tuple(dict.fromkeys((*self.notes, *other.notes))),
            (*self.differences, *other.differences),
            _worst(self.moved, other.moved),
        )

    def __str__(self) -> str:
        parts = [f"float64 error {self.forward:.1e}"]
        if self.gradient is not None:
            parts.append(f"gradients {self.gradient:.1e} ({self.gradients})")
        if self.rewritten is not None and self.original is not None:
            parts.append(f"own dtype {self.rewritten:.1e} (the original: {self.original:.1e})")
        return ", ".join(parts)


def _worst(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


def relative_error(value: object, reference: object, *, floor: float = 0.0) -> float:
    """max|value - reference| / max|reference|; infinite where they are not even comparable.

    Both NaN or both the same infinity in one place agree there. Integers, booleans and non-tensors agree or do not.

    Args:
        floor: the scale is at least this: what is left of a cancellation is measured on what was cancelled.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        0.5
    """
    if not isinstance(value, Tensor) or not isinstance(reference, Tensor):
        return 0.0 if type(value) is type(reference) and value == reference else float("inf")
    if value.shape != reference.shape:
        return float("inf")
    if not floating(reference):
        return 0.0 if torch.equal(value, reference) else float("inf")
    return _relative(((_wide(a), _wide(b)) for a, b in _pieces(value, reference)), floor)


def _relative(pieces: Iterable[tuple[Tensor, Tensor]], floor: float = 0.0) -> float:
    """max|a - b| / max|b| over pieces of a and b."""
    difference, scale = 0.0, floor
    for a, b in pieces:
        settled = (a == b) | (a.isnan() & b.isnan())
        worst = float(torch.where(settled, 0.0, (a - b).abs()).max())
        difference = max(difference, worst) if worst == worst else float("inf")
        scale = max(scale, magnitude(b))
    if difference == 0.0:
        return 0.0
    error = difference / scale if scale > 0 else difference
    return error if error == error else float("inf")


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of each tensor, some at a time: a float64 copy of all logits would be a model of its own."""
    flat = [x.detach().reshape(-1) for x in tensors]
    return zip(*(torch.split(x, _PIECE) for x in flat), strict=True) if tensors[0].numel() else iter(())


def errors_against(before: object, after: object, oracle: object) -> tuple[float, float]:
    """The errors of an original and of a rewritten output, both in their own dtype, against a float64 oracle.

    Where the original is not finite there is nothing to be close to: the rewritten output must be the same there. An output
    that is not floating must be the original's (an index may differ from the oracle's by a tie that rounding decides).
    """
    if not isinstance(before, Tensor) or not isinstance(oracle, Tensor) or not floating(before):
        return 0.0, relative_error(after, before)
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return 0.0, float("inf")
    for x, y in _pieces(before, after):
        if not bool((x.isfinite() | (x == y) | (x.isnan() & y.isnan())).all()):
            return 0.0, float("inf")
    was = _relative(_where_finite(a, a, o) for a, o in _pieces(before, oracle))
    now = _relative(_where_finite(a, b, o) for a, b, o in _pieces(before, after, oracle))
    return was, now


def _where_finite(original: Tensor, value: Tensor, oracle: Tensor) -> tuple[Tensor, Tensor]:
    """Value and oracle in double precision, zero where the original is not finite."""
    finite = original.isfinite()
    return torch.where(finite, _wide(value), 0.0), torch.where(finite, _wide(oracle), 0.0)


def by_a_rounding(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` [float64] with every entry moved by one rounding, up or down; ``x`` itself where it has other entries."""
    if not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    return x * (1 + signs * torch.finfo(torch.float64).eps)


def floating(x: Tensor) -> bool:
    """Whether a tensor has real or complex entries."""
    return x.is_floating_point() or x.is_complex()


def magnitude(x: Tensor) -> float:
    """max|x| over the finite entries; 0 if there are none."""
    return max((float(torch.where(piece.isfinite(), _wide(piece).abs(), 0.0).max()) for (piece,) in _pieces(x)), default=0.0)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
