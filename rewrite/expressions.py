"""An expression over weights: a leaf of the user's model, or an op on expressions.

    W' = Apply(mul, (W, g))

It says what an edited weight is without computing it, so it can be evaluated on anything: on float64 leaves, on meta tensors,
on a state dict of the original, on leaves that require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """A tensor of the user's model, by its name there."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply:
    """``target(*args, **kwargs)`` where the tensors among the arguments are expressions.

    Subexpressions may be shared: whatever walks an expression looks at each object once.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.target, self.args, self.kwargs)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        shown = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs]
        return f"{getattr(self.target, '__name__', self.target)}({', '.join(shown)})"

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The expressions among the arguments, in order."""
        found: list[Expression] = []
        for x in (*self.args, *(v for _, v in self.kwargs)):
            map_leaves(x, lambda y: found.append(y) if isinstance(y, Leaf | Apply) else None)
        return tuple(found)


Expression = Leaf | Apply


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def evaluate(expression: Expression, leaf: Callable[[str], Tensor], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The value of ``expression`` with the leaves that ``leaf`` gives, in ``dtype`` (None: as it is written).

    A cast to another floating type is one to ``dtype``: an edit is rounded once, at its end.
    """
    values: dict[int, Any] = {}

    def value(x: Any) -> Any:
        if isinstance(x, Leaf):
            return leaf(x.name)
        if isinstance(x, Apply):
            return values[id(x)]
        return dtype if dtype is not None and isinstance(x, torch.dtype) and x in FLOATS else x

    for x in inside_out(expression):
        kwargs = {k: map_leaves(v, value) for k, v in x.kwargs}
        values[id(x)] = x.target(*map_leaves(x.args, value), **kwargs)
    result: Tensor = value(expression)
    return result


def inside_out(expression: Expression) -> list[Apply]:
    """The calls of an expression, each once, operands first."""
    order: dict[int, Apply] = {}

    def visit(x: Expression) -> None:
        if isinstance(x, Apply) and id(x) not in order:
            for operand in x.operands:
                visit(operand)
            order[id(x)] = x

    visit(expression)
    return list(order.values())


def leaves(expression: Expression) -> Iterator[str]:
    """The names of the leaves that ``expression`` reads, in order, each once."""
    found: dict[str, None] = {}
    seen: set[int] = set()

    def visit(x: Expression) -> None:
        if isinstance(x, Leaf):
            found[x.name] = None
        elif id(x) not in seen:
            seen.add(id(x))
            for operand in x.operands:
                visit(operand)

    visit(expression)
    yield from found


def digest(expression: Expression, named: Callable[[str], str] = str) -> str:
    """A short text, equal for equal expressions, in any process; ``named`` says what counts as a leaf's name."""
    digests: dict[int, str] = {}

    def shown(x: Any) -> str:
        return named(x.name) if isinstance(x, Leaf) else digests[id(x)] if id(x) in digests else str(x)

    for x in inside_out(expression):
        name = getattr(x.target, "__name__", x.target)
        text = f"{name}({map_leaves(x.args, shown)}, {[(k, map_leaves(v, shown)) for k, v in x.kwargs]})"
        digests[id(x)] = sha256(text.encode()).hexdigest()[:16]
    return shown(expression)


def map_leaves(x: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` on everything in nested tuples and lists."""
    if isinstance(x, (tuple, list)):
        return type(x)(map_leaves(y, function) for y in x)
    return function(x)


def promote(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in ``dtype``; any other, and with None any, as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
