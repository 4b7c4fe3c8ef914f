"""The mean of a residual stream: who writes it, who would notice its absence, and where it can be removed.

    LayerNorm(x + c 1) = LayerNorm(x)  for one free constant c per token

so the mean of a stream that only LayerNorms (over that axis) read is never observed, and may be removed at the writers.
Two separate proofs per stream, at the granularity of one free constant per token:

    zero mean (forward)   every value to be centred is centred by its carriers: edited weights, or values centred in turn
    blindness (backward)  every reader of a centred value is blind to its mean, or carries it on to such readers

Where a carrier cannot be centred by editing a weight, one centring at run time (x - mean) stands in for it and has a
price; which values to centre is the most profitable closed selection (selection.py). Nothing here names a model family.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from .axes import Axes, Value, blind, rank
from .pass_base import Pass, fixed
from .program import Program, arguments, place, source_of, target_name
from .selection import Selection
from .weights import opaque

aten = torch.ops.aten

REWARD, PRICE = 2, 3
"""One norm converted against one centring inserted: a centring must be paid for by more than one norm."""

AfterDropout = Literal["refuse", "centre"]
"""What to do where residual dropout writes a stream: leave the norms that read it, or centre after it at no price."""


@dataclass(frozen=True)
class Plan:
    """What to centre so that the chosen norms read zero-mean streams.

    Attributes:
        norms: the LayerNorm nodes whose input will have zero mean.
        weights: the weights to centre at rest, each with the axis of its table entry.
        values: every value that will be its own old value less its mean; the weights' values included.
        runtime: the values to centre at run time, each with the calls that were promised a centred one.
    """

    norms: tuple[fx.Node, ...]
    weights: tuple[Value, ...]
    values: frozenset[Value]
    runtime: dict[Value, tuple[fx.Node, ...]]


class Streams:
    """The streams that a set of LayerNorms read.

    Args:
        program: must not change while this is in use.
        norms: LayerNorm nodes over one axis, the candidates.
        dropout: what to do where residual dropout writes a stream.
    """

    def __init__(self, program: Program, norms: Iterable[fx.Node], dropout: AfterDropout = "refuse") -> None:
        self.program, self.dropout = program, dropout
        self.axes = Axes(program)
        self.norms = tuple(norms)
        self._tied = _by_storage(program)
        self.values: set[Value] = set()
        self.observers: dict[Value, list[fx.Node]] = {}
        self.onward: dict[Value, list[Value]] = {}
        self._explore(self.wanted(norm) for norm in self.norms)

    @staticmethod
    def wanted(norm: fx.Node) -> Value:
        """The value a norm normalises."""
        x = norm.args[0]
        assert isinstance(x, fx.Node)
        return Value(x, rank(x) - 1)

    # -- the region -------------------------------------------------------------------------------------------

    def _explore(self, seeds: Iterable[Value]) -> None:
        """Close the wanted values under their carriers and under the values that carry them on."""
        queue = deque(seeds)
        while queue:
            value = self.same_weight(queue.popleft())
            if value in self.values:
                continue
            self.values.add(value)
            self.observers[value], self.onward[value] = self._read(value)
            queue.extend(self.carriers(value) or ())
            queue.extend(self.onward[value])

    def _read(self, value: Value) -> tuple[list[fx.Node], list[Value]]:
        """Who sees the mean of a value, and which values carry it on."""
        observers: list[fx.Node] = []
        onward: list[Value] = []
        for node in self._tied.get(value.node, (value.node,)):
            for user in node.users:
                operand = Value(node, value.axis)
                if blind(user, operand):
                    continue
                carried = self.axes.carried(operand, user)
                onward.extend(carried)
                if not carried or not self._covers(user, operand, carried):
                    observers.append(user)
        return observers, onward

    def _covers(self, user: fx.Node, operand: Value, carried: list[Value]) -> bool:
        """Whether the carried values account for everything ``user`` does with the operand.

        A call that reads one node twice (``x * x``, ``matmul(x, x)``) carries at most one of the two readings on, and a
        split must carry the axis in every piece.
        """
        if isinstance(user.meta.get("val"), (tuple, list)):
            return {value.node for value in carried} == set(user.users)
        return all((self.axes.carriers(value) or ()).count(operand) >= _reads(user, operand.node) for value in carried)

    def carriers(self, value: Value) -> tuple[Value, ...] | None:
        """The axis carriers of a value, ties resolved; a weight has none and needs none."""
        if self.is_weight(value):
            return ()
        found = self.axes.carriers(value)
        if found is None or any(
            _reads(value.node, c.node) > found.count(c) for c in found if c.node in value.node.all_input_nodes
        ):
            return None  # one node in two roles (matmul(x, x)): only one of them carries the axis
        return tuple(map(self.same_weight, found))

    def same_weight(self, value: Value) -> Value:
        """One node stands for all names of one storage."""
        return Value(self._tied.get(value.node, (value.node,))[0], value.axis)

    def is_weight(self, value: Value) -> bool:
        return value.node.op == "get_attr" and value.node.target in self.program.weights and not opaque(value.node)

    def centred_already(self, value: Value) -> bool:
        """Whether the mean is zero as things are: nothing to edit, and nobody to ask."""
        return not self.is_weight(value) and self.carriers(value) == ()

    # -- the choice -------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The most profitable set of norms to convert, with everything that must be centred for it."""
        selection = Selection()
        for norm in self.norms:
            selection.reward(("available", self.same_weight(self.wanted(norm))), REWARD)
        for value in self.values:
            if self.centred_already(value):
                continue
            centred, available = ("centred", value), ("available", value)
            selection.implies(centred, available)
            for reader in self.onward[value]:
                selection.implies(centred, ("centred", reader))
            for carrier in self.carriers(value) or ():
                direct = carrier.node in value.node.all_input_nodes  # a piece of a split reads its whole through the split
                selection.implies(centred, ("available" if direct else "centred", carrier))
            if self.blocked(value):
                selection.forbid(centred)
            if self.is_weight(value) or fixed(value.node):
                selection.implies(available, centred)  # centring a whole table at every call is never a bargain
            else:
                free = self.dropout == "centre" and _drops(value.node)
                selection.price(available, centred, 0 if free else PRICE)
        chosen = selection.solve()
        values = {value for value in self.values if ("centred", value) in chosen}
        at_rest = {value for value in values if self.is_weight(value) and not self.centred_already(value)}
        norms, runtime = list[fx.Node](), dict[Value, tuple[fx.Node, ...]]()
        for value in self._ordered(values):
            for carrier in self.carriers(value) or () if not self.centred_already(value) else ():
                if carrier not in values and not self.centred_already(carrier):
                    runtime[carrier] = (*runtime.get(carrier, ()), value.node)
        for norm in self.norms:
            wanted = self.same_weight(self.wanted(norm))
            if ("available", wanted) not in chosen:
                continue
            norms.append(norm)
            if wanted not in values and not self.centred_already(wanted):
                runtime[wanted] = (*runtime.get(wanted, ()), norm)
        return Plan(tuple(norms), self._ordered(at_rest), frozenset(values), runtime)

    def _ordered(self, values: set[Value]) -> tuple[Value, ...]:
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        return tuple(sorted(values, key=lambda value: (order[value.node], value.axis)))

    def blocked(self, value: Value) -> bool:
        """Whether the value can never be its old self less its mean, whatever is done elsewhere."""
        if self.observers[value]:
            return True
        if self.is_weight(value):
            return not self.program.weights.whole(str(value.node.target))
        return self.carriers(value) is None

    # -- the reasons ------------------------------------------------------------------------------------------

    def why_at_run_time(self, value: Value) -> str:
        """Why a value is centred at run time instead of by its weights, in one sentence."""
        return "; ".join(self._cause(root) for root in self._roots({value}))

    def reason(self, norm: fx.Node) -> str:
        """Why a norm was not chosen, in one sentence.

        First what would be forced: centring the norm's input centres everything that carries it on, so a reader on that
        way that sees a mean is the reason. Without one, it is the price.
        """
        start = self.same_weight(self.wanted(norm))
        if self.carriers(start) is None:
            return f"{_source_phrase(start.node)}; one centring per norm would cost more than the norm saves"
        forced = self._closure({start}, lambda value: self.onward[value])
        for value in self._ordered(forced):
            for observer in self.observers[value]:
                return self._observed(value, observer)
        roots = self._roots(forced)
        for root in roots:
            if reason := fixed(root.node):
                return f"its stream would have to be centred at run time behind {place(root.node)}: {reason}"
        norms = sum(self.same_weight(self.wanted(other)) in forced for other in self.norms)
        needed, saved = _count(len(roots), "centring"), _count(norms, "norm")
        cause = self._cause(roots[0]) if roots else "nothing to gain"
        return f"its stream would need {needed} at run time for {saved}, which costs more than it saves: {cause}"

    def _closure(self, start: set[Value], step: Callable[[Value], Iterable[Value]]) -> set[Value]:
        seen, queue = set(start), deque(start)
        while queue:
            for other in step(queue.popleft()):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return seen

    def _roots(self, values: set[Value]) -> tuple[Value, ...]:
        """The first values on the way back from ``values`` that no edit can centre."""
        backward = self._closure(values, lambda value: () if self._stuck(value) else self.carriers(value) or ())
        return self._ordered({value for value in backward if self._stuck(value)})

    def _stuck(self, value: Value) -> bool:
        """Whether a value can only be centred at run time, for a reason of its own."""
        if self.is_weight(value) or self.centred_already(value):
            return False
        found = self.carriers(value)
        return found is None or bool(self.observers[value]) or any(self._tied_to(c) is not None for c in found)

    def _tied_to(self, value: Value) -> str | None:
        """Where a weight is read in another role, one that needs its mean; None for a weight that may be edited, or no weight."""
        if not self.is_weight(value):
            return None
        for carried in self._ordered(self._closure({value}, lambda v: self.onward[v])):
            for observer in self.observers[carried]:
                return place(observer)
        return "another view of its storage" if self.blocked(value) else None

    def _cause(self, value: Value) -> str:
        found = self.carriers(value)
        if found is None:
            return _source_phrase(value.node)
        for weight in found:
            other = self._tied_to(weight)
            if other is not None:
                return f"the weight {weight.node.target} is tied: {other} reads it too and needs its mean"
        return self._observed(value, self.observers[value][0])

    def _observed(self, value: Value, observer: fx.Node) -> str:
        where = f" ({source_of(observer)})" if source_of(observer) else ""
        return f"{_observer_phrase(observer, value)}{where}"


