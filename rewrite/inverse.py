"""Solve an edit for one of its leaves: given W' = f(W, g, …) and all leaves but W, a W with f(W, g, …) = W'.

    W diag(g) = W'   ->   W = W' diag(1/g)          b + W c = b'   ->   b = b' - W c          [Q; K; V] = W'   ->   its pieces

This is a right inverse: f of the answer is W' again, where there is one. Where f forgets something the answer keeps what W had
(the entry beside a zero of g), and a centred matrix is its own origin: W' - mean(W') = W' as long as W' is centred. Where f
reads W several times over, affinely (a change of basis, a matrix with a row less), the answer is the one nearest to W:

    f(X) = A X + c = W'   ->   X = W + Aᵀ u,   A Aᵀ u = W' - f(W)        by conjugate gradients

Whoever asks checks f of the answer: a column that was multiplied by zero and has grown since has no origin.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .expressions import Apply, Expression, Leaf, evaluate, inside_out, leaves, map_leaves

aten = torch.ops.aten


class NoInverseError(Exception):
    """An edit cannot be solved for the wanted leaves."""


def origin(edits: Mapping[str, tuple[Expression, Tensor]], old: Mapping[str, Tensor], given: frozenset[str],
           names: Callable[[str], Iterable[str]], fixed: frozenset[str] = frozenset()) -> dict[str, Tensor]:  # fmt: skip
    """Leaves, by name, for which every edit has its value, as far as the edits can be solved.

    Where several leaves could answer for an edit, the one whose name it has does, then one that trains, then one that the
    fewest edits read, then the largest: the others keep their value.

    Args:
        edits: by the name of the weight, what it is and its value.
        old: every leaf as it was, or as it is given.
        given: the leaves that are known.
        names: all names of the tensor behind a leaf.
        fixed: the leaves that do not train, stored statistics for one.
    """
    known, found, pending = set(given), dict[str, Tensor](), dict(edits)
    stands_for = frozenset(map(_base, edits))
    while pending:
        unknown = {name: frozenset(leaves(expression)) - known for name, (expression, _) in pending.items()}
        for name in sorted(pending, key=lambda name: len(unknown[name])):
            if unknown[name] & stands_for - {_base(name)}:  # W is what W' says, not what the bias b + W c says
                continue
            try:
                fresh = solve(*pending[name], unknown[name], {**old, **found})
            except NoInverseError:
                continue
            del pending[name]
            found |= {alias: value for leaf, value in fresh.items() for alias in names(leaf)}
            known.update(found)
            break
        else:
            reads = Counter(chain.from_iterable(unknown.values()))
            rank = lambda leaf: (leaf in stands_for, leaf not in fixed, -reads[leaf], old[leaf].numel(), leaf)  # noqa: B023, E731
            known.update(names(min(reads, key=rank)))
    return found


def _base(name: str) -> str:
    """The name of the leaf that an edit takes the place of."""
    return re.sub(r"(_\d+)+$", "", name)


def solve(expression: Expression, value: Tensor, wanted: frozenset[str], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves ``wanted`` such that ``expression`` is ``value``.

    Args:
        old: every leaf; those wanted as they were, which decides where the edit leaves a choice.

    Raises:
        NoInverseError: an op on the way has no inverse, or several leaves are wanted of it at once.
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
        return _solve_affine(expression, value, wanted, old)
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


def _weight_norm(expression: Apply, value: Tensor, old: Mapping[str, Tensor]) -> list[tuple[Expression, Tensor]]:
    """v g / |v| is its own direction, and its length is g."""
    v, g, dim = (*expression.args, 0)[:3]
    return [(v, value), (g, torch.norm_except_dim(value, 2, dim))]


_PIECES: dict[Any, Callable[[Apply, Tensor, Mapping[str, Tensor]], list[tuple[Expression, Tensor]]]] = {
    aten.cat.default: _cat,
    aten._weight_norm.default: _weight_norm,
}
"""Ops whose result has a piece of its own for each operand."""


def _centred(expression: Apply) -> Expression | None:
    """E of E - mean(E)."""
    if expression.target is not aten.sub.Tensor or expression.kwargs:
        return None
    whole, mean = expression.args
    return whole if isinstance(mean, Apply) and mean.target is aten.mean.dim and mean.args[0] == whole else None


# -- what is affine --------------------------------------------------------------------------------------------


def _solve_affine(expression: Apply, value: Tensor, wanted: frozenset[str], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``solve`` through the largest expression inside by which alone ``expression`` reads what is wanted, and affinely."""
    inside = [x for x in inside_out(expression)[-2::-1] if wanted.intersection(leaves(x))]
    candidates: list[Expression] = [*inside, *map(Leaf, sorted(wanted))]
    for inner in candidates:
        f = _replaced(expression, inner, _HOLE)
        if wanted.isdisjoint(leaves(f)) and (answer := _nearest(f, value, inner, old)) is not None:
            try:
                found = solve(inner, answer, wanted, old)
            except NoInverseError:
                continue
            if _agree(evaluate(expression, (dict(old) | found).__getitem__), value):
                return found
    raise NoInverseError(f"{expression.target} has no inverse")


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


_HOLE = Leaf("")


def _replaced(expression: Expression, old: Expression, new: Expression) -> Expression:
    if expression == old:
        return new
    if isinstance(expression, Leaf):
        return expression
    substitute = lambda x: _replaced(x, old, new) if isinstance(x, Leaf | Apply) else x  # noqa: E731
    kwargs = tuple((name, map_leaves(x, substitute)) for name, x in expression.kwargs)
    return Apply(expression.target, map_leaves(expression.args, substitute), kwargs)


def _nearest(f: Expression, value: Tensor, inner: Expression, old: Mapping[str, Tensor]) -> Tensor | None:
    """X nearest to what ``inner`` was with f(X) = ``value``; None if f is not affine, or never that value."""
    x = evaluate(inner, old.__getitem__).detach()

    def at(x: Tensor) -> Tensor:
        return evaluate(f, lambda name: x if name == _HOLE.name else old[name])

    with torch.enable_grad():
        now = at(point := x.clone().requires_grad_())
        if now.shape != value.shape or not now.requires_grad:
            return None
        zero = torch.zeros_like(value).requires_grad_()
        (back,) = torch.autograd.grad(now, point, zero, create_graph=True)

    def transposed(u: Tensor) -> Tensor:
        return torch.autograd.grad(now, point, u, retain_graph=True)[0]

    def linear(x: Tensor) -> Tensor:
        return torch.autograd.grad(back, zero, x, retain_graph=True)[0]

    u, step = torch.zeros_like(value), value - now.detach()
    rest, left = step, step.square().sum()
    enough = 1e-30 * left
    for _ in range(_STEPS):
        if not left > enough:
            break
        moved = linear(transposed(step))
        length = left / (step * moved).sum()
        u, rest, before = u + length * step, rest - length * moved, left
        left = rest.square().sum()
        step = rest + left / before * step
    answer = x + transposed(u)
    return answer if _agree(at(answer), value) else None


_STEPS = 100
"""Changes of basis need two or three: A Aᵀ is the identity and a matrix of rank one."""
