"""Sizes may be symbols. Every comparison of sizes in tautomer goes through this file.

``B == 4`` on a symbolic size answers from the example and specialises the whole graph to it. ``same`` answers
whether two sizes are equal for every input, and never guards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import prod

import torch
from torch import SymInt

from ._torch import statically_known_true

Size = int | SymInt


def same(a: Size, b: Size) -> bool:
    """Whether ``a`` and ``b`` are equal for every input (not merely for the example).

    Example:
        >>> same(3, 3), same(3, 4)
        (True, False)
    """
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))  # type: ignore[arg-type]


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes have one rank and the same sizes for every input."""
    return len(a) == len(b) and all(map(same, a, b))


def at_least(a: Size, b: Size) -> bool:
    """Whether ``a`` is no less than ``b`` for every input."""
    return a >= b if isinstance(a, int) and isinstance(b, int) else bool(statically_known_true(a >= b))  # type: ignore[arg-type]


def key(size: Size) -> Hashable:
    """A hashable stand-in for a size (``SymInt`` is not hashable)."""
    return size if isinstance(size, int) else size.node.expr


def tensor_key(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Everything a fake op looks at: shape, strides, dtype, device, layout."""
    return (
        tuple(map(key, tensor.shape)),
        tuple(map(key, tensor.stride())) if tensor.layout is torch.strided else None,
        tensor.dtype,
        str(tensor.device),
        tensor.layout,
    )


def product(sizes: Iterable[Size]) -> Size:
    """The number of elements of a shape; 1 for the empty shape."""
    return prod(sizes)


def static(size: Size) -> int | None:
    """The size if it is the same for every input, else None."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else None


def exemplary(size: Size) -> int | None:
    """The size in the example, for questions of profit alone: it guards nothing. None if it is computed from values."""
    return size if isinstance(size, int) else size.node.hint


def show(shape: Sequence[Size]) -> str:
    """A shape for a person: ``[s0, 7, 768]``."""
    return "[" + ", ".join(str(size) for size in shape) + "]"