def _by_storage(program: Program) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For every weight node, all weight nodes of its storage; the first stands for all."""
    groups: dict[object, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target in program.weights:
            groups.setdefault(program.weights.storage(str(node.target)), []).append(node)
    return {node: tuple(group) for group in groups.values() for node in group}


def _reads(user: fx.Node, operand: fx.Node) -> int:
    """How many times a call reads a node."""
    count = 0

    def visit(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node is operand
        return node

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _dropped(at: str) -> str:
    return (
        f"residual dropout at {at} is active in training mode, and what it drops shifts the mean "
        "(dropout='centre' removes the mean after it)"
    )


def _drops(node: fx.Node) -> bool:
    return node.target in (aten.dropout.default, aten.native_dropout.default)


_JOINS = {aten.cat.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def _observer_phrase(observer: fx.Node, value: Value) -> str:
    """What a reader that sees the mean is doing with the raw stream."""
    if observer.op == "output":
        return "the raw stream is an output of the model (returned hidden states)"
    target, at = observer.target, place(observer)
    if target is aten.rms_norm.default:
        return f"an RMSNorm at {at} reads the same stream, and its result depends on the mean"
    if target is aten.layer_norm.default:
        dims = len(arguments(observer)["normalized_shape"])
        over = f"over {dims} dims" if dims != 1 else "over another axis"
        return f"a LayerNorm {over} at {at} reads the stream and sees how the means of its tokens differ"
    if target is aten.group_norm.default:
        return f"a GroupNorm at {at} reads the stream and sees how the means of its positions differ"
    if _drops(observer):
        return _dropped(at)
    if target in (aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default):
        return f"a linear layer at {at} (a router, gate or head) reads the raw stream"
    if target in _JOINS:
        return f"{target_name(observer)} at {at} joins the features of several tokens, whose means can then be told apart"
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return f"a product at {at} scales the features of the stream differently (a gain per channel, or a gate)"
    return f"{target_name(observer)} at {at} reads the raw stream and sees its mean"


def _source_phrase(node: fx.Node) -> str:
    """What a value is that no weight edit can centre."""
    at = place(node)
    if node.op == "placeholder":
        return f"the input '{node.target}' enters the stream as it is"
    if node.op == "get_attr":
        return f"the weight {node.target} has another reader that needs its mean"
    if node.target is aten.layer_norm.default:
        return f"the stream carries the output of the LayerNorm at {at}, whose gain differs between channels (post-norm)"
    if _drops(node):
        return _dropped(at)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return f"a product at {at} scales the features of the stream differently (a gain per channel, or a gate)"
    if node.target in _JOINS:
        return f"{target_name(node)} at {at} joins the features of several tokens, whose means LayerNorm can tell apart"
    return f"{target_name(node)} at {at} writes the stream, and no edit of a weight centres its result"


def candidates(program: Program, rewrite: Pass, admits: Callable[[Pass, fx.Node], bool]) -> list[fx.Node]:
    """The LayerNorms over the last axis alone that the user admits."""
    norms = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    local = (norm for norm in norms if len(arguments(norm)["normalized_shape"]) == 1 and not opaque(norm))
    return [norm for norm in local if admits(rewrite, norm)]
