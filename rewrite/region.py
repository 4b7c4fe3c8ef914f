"""One application, held to its claim: the old nodes and the new ones, run in float64 on the same random inputs.

    |new(z) - old(z)| ≤ 1e-12 |old(z)|   and the same for the gradients of a random projection

The inputs are what both sides read: runtime values are drawn from their metadata (symbols become small distinct
sizes), weights are the user's own, as expressions over float64 leaves, so that gradients meet at the leaves. Some rows
are a hundred times smaller than the others: an epsilon in the wrong place shows there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .claims import Claim
from .emit import Editor
from .errors import ClaimBroken
from .evidence import FORWARD, GRADIENT, relative_error
from .patterns import Found
from .samples import alike
from .shapes import Size, key
from .weights import Apply, Expression, Leaf, evaluate, leaves

_SIZES = ((4, 6, 8, 10, 12, 14), (7, 5, 9, 11, 13, 3))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Region:
    """A piece of the graph: its nodes in order, what it returns, and nodes to be read as others."""

    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    twins: Mapping[fx.Node, fx.Node]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What the region reads, each once, in order."""
        inside, found = set(self.nodes), dict[fx.Node, None]()
        for operand in (operand for node in (*self.nodes, *self.roots) for operand in (node, *node.all_input_nodes)):
            operand = self.twins.get(operand, operand)
            if operand not in inside:
                found[operand] = None
        return tuple(found)


def region_between(roots: tuple[fx.Node, ...], frontier: set[fx.Node], twins: Mapping[fx.Node, fx.Node]) -> Region:
    """Everything from ``roots`` down to ``frontier``."""
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in order or node in frontier or node in twins or node.op != "call_function":
            return
        for operand in node.all_input_nodes:
            visit(operand)
        order[node] = None

    for root in roots:
        visit(root)
    return Region(tuple(order), roots, twins)


# -- one region, one question ---------------------------------------------------------------------------------


def signature(found: Found, created: Sequence[fx.Node], editor: Editor) -> Hashable:
    """What the check depends on but the values of the weights: equal for the same rewrite in another layer.

    The left side is known by the way the pattern fits and by what its variables are bound to; the right side is a
    function of these, so its ops tell it.
    """
    number: dict[Any, int] = {}
    return (found.way, *[_describe(x, number, editor) for x in found.values], *[id(node.target) for node in created])


def _describe(x: Any, number: dict[Any, int], editor: Editor) -> Hashable:
    """What a variable is bound to: a node seen before by its number, a weight by its expression."""
    if x.__class__ is fx.Node:
        if x in number:
            return number[x]
        number[x] = len(number)
        meta = editor.metadata.key(x)
        return (meta, _shape_of(editor.expression(x), number, editor)) if editor.constant(x) else (meta,)
    if isinstance(x, (list, tuple)):
        return tuple([_describe(y, number, editor) for y in x])
    return (x.__class__, x)  # 1, 1.0 and True are three literals


def _shape_of(x: Any, number: dict[Any, int], editor: Editor) -> Hashable:
    if isinstance(x, Leaf):
        tensor = editor.program.weights.leaves[x.name]
        return ("leaf", number.setdefault(x, len(number)), editor.metadata.key(tensor), tensor.requires_grad)
    if isinstance(x, Apply):
        return (id(x.target), *(_shape_of(y, number, editor) for y in (*x.args, *x.kwargs)))
    return tuple(_shape_of(y, number, editor) for y in x) if isinstance(x, tuple) else x


# -- running both sides ---------------------------------------------------------------------------------------


def hold(claim: Claim, old: Region, new: Region, editor: Editor) -> float | None:
    """The worst relative error of ``new`` against ``old`` in float64; None if the claim promises nothing measurable.

    Raises:
        ClaimBroken: the error is beyond what the claim allows, or the old side cannot be run.
    """
    if claim.forward == "free":
        return None
    sample = _run_old(old, new, editor)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            outputs = _run(new, sample.values)
        except Exception as error:
            raise ClaimBroken(f"the rewritten region does not run: {str(error).splitlines()[0]}") from error
    forward = max(map(_error, outputs, sample.outputs), default=0.0)
    _judge("forward", forward, 0.0 if claim.forward == "bitwise" else FORWARD if claim.exact else None, claim)
    if claim.gradient not in ("equal", "bitwise"):
        return forward
    backward = _gradient_error(sample, outputs)
    _judge("gradient", backward, 0.0 if claim.gradient == "bitwise" else GRADIENT, claim)
    return max(forward, backward)


def _judge(what: str, error: float, allowed: float | None, claim: Claim) -> None:
    if allowed is not None and not error <= allowed:
        raise ClaimBroken(f"the claim '{claim.name}' does not hold here: {what} differs by {error:.1e} (relative, in float64)")


@dataclass
class _Sample:
    values: dict[fx.Node, Any]
    variables: list[Tensor]
    outputs: list[Tensor]


def _run_old(old: Region, new: Region, editor: Editor) -> _Sample:
    inputs = tuple(dict.fromkeys((*old.inputs, *new.inputs)))
    problem: Exception | None = None
    together: dict[Any, int] = {symbol: i for i, group in enumerate(alike(editor.program)) for symbol in group}
    # What has one size in the example may have to have one: the two tensors of a cache.
    for fixed, sizes in product(({}, together), _SIZES):
        bindings = {symbol: sizes[i % len(sizes)] for symbol, i in fixed.items()}
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            values, variables = _draw_all(inputs, bindings, sizes, editor)
            torch.default_generator.manual_seed(0)
            try:
                return _Sample(values, variables, _run(old, values))
            except Exception as error:
                problem = error
    raise ClaimBroken(f"the region could not be run to check it: {str(problem).splitlines()[0]}") from problem


