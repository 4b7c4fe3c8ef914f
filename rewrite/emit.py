"""The vocabulary over a graph: ``op.linear(x, W, b)`` makes the node, or, over weights alone, the weight.

    op = GraphOps(program, anchor)            new nodes stand before ``anchor`` and inherit its provenance
    op.linear(x, op.mul(W, g), b)             one new node; W ⊙ g is a new weight, computed when the program is emitted

Partial evaluation: an op whose tensors are all weights makes no node but an expression over weights. It becomes a
weight of the table when something computed at run time reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ._torch import erased, storage_key
from .errors import require
from .metadata import Derived, Metadata, value_of
from .ops import CONVOLUTIONS, OPS, Op, Ops, form_of, is_pure, normal
from .program import Program, inherit
from .shapes import product, static
from .weights import Apply, Expression, Leaf, expression_of, leaves, opaque


class Editor:
    """What the emissions into one program share: remembered metadata, and the nodes that read weights.

    Keep one for a pass over a large program; ``GraphOps`` makes its own where that does not matter.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.metadata = Metadata(program.fake_mode)
        for target in CONVOLUTIONS:
            for node in program.graph.find_nodes(op="call_function", target=target):
                self.metadata.learn(node)
        self._constant: dict[fx.Node, bool] = {}
        self._expressions: dict[fx.Node, Expression | None] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._reads: dict[int, list[fx.Node]] | None = None

    def before(self, anchor: fx.Node, origin: fx.Node | None = None, fold: bool = True) -> GraphOps:
        """An interpretation of ``op`` that emits before ``anchor``, with the provenance of ``origin``."""
        return GraphOps(self.program, anchor, origin=origin, editor=self, fold=fold)

    def after(self, anchor: fx.Node) -> GraphOps:
        """An interpretation of ``op`` that emits right behind ``anchor``, with its provenance."""
        following = anchor.next
        while following.op in ("placeholder", "get_attr"):
            following = following.next
        return self.before(following, origin=anchor)

    def constant(self, node: fx.Node) -> bool:
        """Whether ``node`` reads weights alone, none of which the graph writes. Each node is looked at once."""
        path = [node]  # no recursion: a runtime value may be thousands of calls deep
        while (answer := self._constant.get(node)) is None:
            at = path[-1]
            decided = self._decide(at)
            if isinstance(decided, fx.Node):
                path.append(decided)
            else:
                self._constant[at] = decided
                path.pop()
        return answer

    def _decide(self, node: fx.Node) -> bool | fx.Node:
        """The answer for ``node``, or the operand to ask first."""
        if node.op == "get_attr":
            return node.target in self.program.weights and not opaque(node)
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands or not is_pure(node.target) or opaque(node):
            return False
        known = list(map(self._constant.get, operands))
        if False in known:
            return False
        return operands[known.index(None)] if None in known else True

    def expression(self, node: Any) -> Expression | None:
        """``node`` as an expression over leaves, remembered; None if it is computed at run time."""
        if not isinstance(node, fx.Node) or not self.constant(node):
            return None
        if node not in self._expressions:
            self._expressions[node] = expression_of(node, self.program.weights)
        return self._expressions[node]

    def attribute(self, name: str) -> fx.Node:
        """The node that reads weight ``name``, at the head of the graph, where it dominates everything."""
        node = self._attributes.get(name)
        if node is None or erased(node) or node.target != name:
            graph = self.program.graph
            with graph.inserting_before(next(iter(graph.nodes))):
                node = self._attributes[name] = graph.get_attr(name)
            node.meta["val"] = self.program.weights[name].meta
            self._enter(node)
        return node

    def readers(self, leaf: str) -> Iterator[fx.Node]:
        """The nodes that read the storage of a leaf, under any of its names. O(their number) after the first question."""
        if self._reads is None:
            self._reads = {}
            for node in self.program.graph.find_nodes(op="get_attr"):
                self._enter(node)
        for node in self._reads.get(storage_key(self.program.weights.leaves[leaf]), ()):
            if not erased(node):
                yield from node.users

    def _enter(self, node: fx.Node) -> None:
        weight = self.program.weights.entries.get(str(node.target))
        if self._reads is not None and weight is not None and not weight.edited:
            self._reads.setdefault(storage_key(self.program.weights.leaves[weight.name]), []).append(node)


