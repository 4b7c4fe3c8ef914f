"""The table of weights: a weight is a leaf of the user's model or an expression over leaves.

    W' = Apply(mul, W, g)          read: the product of the leaves "W" and "g"

An edit never computes at once. It is an expression (expressions.py), computed in float64 and rounded once when the
finished program is materialised.

Two names of one storage are one weight. The leaves are the user's own tensors: shared, never written.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ._torch import storage_key
from .errors import UsageError
from .evidence import ROUNDING, relative_error
from .expressions import Apply, Expression, Leaf, digest, evaluate, leaves, map_leaves, promote
from .inverse import origin

__all__ = ["Apply", "Expression", "Kind", "Leaf", "Weight", "Weights", "evaluate", "expression_of", "leaves", "marked", "opaque"]

Kind = Literal["parameter", "buffer", "constant", "measured"]


@dataclass(frozen=True)
class Weight:
    """One name of the table.

    Attributes:
        name: dotted path; the key in the state dict.
        expression: what it is, over the leaves; ``Leaf(name)`` for an untouched weight.
        meta: shape, dtype and device as a fake or meta tensor.
        kind: parameter, buffer, a constant that the capture lifted out of the code, or measured: what a rewrite found out from
            data, which no state dict of the original has.
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
        leaves' own dtype if edits are live) and cast once to its dtype. With ``dtype``, a floating one is computed in float64.
        """
        weight = self.entries[name]
        if dtype is not None:
            return promote(evaluate(weight.expression, self.leaf), dtype)
        if not weight.edited:
            return self.leaves[name]
        if self.live:
            value = evaluate(weight.expression, lambda leaf: self.leaves[leaf].detach(), None)
        else:
            value = evaluate(weight.expression, self.leaf)
        return value.to(weight.meta.dtype).contiguous()

    def leaf(self, name: str) -> Tensor:
        """A leaf, without its gradient, in float64 if it is floating."""
        return promote(self.leaves[name].detach(), torch.float64)

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
        kind: Kind = "parameter" if any(source.kind == "parameter" or source.requires_grad for source in sources) else "buffer"
        persistent = any(source.persistent for source in sources)
        unique, count = name, 0
        while unique in self.entries:
            count += 1
            unique = f"{name}_{count}"
        self.entries[unique] = Weight(unique, expression, meta, kind, persistent, trains)
        self._staged[expression] = unique
        return unique

    def measured(self, name: str, value: Tensor, trains: bool = False) -> Leaf:
        """A tensor that is not the model's but was measured, as a leaf for expressions; it is no weight by itself.

        ``trains``: a weight that is made of it is a new parameter, where the edit is computed once.
        """
        unique, count = name, 0
        while unique in self.leaves or unique in self.entries:
            count += 1
            unique = f"{name}_{count}"
        self.leaves[unique] = value
        self._origin[unique] = Weight(unique, Leaf(unique), value, "measured", requires_grad=trains)
        return Leaf(unique)

    def measures(self, name: str) -> bool:
        """Whether a weight is made of what was measured."""
        return any(self._origin[leaf].kind == "measured" for leaf in leaves(self.entries[name].expression))

    def adopt(self, other: Weights) -> None:
        """Take in what rewrites of ``other``, a copy of this table, measured."""
        for name, weight in other._origin.items():
            if weight.kind == "measured":
                self.leaves[name], self._origin[name] = other.leaves[name], weight

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
        edited = {name: weight for name, weight in self.entries.items() if weight.edited and weight.persistent}
        return {name: digest(weight.expression) for name, weight in edited.items()}

    def from_original(self, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Map a state dict of the original model to one of the rewritten model, marked as such (see ``marked``)."""
        mapped: OrderedDict[str, Tensor] = OrderedDict()
        for name, weight in self.emitted().items():
            if not weight.persistent:
                continue
            if not weight.edited:
                mapped[name] = self.leaves[name] if self._origin[name].kind == "measured" else state[name]
                continue
            value = evaluate(weight.expression, lambda leaf: promote(state.get(leaf, self.leaves[leaf]).detach(), torch.float64))
            mapped[name] = value.to(weight.meta.dtype).contiguous()
        return marked(mapped, self.edits())

    def to_original(self, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Map a state dict of the rewritten model, perhaps trained further, back to one of the original model.

        The answer is an original of ``state``: ``from_original(to_original(state))`` is ``state`` up to rounding. An edited
        weight is solved for the leaf it stands for (inverse.py); leaves that are in no weight of the rewritten model any
        more, a folded gain for one, keep the value they had.

        Raises:
            UsageError: a weight is missing, or has no original: an edit without an inverse, or one that training has
                left (a centred matrix that is not centred any more).

        Example: ``model.load_state_dict(fast.weights.to_original(fast.state_dict()))``
        """
        entries = [(name, weight) for name, weight in self.emitted().items() if weight.persistent]
        if missing := [name for name, _ in entries if name not in state]:
            raise UsageError(f"the state dict has no '{missing[0]}'", hint="pass the rewritten model's own state_dict()")
        value = {name: promote(state[name].detach(), torch.float64) for name, _ in entries}
        edits = {name: (weight.expression, value[name]) for name, weight in entries if weight.edited}
        kept = {alias: name for name, weight in entries if not weight.edited for alias in self._names(name)}
        leaf = {name: promote(tensor.detach(), torch.float64) for name, tensor in self.leaves.items()}
        leaf |= {alias: value[name] for alias, name in kept.items()}
        fixed = frozenset(name for name, weight in self._origin.items() if weight.kind != "parameter")
        found = origin(edits, leaf, frozenset(kept), self._names, fixed)
        leaf |= found
        for name, (expression, wanted) in edits.items():
            error = relative_error(evaluate(expression, leaf.__getitem__), wanted)
            if not error <= ROUNDING * torch.finfo(state[name].dtype).eps:
                raise UsageError(
                    f"'{name}' has no original any more: {expression} gives it back with an error of {error:.1e} only"
                )
        original: OrderedDict[str, Tensor] = OrderedDict()
        for name in (name for name, weight in self._origin.items() if weight.persistent and weight.kind != "measured"):
            solved = found.get(name)
            original[name] = self.leaves[name].detach() if solved is None else solved.to(self.leaves[name].dtype).contiguous()
            if name in kept:
                original[name] = state[kept[name]]
        return original

    def _names(self, leaf: str) -> list[str]:
        """Every name of the user's tensor behind a leaf."""
        views = {name: (storage_key(t), t.storage_offset(), t.shape, t.stride()) for name, t in self.leaves.items()}
        return [name for name, view in views.items() if view == views[leaf]]


MARK = "tautomer"


def marked(state: Mapping[str, Tensor], edits: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """``state`` as a state dict whose metadata say, at every module, which of the weights there and below are edited, and how."""
    twin = OrderedDict(state)
    metadata = {path: {**known, MARK: {}} for path, known in getattr(state, "_metadata", {"": {"version": 1}}).items()}
    for name, edit in edits.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            known = metadata.setdefault(".".join(parts[:depth]), {MARK: {}})
            known[MARK][".".join(parts[depth:])] = edit
    twin._metadata = metadata  # type: ignore[attr-defined]
    return twin


def wrongly_marked(state: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, Any], edits: Mapping[str, str]) -> str | None:
    """The first weight below ``prefix`` of a state dict whose ``metadata`` there do not say that it is edited as in ``edits``."""
    given = metadata.get(MARK, {})
    names = dict.fromkeys((*edits, *given))
    return next((name for name in names if prefix + name in state and given.get(name) != edits.get(name)), None)


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
    if not isinstance(node, fx.Node) or not _reads_weights_alone(node, weights):
        return None
    found: dict[fx.Node, Expression] = {}

    def visit(x: fx.Node) -> Expression:
        if x not in found:
            found[x] = weights[str(x.target)].expression if x.op == "get_attr" else call(x)
        return found[x]

    def call(x: fx.Node) -> Apply:
        substitute = lambda y: visit(y) if isinstance(y, fx.Node) else y  # noqa: E731
        args = tuple(map_leaves(_plain(a), substitute) for a in x.args)
        return Apply(x.target, args, tuple((k, map_leaves(_plain(v), substitute)) for k, v in x.kwargs.items()))  # type: ignore[arg-type]

    return visit(node)


def _reads_weights_alone(node: fx.Node, weights: Weights) -> bool:
    """Leaves at the first sight of an input, without recursion: a runtime value may be thousands of calls deep."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.target in weights and not opaque(node):
            continue
        if node.op != "call_function" or not node.all_input_nodes or opaque(node) or not _pure(node.target):
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
        return target is operator.getitem  # one result of several
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not target._schema.is_mutable and not random and bool(target._schema.returns)
