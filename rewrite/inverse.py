"""Solve an edit for one of its leaves: given W' = f(W, g, …) and all leaves but W, a W with f(W, g, …) = W'.

    W diag(g) = W'   ->   W = W' diag(1/g)          b + W c = b'   ->   b = b' - W c          [Q; K; V] = W'   ->   its pieces

This is a right inverse: f of the answer is W' again, where there is one. Where f forgets something the answer keeps what W had
(the entry beside a zero of g), and a centred matrix is its own origin: W' - mean(W') = W' as long as W' is centred. Whoever
asks checks f of the answer: a column that was multiplied by zero and has grown since has no origin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .expressions import Apply, Expression, Leaf, evaluate, leaves

aten = torch.ops.aten


class NoInverseError(Exception):
    """An edit cannot be solved for the wanted leaves."""


def origin(edits: Mapping[str, tuple[Expression, Tensor]], old: Mapping[str, Tensor], given: frozenset[str],
           names: Callable[[str], Iterable[str]]) -> dict[str, Tensor]:  # fmt: skip
    """Leaves, by name, for which every edit has its value, as far as the edits can be solved.

    Where several leaves could answer for an edit, the one whose name it has does, then the largest: the others keep their value.

    Args:
        edits: by the name of the weight, what it is and its value.
        old: every leaf as it was, or as it is given.
        given: the leaves that are known.
        names: all names of the tensor behind a leaf.
    """
    known, found, pending = set(given), dict[str, Tensor](), dict(edits)
    stands_for = {re.sub(r"(_\d+)+$", "", name) for name in edits}
    while pending:
        unknown = {name: frozenset(leaves(expression)) - known for name, (expression, _) in pending.items()}
        for name in sorted(pending, key=lambda name: len(unknown[name])):
            try:
                fresh = solve(*pending[name], unknown[name], {**old, **found})
            except NoInverseError:
                continue
            del pending[name]
            found |= {alias: value for leaf, value in fresh.items() for alias in names(leaf)}
            known.update(found)
            break
        else:
            least = min(frozenset().union(*unknown.values()), key=lambda leaf: (leaf in stands_for, old[leaf].numel(), leaf))
            known.update(names(least))
    return found


def solve(expression: Expression, value: Tensor, wanted: frozenset[str], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves ``wanted`` such that ``expression`` is ``value``.

    Args:
        old: every leaf; those wanted as they were, which decides where the edit leaves a choice.

    Raises:
        NoInverseError: an op on the way has no inverse, or two of its operands are wanted at once.
    """
    if wanted.isdisjoint(leaves(expression)):
        return {}
    if isinstance(expression, Leaf):
        return {expression.name: value}
    if (centred := _centred(expression)) is not None:
        return solve(centred, value, wanted, old)
    name, pieces = str(expression.target), _PIECES.get(expression.target)
    if pieces is not None:
        found: dict[str, Tensor] = {}
        for part, piece in pieces(expression, value, old):
            found |= solve(part, piece, wanted, old)
        return found
    sides = [i for i, x in enumerate(expression.args) if isinstance(x, Leaf | Apply) and wanted.intersection(leaves(x))]
    if len(sides) != 1 or (inverse := _INVERSES.get(expression.target)) is None:
        raise NoInverseError(f"{name} has no inverse")
    (side,) = sides
    args = [evaluate(x, old.__getitem__) if isinstance(x, Leaf | Apply) else x for x in expression.args]
    answer = inverse(value, args, side, dict(expression.kwargs))
    if answer.shape != args[side].shape:
        raise NoInverseError(f"{name} spreads it over a larger shape, which has no inverse")
    return solve(expression.args[side], answer, wanted, old)


Inverse = Callable[[Tensor, list[Any], int, Mapping[str, Any]], Tensor]
"""value, arguments, which of them is wanted (it holds what it was), keywords -> what it must be."""


def _mul(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    factor = torch.as_tensor(args[1 - side], dtype=value.dtype)
    return torch.where(factor == 0, args[side], value / factor)


def _div(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] / value if side else value * args[1]  # type: ignore[no-any-return]


def _add(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    alpha = kwargs.get("alpha", 1)
    return (value - args[0]) / alpha if side else value - alpha * args[1]  # type: ignore[no-any-return]


def _sub(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    alpha = kwargs.get("alpha", 1)
    return (args[0] - value) / alpha if side else value + alpha * args[1]  # type: ignore[no-any-return]


def _permute(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    return value.permute([int(i) for i in torch.tensor([d % value.ndim for d in args[1]]).argsort()])


def _same(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    return value


def _shaped(value: Tensor, args: list[Any], side: int, kwargs: Mapping[str, Any]) -> Tensor:
    return value.reshape(args[0].shape) if value.numel() == args[0].numel() else value


_INVERSES: dict[Any, Inverse] = {
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.neg.default: lambda value, args, side, kwargs: -value,
    aten.t.default: lambda value, args, side, kwargs: value.t(),
    aten.transpose.int: lambda value, args, side, kwargs: value.transpose(*args[1:]),
    aten.permute.default: _permute,
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim), _shaped),
    **dict.fromkeys((aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.detach.default), _same),
}  # fmt: skip


def _cat(expression: Apply, value: Tensor, old: Mapping[str, Tensor]) -> list[tuple[Expression, Tensor]]:
    parts, dim = expression.args[0], (*expression.args[1:], *(v for _, v in expression.kwargs), 0)[0]
    sizes = [evaluate(part, old.__getitem__).shape[dim] for part in parts]
    return list(zip(parts, torch.split(value, sizes, dim), strict=True))


_PIECES: dict[Any, Callable[[Apply, Tensor, Mapping[str, Tensor]], list[tuple[Expression, Tensor]]]] = {aten.cat.default: _cat}
"""Ops whose result has a piece of its own for each operand."""


def _centred(expression: Apply) -> Expression | None:
    """E of E - mean(E)."""
    if expression.target is not aten.sub.Tensor or expression.kwargs:
        return None
    whole, mean = expression.args
    return whole if isinstance(mean, Apply) and mean.target is aten.mean.dim and mean.args[0] == whole else None
