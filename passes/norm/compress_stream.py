"""Drop the coordinate of a residual stream that centring makes redundant: what two rewrites share.

A centred vector x of d coordinates lives in d - 1 dimensions. In a basis of these,

    x' = narrow(x),   widen(x') = P x,   W' x' = W widen(x')         P removes the mean

writers write x' (their weights narrowed), norms take it, linear readers read it through W', and what only carries the stream
on carries one coordinate less. Where no weight can be edited (a table tied to the head, a reader that is no linear layer) the
basis is changed at run time, a pass over the activation.

arXiv:2305.14858.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tautomer.rewrite.axes import Value, rank
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.metadata import Derived
from tautomer.rewrite.ops import Operand, Ops, TorchOps, op_of
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.relations import relate
from tautomer.rewrite.shapes import same
from tautomer.rewrite.streams import Plan, Streams, candidates
from tautomer.rewrite.substitution import erase_dead
from tautomer.rewrite.weights import leaves

aten = torch.ops.aten


class Basis:
    """Coordinates of the zero-mean vectors of d entries, along any axis of a tensor."""

    @abstractmethod
    def narrow(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        """The d - 1 coordinates of x less its mean."""

    @abstractmethod
    def widen(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        """The zero-mean vector that has the coordinates x."""

    @abstractmethod
    def read(self, op: Ops, W: Operand, d: int) -> Operand:
        """W' with W' x' = W widen(x')."""


@dataclass(frozen=True)
class Narrowed:
    """new = narrow(old) along ``axis``."""

    basis: Basis
    axis: int

    def __call__(self, original: Tensor) -> Tensor:
        narrowed: Tensor = self.basis.narrow(TorchOps(), original, self.axis, original.shape[self.axis])
        return narrowed


class CompressStream(Pass):
    """Streams one coordinate narrower; see the module. A subclass says in which basis, and what a norm becomes there."""

    purpose: ClassVar[Purpose] = "size"
    basis: ClassVar[Basis]

    @abstractmethod
    def norm(self, op: Ops, x: Operand, d: int, eps: float) -> Operand:
        """``narrow(layer_norm(widen(x)))``, without gain and shift."""

    def run(self, program: Program, context: Context) -> None:
        norms = candidates(program, self, context.admits)
        if context.fuel is not None:
            norms = norms[: context.fuel]
        streams = Streams(program, norms)
        plan = streams.plan()
        for norm in norms:
            if norm not in plan.norms:
                context.refused(self, norm, streams.reason(norm))
        if not plan.norms:
            return
        before = program.copy()
        try:
            _Compression(self, streams, plan, program).run()
        except Refused as refusal:
            program.restore(before)
            for norm in plan.norms:
                context.refused(self, norm, f"something on its stream cannot be one coordinate narrower: {refusal}")
            return
        for norm in plan.norms:
            context.applied(self, norm)
        widths = ", ".join(dict.fromkeys(str(_width(norm) - 1) for norm in plan.norms))
        aligned = "of an odd number of entries are not aligned, and matrix kernels pad or slow down"
        context.noted(self, plan.norms[0], f"the stream is {widths} wide now: rows {aligned}")


def _width(norm: fx.Node) -> int:
    return int(arguments(norm)["normalized_shape"][0])


class _Compression:
    """A plan carried out: every value of it gets a twin of d - 1 coordinates, and what reads the old ones moves to the twins."""

    def __init__(self, rewrite: CompressStream, streams: Streams, plan: Plan, program: Program) -> None:
        self.rewrite, self.basis, self.streams, self.plan = rewrite, rewrite.basis, streams, plan
        self.program, self.editor = program, Editor(program)
        self.axis = {value.node: value.axis for value in plan.values}
        self.twins: dict[fx.Node, fx.Node | Derived] = {}
        self.wide: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        nodes = list(self.program.graph.nodes)
        for node in nodes:
            if node in self.plan.norms:
                self.convert(node)
            elif node in self.axis:
                self.carry(node)
            elif not any(piece in self.axis and piece.target is operator.getitem for piece in node.users):
                self.widen_operands(node)
        erase_dead(self.program.graph, [node for node in nodes if node in self.axis or node in self.plan.norms])

    # -- what carries the stream ------------------------------------------------------------------------------

    def carry(self, node: fx.Node) -> None:
        """``node`` over narrowed operands."""
        if node.op == "get_attr" or node.target is aten.layer_norm.default:
            return  # narrowed when it is read
        op, axis = self.editor.before(node), self.axis[node]
        carriers = {value.node: value.axis for value in self.streams.axes.carriers(Value(node, axis)) or ()}
        if node.target is operator.getitem:
            whole: Any = node.args[0]
            self.enter(op, node, op.getitem(self.call(op, whole, carriers, None), node.args[1]))
        else:
            self.enter(op, node, self.call(op, node, carriers, axis))

    def enter(self, op: GraphOps, node: fx.Node, twin: fx.Node | Derived) -> None:
        self.twins[node] = twin
        if isinstance(twin, fx.Node):
            twin.meta["origin"] = node.meta.get("origin", node.name)
            relate(twin, Narrowed(self.basis, self.axis[node]))

    def call(self, op: GraphOps, node: fx.Node, carriers: Mapping[fx.Node, int], axis: int | None) -> Any:
        def operand(x: fx.Node) -> Any:
            if x in carriers:
                return self.narrowed(x, carriers[x])
            return x if axis is None else self.cut(op, x, node, axis)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operand)  # type: ignore[misc]
        if axis is not None and node.target in _SIZED:
            position, first = _SIZED[node.target], 0
            if node.target is aten.unflatten.int:
                first = int(args[1]) % rank(node.args[0])  # type: ignore[arg-type]
            args = (*args[:position], _shorter(args[position], axis - first), *args[position + 1 :])
        return op.apply(op_of(node.target), *args, **kwargs)  # type: ignore[arg-type]

    def narrowed(self, x: fx.Node, axis: int) -> fx.Node | Derived:
        """``x`` in d - 1 coordinates: its twin; a weight narrowed once; any other value narrowed where it is made."""
        x = self.streams.same_weight(Value(x, axis)).node
        if x not in self.twins:
            self.twins[x] = self.basis.narrow(self.editor.after(x), x, axis, _size(x, axis))
        return self.twins[x]

    def cut(self, op: GraphOps, x: fx.Node, node: fx.Node, axis: int) -> Any:
        """An operand that is constant along the axis (a mask per token, zeros), as long as the twin is."""
        own = axis - (rank(node) - rank(x))
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if not pointwise or own < 0 or same(x.meta["val"].shape[own], 1):
            return x
        return op.slice(x, own, 0, _size(node, axis) - 1)

    # -- norms and what reads them ----------------------------------------------------------------------------

    def convert(self, node: fx.Node) -> None:
        """layer_norm(x, g, b): linear readers take it narrow, the rest of it in their weights; others get it widened."""
        given, op = arguments(node), self.editor.before(node)
        x, g, b, d = given["input"], given["weight"], given["bias"], _width(node)
        normed = op.node(self.rewrite.norm(op, self.narrowed(x, rank(x) - 1), d, given["eps"]))
        if node in self.axis:  # the gain is constant here: the norm writes a stream itself
            twin = normed if g is None else op.mul(normed, op.slice(g, 0, 0, d - 1))
            self.enter(op, node, twin if b is None else op.add(twin, self.narrowed(b, 0)))
        for reader in list(node.users):
            if self.folds(reader, node):
                self.fold(reader, normed, g, b, d)
        others = [user for user in node.users if not (user in self.plan.norms or (node in self.axis and user in self.axis))]
        if others:
            wide = self.basis.widen(op, normed, rank(node) - 1, d)
            wide = wide if g is None else op.mul(wide, g)
            whole = op.node(wide if b is None else op.add(wide, b))
            whole.meta["origin"] = node.meta.get("origin", node.name)
            for reader in others:
                reader.replace_input_with(node, whole)

    def folds(self, reader: fx.Node, norm: fx.Node) -> bool:
        """Whether ``reader`` is a linear layer over the norm whose weights nobody else reads."""
        if reader.target is not aten.linear.default or reader.args[0] is not norm or reader in self.axis:
            return False
        if norm in reader.args[1:] or not all(self.editor.constant(x) for x in reader.args[1:] if isinstance(x, fx.Node)):
            return False
        return all(user is reader for x in reader.args[1:] if isinstance(x, fx.Node) for user in self.final_readers(x))

    def final_readers(self, weight: fx.Node) -> Iterator[fx.Node]:
        """What is computed at run time from the leaves behind a weight, through whatever is computed from weights alone."""
        expression = self.editor.expression(weight)
        assert expression is not None
        stack = [user for leaf in set(leaves(expression)) for user in self.editor.readers(leaf)]
        while stack:
            user = stack.pop()
            if self.editor.constant(user):
                stack.extend(user.users)
            else:
                yield user

    def fold(self, reader: fx.Node, normed: fx.Node, g: Any, b: Any, d: int) -> None:
        """linear(g n + b, W, c) = linear(n', (W diag(g))', c + W b)"""
        op = self.editor.before(reader)
        _, W, c = (*reader.args, None)[:3]
        if b is not None:
            shift = op.mv(W, b)
            c = shift if c is None else op.add(c, shift)
        W = W if g is None else op.mul(W, g)
        self.program.replace(reader, op.node(op.linear(normed, self.basis.read(op, W, d), c)))

    # -- everybody else ---------------------------------------------------------------------------------------

    def widen_operands(self, node: fx.Node) -> None:
        """A reader of the stream that is blind to the mean but not to the width gets it widened."""
        for x in node.all_input_nodes:
            twin = self.twins.get(x) if x in self.axis else None
            if isinstance(twin, fx.Node):
                if x not in self.wide:
                    axis = self.axis[x]
                    self.wide[x] = self.editor.after(twin).node(
                        self.basis.widen(self.editor.after(twin), twin, axis, _size(x, axis))
                    )
                node.replace_input_with(x, self.wide[x])


_SIZED: Mapping[Any, int] = {
    aten.reshape.default: 1,
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.unflatten.int: 2,
}
"""Where the sizes of the result stand among the arguments."""


def _shorter(sizes: Any, axis: int) -> list[Any]:
    """Sizes with one entry less along an axis, unless that size is inferred."""
    return [n - 1 if i == axis and isinstance(n, int) and n > 0 else n for i, n in enumerate(sizes)]


def _size(x: fx.Node, axis: int) -> int:
    return int(x.meta["val"].shape[axis])
