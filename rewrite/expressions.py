"""An expression over weights: a leaf of the user's model, or an op on expressions.

    W' = Apply(mul, (W, g))

It says what an edited weight is without computing it, so it can be evaluated on anything: on float64 leaves, on meta tensors,
on a state dict of the original, on leaves that require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """``target(*args, **kwargs)`` where the tensors among the arguments are expressions."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        shown = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs]
        return f"{getattr(self.target, '__name__', self.target)}({', '.join(shown)})"


Expression = Leaf | Apply


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def evaluate(expression: Expression, leaf: Callable[[str], Tensor], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The value of ``expression`` with the leaves that ``leaf`` gives, in ``dtype`` (None: as it is written).

    A cast to another floating type is one to ``dtype``: an edit is rounded once, at its end.
    """
    if isinstance(expression, Leaf):
        return leaf(expression.name)

    def value(x: Any) -> Any:
        if isinstance(x, Apply | Leaf):
            return evaluate(x, leaf, dtype)
        return dtype if dtype is not None and isinstance(x, torch.dtype) and x in FLOATS else x

    args = map_leaves(expression.args, value)
    kwargs = {k: map_leaves(v, value) for k, v in expression.kwargs}
    result: Tensor = expression.target(*args, **kwargs)
    return result


def leaves(expression: Expression) -> Iterator[str]:
    """The names of the leaves that ``expression`` reads, in order, with repetitions."""
    if isinstance(expression, Leaf):
        yield expression.name
        return
    found: list[str] = []
    for x in (*expression.args, *(v for _, v in expression.kwargs)):
        map_leaves(x, lambda y: found.extend(leaves(y)) if isinstance(y, Leaf | Apply) else None)
    yield from found


def map_leaves(x: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` on everything in nested tuples and lists."""
    if isinstance(x, (tuple, list)):
        return type(x)(map_leaves(y, function) for y in x)
    return function(x)


def promote(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in ``dtype``; any other, and with None any, as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