class GraphOps(Ops):
    """Emission before ``anchor``.

    Args:
        program: the program whose graph and weights change.
        anchor: new nodes stand before this node.
        origin: whose provenance they inherit; by default the anchor's.
        fold: whether an op over weights alone makes a weight; False makes a node of it like of any other.

    Attributes:
        created: the nodes made so far, in order.
        staged: the weights entered so far.
    """

    def __init__(self, program: Program, anchor: fx.Node, *, origin: fx.Node | None = None, editor: Editor | None = None,
                 fold: bool = True) -> None:  # fmt: skip
        self.program, self.anchor, self.origin, self.fold = program, anchor, origin or anchor, fold
        self.editor = editor or Editor(program)
        self.created: list[fx.Node] = []
        self.staged: list[str] = []

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> fx.Node | Derived:
        """The new node, or the new weight if every tensor operand is one.

        Raises:
            Refused: the op does not accept these operands.
        """
        fake = self.editor.metadata.call(op.target, args, kwargs)
        if not self.fold:
            return self._emit(op, args, kwargs, fake)
        operands = [*_operands(args), *_operands(kwargs.values())] if kwargs else list(_operands(args))
        if operands and isinstance(fake, Tensor) and all(map(self.constant, operands)):
            substitute = lambda x: self.expression(x) if isinstance(x, (fx.Node, Derived)) else x  # noqa: E731
            keywords = tuple((k, _plain(v, substitute)) for k, v in kwargs.items())
            return Derived(Apply(op.target, _plain(args, substitute), keywords), fake)
        if any(isinstance(x, Derived) for x in operands):
            args, kwargs = self._stage_operands(op, args, kwargs)
        return self._emit(op, args, kwargs, fake)

    def _emit(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], fake: Any) -> fx.Node:
        with self.program.graph.inserting_before(self.anchor):
            node = self.program.graph.create_node("call_function", op.target, args, kwargs, name=op.name)
        node.meta |= {"val": fake, "rewritten": True}
        inherit(node, self.origin)
        self.created.append(node)
        return node

    def constant(self, x: Any) -> bool:
        return isinstance(x, Derived) or (isinstance(x, fx.Node) and self.editor.constant(x))

    def inside(self, x: Any, name: str) -> tuple[Any, ...] | None:
        return normal(x) if isinstance(x, fx.Node) and x.target is OPS[name].target else None

    def expression(self, x: Any) -> Expression | None:
        """``x`` as an expression over the leaves, if it reads weights alone."""
        return x.expression if isinstance(x, Derived) else self.editor.expression(x)

    def width(self, x: fx.Node | Derived) -> int:
        """The size of the last axis.

        Raises:
            Refused: it depends on the input.
        """
        size = static(value_of(x).shape[-1])
        require(size is not None, "the size of the last axis depends on the input")
        assert size is not None
        return size

    def filled(self, size: int, value: float, like: Any) -> Derived:
        """A vector of one value as a weight that depends on no leaf, computed in float64."""
        fake = self.editor.metadata.call(torch.ops.aten.new_full.default, (like, [size], value), {})
        return Derived(Apply(torch.ops.aten.full.default, ((size,), value), (("dtype", torch.float64),)), fake)

    def dtype(self, x: fx.Node | Derived) -> Any:
        """The dtype of ``x``."""
        return value_of(x).dtype

    def weight(self, x: Any) -> Any:
        """``x`` as a weight of its own, if it is computed from weights; anything else as it is."""
        if not isinstance(x, fx.Node) or x.op != "call_function":
            return x
        expression = self.expression(x)
        return x if expression is None else Derived(expression, value_of(x))

    def measured(self, name: str, value: Tensor, like: fx.Node, trains: bool = False) -> Derived:
        """A tensor that was measured, as a weight that expressions may read: of the dtype and on the device of ``like``.

        ``trains``: a weight that is made of it is a parameter.
        """
        return Derived(self.program.weights.measured(name, value, trains), value_of(like).new_empty(value.shape))

    def instead(self, name: str, value: Tensor, old: fx.Node) -> Derived:
        """A tensor that takes the place of the weight ``old`` without being computed from it, as a weight beside it.

        It trains if that does, and is named beside it; there is no way back to an original.
        """
        leaf = next(leaves(self.expression(old)))  # type: ignore[arg-type]
        parent, dot, _ = leaf.rpartition(".")
        return Derived(
            Apply(in_place_of, (self.program.weights.measured(parent + dot + name, value), Leaf(leaf))),
            value_of(old).new_empty(value.shape),
        )

    def tensor(self, name: str, value: Tensor, like: fx.Node, trains: bool = False) -> fx.Node:
        """A tensor that the rewrite brings along, on the device of ``like``: a buffer, or a new parameter that ``trains``."""
        value = value.detach().to(value_of(like).device)
        leaf = self.program.weights.measured(name, value.requires_grad_(trains), trains)
        fake = value_of(like).new_empty(value.shape, dtype=value.dtype).requires_grad_(trains)
        return self._enter(Derived(leaf, fake), leaf.name)

    def node(
        self, x: fx.Node | Derived, hint: str = "weight", beside: fx.Node | Derived | None = None, name: str | None = None
    ) -> fx.Node:
        """``x`` as a node of the graph: a new weight is entered in the table and read.

        ``hint`` is the last part of its name (the whole name if it has no leaf); the rest is the path of its largest leaf, or
        of that of the weight ``beside`` it. ``name`` is a whole name, taken as it is if it is free.
        """
        if isinstance(x, fx.Node):
            return x
        if name is not None:
            return self._enter(x, name)
        neighbour = self.expression(beside)
        largest = _largest(neighbour or x.expression, self.program)
        if largest is None:
            return self._enter(x, hint)
        if x.fake.ndim == 2 and _stored_transposed(x.expression, largest):
            # The user's layout stays: the new matrix is stored as the old one is, and read through t().
            stored = self.apply(OPS["t"], x)
            assert isinstance(stored, Derived)
            return self._emit(OPS["t"], (self._enter(stored, _name(stored, largest, hint, self.program)),), {}, x.fake)
        return self._enter(x, _name(x, largest, hint, self.program))

    def rollback(self) -> None:
        """Take every new node and weight back; nothing may read them yet."""
        for node in reversed(self.created):
            self.program.graph.erase_node(node)
        for name in self.staged:
            self.program.graph.erase_node(self.editor.attribute(name))
            self.program.weights.drop(name)
        self.created, self.staged = [], []

    def _enter(self, x: Derived, name: str) -> fx.Node:
        entries = self.program.weights.entries
        known = len(entries)
        name = self.program.weights.stage(x.expression, x.fake, name)
        if len(entries) > known:
            self.staged.append(name)
        return self.editor.attribute(name)

    def _stage_operands(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        form = form_of(op.target)
        names = form.names if form else ("",) * len(args)
        staged = tuple(self._stage(a, name) for a, name in zip(args, names, strict=False))
        return staged, {name: self._stage(v, name) for name, v in kwargs.items()}

    def _stage(self, x: Any, name: str) -> Any:
        return map_aggregate(x, lambda y: self.node(y, name) if isinstance(y, Derived) else y)


def in_place_of(value: Tensor, old: Tensor) -> Tensor:
    """``value``, which is not computed from ``old`` and makes it superfluous."""
    return value


def _operands(x: Any) -> Iterator[fx.Node | Derived]:
    for y in x:
        if isinstance(y, (fx.Node, Derived)):
            yield y
        elif isinstance(y, (list, tuple)):
            yield from _operands(y)


def _plain(x: Any, substitute: Callable[[Any], Any]) -> Any:
    """An expression holds tuples, so that it can be compared and hashed."""
    return tuple(_plain(y, substitute) for y in x) if isinstance(x, (list, tuple)) else substitute(x)


def _largest(expression: Expression, program: Program) -> str | None:
    """The leaf with the most elements: a new weight is named after it."""
    return max(leaves(expression), key=lambda leaf: product(program.weights.leaves[leaf].shape), default=None)


def _name(x: Derived, largest: str, hint: str, program: Program) -> str:
    """``h.0.attn.c_attn.bias``: the leaf it takes the place of, or beside the largest leaf, after the argument it serves."""
    parent, dot, _ = largest.rpartition(".")
    for leaf in leaves(x.expression):
        if leaf.rpartition(".")[0] == parent and program.weights.leaves[leaf].shape == x.fake.shape:
            return leaf
    return parent + dot + hint if hint in ("weight", "bias") else largest


def _stored_transposed(expression: Expression, leaf: str) -> bool:
    """Whether ``expression`` reads ``leaf`` through ``t``."""
    if isinstance(expression, Leaf):
        return False
    if expression.target is OPS["t"].target and expression.args == (Leaf(leaf),):
        return True
    return any(_stored_transposed(x, leaf) for x in expression.args if isinstance(x, (Leaf, Apply)))
