"""The table of weights: a weight is a leaf of the user's model or an expression over leaves.

    W' = Apply(mul, W, g)          read: the product of the leaves "W" and "g"

An edit never computes at once. It is an expression, so it can be evaluated on anything: on float64 leaves (the one
rounding happens when the finished program is materialised), on meta tensors, on a state dict of the original, on
leaves that require gradients (which is how a gradient goes back through the weight map).

Two names of one storage are one weight. The leaves are the user's own tensors: shared, never written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ._torch import storage_key

Kind = Literal["parameter", "buffer", "constant"]


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


def evaluate(expression: Expression, leaf: Callable[[str], Tensor]) -> Tensor:
    """The value of ``expression`` with the leaves that ``leaf`` gives.

    A cast inside it does not narrow float64: what is folded in float64 is rounded once, at the end.
    """
    if isinstance(expression, Leaf):
        return leaf(expression.name)

    def value(x: Any) -> Any:
        return evaluate(x, leaf) if isinstance(x, Leaf | Apply) else x

    args = _map(expression.args, value)
    kwargs = {k: _map(v, value) for k, v in expression.kwargs}
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
        args, kwargs = _map(args, _widen), {k: _map(v, _widen) for k, v in kwargs.items()}
    result: Tensor = expression.target(*args, **kwargs)
    return result


def _widen(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def leaves(expression: Expression) -> Iterator[str]:
    """The names of the leaves that ``expression`` reads, in order, with repetitions."""
    if isinstance(expression, Leaf):
        yield expression.name
        return
    found: list[str] = []
    for x in (*expression.args, *(v for _, v in expression.kwargs)):
        _map(x, lambda y: found.extend(leaves(y)) if isinstance(y, Leaf | Apply) else None)
    yield from found


def _map(x: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_map(y, function) for y in x)
    return function(x)


@dataclass(frozen=True)
class Weight:
    """One name of the table.

    Attributes:
        name: dotted path; the key in the state dict.
        expression: what it is, over the leaves; ``Leaf(name)`` for an untouched weight.
        meta: shape, dtype and device as a fake or meta tensor.
        kind: parameter, buffer, or a constant that the capture lifted out of the code.
        persistent: whether it is in the state dict.
        requires_grad: whether it trains.
    """

    name: str
    expression: Expression
    meta: Tensor
    kind: Kind
    persistent: bool = True
    requires_grad: bool = False

    @property
    def edited(self) -> bool:
        return self.expression != Leaf(self.name)


class Weights:
    """Names to weights, and the leaves behind them.

    Args:
        leaves: the user's tensors by name; ties (two names, one storage) are kept as they are.
        entries: the table; by default every leaf as itself.

    Attributes:
        live: edits are computed at every call, and the leaves stay the parameters: for a model that will be trained.
            Otherwise once, when the program is emitted.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], entries: Mapping[str, Weight], origin: Mapping[str, Weight] | None = None
    ) -> None:
        self.leaves = dict(leaves)
        self.entries = dict(entries)
        self._origin = dict(origin if origin is not None else entries)  # what each leaf was, also after its name is gone
        self._staged: dict[Expression, str] = {}
        self.live = False

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        transient: frozenset[str] = frozenset(),
    ) -> Weights:
        """The table of a fresh capture. ``transient`` names the buffers that are not in the state dict."""
        entries: dict[str, Weight] = {}
        for kind, group in (("parameter", parameters), ("buffer", buffers), ("constant", constants)):
            for name, tensor in group.items():
                persistent = kind != "constant" and name not in transient
                entries[name] = Weight(name, Leaf(name), tensor, kind, persistent, tensor.requires_grad)  # type: ignore[arg-type]
        return cls({**parameters, **buffers, **constants}, entries)

    def __getitem__(self, name: str) -> Weight:
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def copy(self) -> Weights:
        twin = Weights(self.leaves, self.entries, self._origin)
        twin._staged, twin.live = dict(self._staged), self.live
        return twin

    def folded(self, leaves: Mapping[str, Tensor]) -> Weights:
        """The same table over other values of the leaves, its edits computed once."""
        twin = self.copy()
        twin.leaves, twin.live = {name: leaves[name] for name in self.leaves}, False
        return twin

    def emitted(self) -> dict[str, Weight]:
        """The weights that an emitted module holds, by name: the leaves if edits are live, else the table."""
        return dict(self._origin if self.live else self.entries)

    # -- identity ---------------------------------------------------------------------------------------------

    def storage(self, name: str) -> Hashable:
        """The identity of the storage behind a name; an edited weight is its own."""
        weight = self.entries[name]
        return storage_key(self.leaves[name]) if not weight.edited else name

    def aliases(self, name: str) -> tuple[str, ...]:
        """Every name of the storage of ``name``, itself included."""
        storage = self.storage(name)
        return tuple(other for other in self.entries if self.storage(other) == storage)

    def whole(self, name: str) -> bool:
        """Whether all names of the storage see the same elements in the same order; an edited weight has one name."""
        if self.entries[name].edited:
            return True
        views = {(t.storage_offset(), tuple(t.shape), t.stride()) for t in map(self.leaves.__getitem__, self.aliases(name))}
        return len(views) == 1

    # -- values -----------------------------------------------------------------------------------------------

    def value(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor behind a name.

        Without ``dtype``, an untouched weight is the user's own tensor and an edited one is computed in float64 (in the
        leaves' own dtype if edits are live) and cast once to its dtype. With ``dtype``, floating leaves are promoted to it.
        """
        weight = self.entries[name]
        if dtype is not None:
            return evaluate(weight.expression, lambda leaf: _promote(self.leaves[leaf].detach(), dtype))
        if not weight.edited:
            return self.leaves[name]
        wide = None if self.live else torch.float64
        value = evaluate(weight.expression, lambda leaf: _promote(self.leaves[leaf].detach(), wide))
        return value.to(weight.meta.dtype).contiguous()

    # -- edits ------------------------------------------------------------------------------------------------

    def stage(self, expression: Expression, meta: Tensor, name: str) -> str:
        """Enter a new weight; returns its name, ``name`` itself if it is free.

        An expression that is already in the table (as a weight of the same dtype) is not entered twice.
        """
        known = expression.name if isinstance(expression, Leaf) else self._staged.get(expression, name)
        if known in self.entries and self.entries[known].expression == expression:
            return known
        sources = [self._origin[leaf] for leaf in leaves(expression)]
        trains = any(source.requires_grad for source in sources) and meta.dtype.is_floating_point
        kind: Kind = "parameter" if any(source.kind == "parameter" for source in sources) else "buffer"
        persistent = any(source.persistent for source in sources)
        unique, count = name, 0
        while unique in self.entries:
            count += 1
            unique = f"{name}_{count}"
        self.entries[unique] = Weight(unique, expression, meta, kind, persistent, trains)
        self._staged[expression] = unique
        return unique

    def rename(self, old: str, new: str) -> None:
        """Give the weight ``old`` the name ``new``; whatever had that name is dropped from the table."""
        self.entries = {
            (new if name == old else name): (replace(weight, name=new) if name == old else weight)
            for name, weight in self.entries.items()
            if name != new
        }

    def drop(self, name: str) -> None:
        del self.entries[name]

    # -- the weight map ---------------------------------------------------------------------------------------

    def edits(self) -> dict[str, str]:
        """What every emitted weight is over the original's, as a short text: equal texts, equal edits."""
        if self.live:
            return {}
        edited = {name: str(weight.expression) for name, weight in self.entries.items() if weight.edited and weight.persistent}
        return {name: sha256(expression.encode()).hexdigest()[:16] for name, expression in edited.items()}

    def from_original(self, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Map a state dict of the original model to one of the rewritten model, marked as such (see ``marked``)."""
        mapped: OrderedDict[str, Tensor] = OrderedDict()
        for name, weight in self.emitted().items():
            if not weight.persistent:
                continue
            if not weight.edited:
                mapped[name] = state[name]
                continue
            value = evaluate(weight.expression, lambda leaf: _promote(state.get(leaf, self.leaves[leaf]).detach(), torch.float64))
            mapped[name] = value.to(weight.meta.dtype).contiguous()
        return marked(mapped, self.edits())


MARK = "tautomer"


def marked(state: Mapping[str, Tensor], edits: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """``state`` as a state dict whose metadata say which of its weights are edited, and how."""
    twin = OrderedDict(state)
    twin._metadata = {"": {"version": 1, MARK: dict(edits)}}  # type: ignore[attr-defined]
    return twin


def _promote(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


MUTATED = "tautomer_mutated"
"""Metadata of a node whose memory a call in the graph writes."""


def opaque(node: fx.Node) -> bool:
    """Whether the node's memory is written somewhere in the graph: a rewrite must not move, match or fold it."""
    return bool(node.meta.get(MUTATED, False))


# -- weights in a graph ---------------------------------------------------------------------------------------


def expression_of(node: Any, weights: Weights) -> Expression | None:
    """``node`` as an expression over leaves, or None if it depends on an input.

    Seen through pure functions of weights: ``t(W)``, the transposed weight of a Hugging Face Conv1D, is a weight.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr" and not opaque(node):
        return weights[str(node.target)].expression if node.target in weights else None
    if not _reads_weights_alone(node, weights):
        return None
    operands = {operand: expression_of(operand, weights) for operand in node.all_input_nodes}
    substitute = lambda x: operands[x] if isinstance(x, fx.Node) else x  # noqa: E731
    args = tuple(_map(_plain(a), substitute) for a in node.args)
    kwargs = tuple((k, _map(_plain(v), substitute)) for k, v in node.kwargs.items())
    return Apply(node.target, args, kwargs)  # type: ignore[arg-type]


def _reads_weights_alone(node: fx.Node, weights: Weights) -> bool:
    """Leaves at the first sight of an input, without recursion: a runtime value may be thousands of calls deep."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.target in weights and not opaque(node):
            continue
        if node.op != "call_function" or not node.all_input_nodes or not _pure(node.target):
            return False
        fresh = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return True


def _plain(x: Any) -> Any:
    """fx keeps its own list type in arguments; an expression holds tuples, so that it can be compared and hashed."""
    return tuple(map(_plain, x)) if isinstance(x, (list, tuple)) else x


def _pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not schema.is_mutable and not random and len(schema.returns) == 1