def _run(region: Region, inputs: Mapping[fx.Node, Any]) -> list[Tensor]:
    values = dict(inputs)
    read = lambda x: values[region.twins.get(x, x)]  # noqa: E731
    with torch.enable_grad():
        for node in region.nodes:
            args, kwargs = map_aggregate(fx.node.map_arg((node.args, node.kwargs), read), _promote)  # type: ignore[misc]
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return [values[root] for root in region.roots]


def _promote(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return torch.float64 if isinstance(x, torch.dtype) and x in _FLOATS else x


def _draw_all(
    inputs: Sequence[fx.Node], bindings: dict[Any, int], sizes: tuple[int, ...], editor: Editor
) -> tuple[dict[fx.Node, Any], list[Tensor]]:
    expressions = {node: editor.expression(node) for node in inputs}
    names = dict.fromkeys(name for e in expressions.values() if e is not None for name in leaves(e))
    leaf = {name: _leaf(editor.program.weights.leaves[name]) for name in names}
    values = {node: _value(node, expression, leaf, bindings, sizes, editor) for node, expression in expressions.items()}
    drawn = [v for n, v in values.items() if expressions[n] is None]
    return values, [t for t in (*drawn, *leaf.values()) if isinstance(t, Tensor) and t.requires_grad]


def _leaf(tensor: Tensor) -> Tensor:
    """A float64 leaf; one that does not train (a statistic) takes part in no gradient."""
    trains = tensor.requires_grad
    tensor = torch.randn(tensor.shape) if tensor.is_meta else tensor.detach()
    return tensor.to("cpu", torch.float64).clone().requires_grad_(trains) if tensor.is_floating_point() else tensor.cpu()


def _value(node: fx.Node, expression: Expression | None, leaf: Mapping[str, Tensor], bindings: dict[Any, int],
           sizes: tuple[int, ...], editor: Editor) -> Any:  # fmt: skip
    if expression is not None:
        return evaluate(expression, leaf.__getitem__)
    if node.op == "get_attr" and "val" not in node.meta:
        return editor.program.training.get(str(node.target).removesuffix("training").removesuffix("."), False)
    return map_aggregate(node.meta["val"], lambda x: _draw(x, bindings, sizes))


def _draw(x: Any, bindings: dict[Any, int], sizes: tuple[int, ...]) -> Any:
    def size(s: Size) -> int:
        return s if isinstance(s, int) else _bind(key(s), bindings, sizes)

    if isinstance(x, torch.SymInt):
        return size(x)
    if not isinstance(x, Tensor):
        return x
    shape = [size(s) for s in x.shape]
    if x.dtype is torch.bool:
        return torch.rand(shape) > 0.5
    if not x.is_floating_point():
        return torch.randint(0, 2, shape, dtype=x.dtype)
    drawn = torch.randn(shape, dtype=torch.float64) + 0.3
    if len(shape) > 1:
        drawn = drawn * torch.where(torch.rand([*shape[:-1], 1]) > 0.5, 1.0, 1e-2)
    return drawn.requires_grad_()


def _bind(expression: Any, bindings: dict[Any, int], sizes: tuple[int, ...]) -> int:
    for symbol in sorted(expression.free_symbols, key=str):
        bindings.setdefault(symbol, sizes[len(bindings) % len(sizes)])
    return int(expression.subs(bindings))


# -- comparing ------------------------------------------------------------------------------------------------


def _error(new: Any, old: Any) -> float:
    """The relative error where ``old`` is a number at all: outside an op's domain a rule claims nothing."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or new.shape != old.shape or not old.is_floating_point():
        return relative_error(new, old)
    defined = ~old.isnan()
    if bool(defined.all()):
        return relative_error(new, old)
    return relative_error(new[defined], old[defined]) if bool(defined.any()) else float("inf")


def _error_above(new: Tensor, old: Tensor, floor: float) -> float:
    """The same for gradients, relative to no less than ``floor``."""
    gap, size = (new - old).abs_(), float(old.abs().nan_to_num_().max())
    worst = float(gap.max())
    if worst != worst:
        worst = float(torch.where(old.isnan(), 0.0, gap).max())
    if worst == 0.0:
        return 0.0
    scale = max(size, floor)
    return worst / scale if scale and worst == worst else float("inf")


def _gradient_error(sample: _Sample, outputs: Sequence[Tensor]) -> float:
    pairs = [(o, n) for o, n in zip(sample.outputs, outputs, strict=True) if o.is_floating_point() and o.requires_grad]
    if not pairs or not sample.variables:
        return 0.0
    if any(not n.requires_grad for _, n in pairs):
        return float("inf")
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o, _ in pairs]
    old, new = (
        # Both sides read the same derived weights, whose graphs must outlive the first.
        torch.autograd.grad([pair[side] for pair in pairs], sample.variables, weights, retain_graph=True, allow_unused=True)
        for side in (0, 1)
    )
    filled = [
        tuple(torch.zeros_like(v) if g is None else g for g in (o, n))
        for v, o, n in zip(sample.variables, old, new, strict=True)
        if v.numel()
    ]
    # A gradient that is zero over the reals is rounding noise: it is measured against the others.
    floor = 1e-3 * max((float(o.abs().nan_to_num_().max()) for o, _ in filled), default=0.0)
    return max((_error_above(n, o, floor) for o, n in filled), default=0.0)
