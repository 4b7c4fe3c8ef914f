"""Which value of a rewritten program stands for each value of the captured one, as the module tree can express it.

Walked in order: a leaf module's call (module_calls.py) must read what stands for its input, and gives what stands for its
output, whatever its code is; every other call must be the same call on values that correspond. What is not is a ``Fault``.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from tautomer.rewrite._torch import storage_key
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.evidence import ROUNDING, relative_error
from tautomer.rewrite.interpret import writes
from tautomer.rewrite.program import Program, arguments, path_of, target_name
from tautomer.rewrite.shapes import same_shape
from tautomer.rewrite.weights import Apply, Leaf, Weight, Weights, evaluate, leaves

from .exchange import text_of
from .live_weights import computed
from .module_calls import Calls, call_of, code_of, own_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Fault:
    """What cannot be written back: why, and the module paths whose rewrites are to blame, the likeliest first."""

    reason: str
    blame: tuple[str, ...]


class _Blame(Exception):
    """A refusal that other paths than the node's own are to blame for."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class Correspondence:
    """Walks the captured program and keeps which value of the rewritten one stands for each of its values, if any does."""

    def __init__(self, captured: Program, rewritten: Program, modules: Mapping[str, nn.Module]) -> None:
        self.captured, self.rewritten, self.modules = captured, rewritten, modules
        self.old, self.new = Calls(captured), Calls(rewritten)
        self.named = {node.name: node for node in rewritten.graph.nodes}
        self.read = {self.storage(str(n.target)) for n in rewritten.graph.find_nodes(op="get_attr") if n.users}
        self.twins: dict[fx.Node, fx.Node | None] = {}
        self.faults: dict[fx.Node, Fault] = {}
        self.texts: dict[str, str] = {}
        self.kept: set[Hashable] = set()
        self.live: set[Hashable] = set()
        self.added: dict[nn.Module, dict[str, str]] = {}
        self.dropped: dict[nn.Module, tuple[str, ...]] = {}

    def run(self) -> None:
        for node in self.captured.graph.nodes:
            if not self.old.at_run_time(node):
                continue
            call = call_of(node) if node.op == "call_function" else ""
            if call in self.modules and node is not self.old.outputs(call)[0]:
                continue
            self.twins[node] = None
            try:
                self.twins[node] = self.module(node, call) if call in self.modules else self.plain(node)
            except Refused as refusal:
                self.faults[node] = Fault(str(refusal), (path_of(node),))
            except _Blame as blame:
                self.faults[node] = blame.fault

    # -- values -----------------------------------------------------------------------------------------------

    def module(self, node: fx.Node, call: str) -> fx.Node | None:
        """What a module returns that may be exchanged: its code is kept if it is the same, else remembered."""
        module, given = self.modules[call], self.twins[self.old.inputs(call)[0]]
        if given is None:
            return None
        outputs = self.new.outputs(call) if call in self.new.nodes else [given]
        if len(outputs) != 1:
            readers = [path_of(user) for output in outputs for user in output.users]
            reason = f"what {type(module).__name__} at '{path_of(node)}' returns would be needed in {len(outputs)} forms"
            raise _Blame(Fault(reason, (*readers, path_of(node))))
        require(call not in self.new.nodes or self.new.inputs(call) == [given], "it would read another value than it is given")
        before, after = code_of(self.old, call, node, module), code_of(self.new, call, outputs[0], module)
        if text_of(before) != text_of(after):
            read = functools.partial(self.attribute, module)
            self.texts[call] = text_of(code_of(self.new, call, outputs[0], module, read))
        return outputs[0]

    def attribute(self, module: nn.Module, graph: fx.Graph, name: str) -> fx.Node:
        """A weight in new code: an attribute, or computed from attributes, and then none is edited. It is computed if it must
        be, or if no other module reads it and its value in the attribute's place would mean something else to the old code. What
        was measured is computed once; what is measured and stands for no weight of the model is a new attribute."""

        def own(name: str) -> fx.Node:
            return graph.get_attr(own_name(name, module, self.captured.weights.leaves))

        table = self.rewritten.weights
        weight = table.entries.get(name)
        if weight is None or not weight.edited:
            return own(name)
        if table.measures(name):
            return own(name) if name in self.captured.weights else graph.get_attr(self.add(module, name))
        readers = (call_of(reader) for reader, _ in self.readers(self.new, name))
        elsewhere = any(self.modules.get(call) is not module for call in readers)
        if not table.live and (elsewhere or self.settled(weight)):
            return own(name)
        try:
            made = computed(graph, weight, table, own, {})
        except Refused:
            if table.live:
                raise
            return own(name)
        self.live.update(map(self.storage, (name, *leaves(weight.expression))))
        return made

    def add(self, module: nn.Module, name: str) -> str:
        """The attribute that a new weight gets, which no other module reads.

        Raises:
            Refused: it has no place there.
        """
        path, _, attribute = name.rpartition(".")
        kind = type(module).__name__
        held = self.added.setdefault(module, {})
        calls = [call for call, other in self.modules.items() if other is module]
        stands = any(path_of(self.old.nodes[call][0]) == path for call in calls)
        alone = all(call_of(reader) in calls for reader, _ in self.readers(self.new, name))
        require(stands and alone, f"it needs a new weight '{name}', which is not {kind}'s alone")
        require(
            self.rewritten.weights[name].kind == "parameter", f"it needs a new buffer '{name}', and the keys of the model stay"
        )
        free = held.get(attribute, name) == name and not hasattr(module, attribute)
        require(free, f"it needs a new weight '{name}', and {kind} has something else of this name")
        held[attribute] = name
        return attribute

    def settled(self, weight: Weight) -> bool:
        """Whether the edit takes the place of a leaf and leaves its own result as it is, as centring does."""
        table = self.captured.weights
        if weight.name not in table:
            return False
        value = evaluate(weight.expression, table.leaf)
        again = evaluate(weight.expression, lambda name: value if name == weight.name else table.leaf(name))
        return value.shape == again.shape and relative_error(again, value) <= ROUNDING * torch.finfo(torch.float64).eps

    def plain(self, node: fx.Node) -> fx.Node | None:
        """What the user's code around the modules computes: the same call on values that correspond."""
        if any(self.twins.get(x, x) is None for x in node.all_input_nodes):
            return None
        twin: fx.Node | None = self.named.get(node.name)
        if twin is not None and twin.target == node.target and self.operands(node, self.twins) == self.operands(twin, {}):
            return twin
        weights = [x for x in node.all_input_nodes if not self.old.at_run_time(x)]
        consumed = [self.storage(name) for x in weights for name in self.leaves(x)]
        others = [x for x in node.all_input_nodes if x not in weights]
        neutral = node.target in _NEUTRAL and consumed and self.read.isdisjoint(consumed) and len(others) == 1
        foreign = f"the rewrite changes {target_name(node)}, which is no module's own code"
        require(neutral and same_shape(node.meta["val"].shape, others[0].meta["val"].shape), foreign)
        self.kept.update(consumed)
        return self.twins[others[0]]

    def operands(self, node: fx.Node, twins: Mapping[fx.Node, fx.Node | None]) -> Any:
        """The arguments of a call, comparable: a value by its node in the rewritten program, a weight by its storage."""

        def comparable(x: fx.Node) -> Any:
            if x.op == "get_attr":
                return ("weight", self.storage(str(x.target)))
            if x in self.old.constants or x in self.new.constants:
                return (x.target, self.operands(x, twins))
            return twins.get(x, x)

        given: Any = fx.node.map_arg((node.args, node.kwargs), comparable)
        return given

    def storage(self, name: str) -> Hashable:
        """The identity of a weight, under any name, edited or not; a new weight is its own."""
        leaf = self.captured.weights.leaves.get(name)
        return name if leaf is None else (storage_key(leaf), leaf.storage_offset(), leaf.shape, leaf.stride())

    def leaves(self, node: fx.Node) -> list[str]:
        expression = self.captured.expression(node)
        return [] if expression is None else list(leaves(expression))

    def needed(self) -> Iterator[Fault]:
        """The faults at values that an output, or a write, depends on."""
        wanted = {self.captured.output, *filter(writes, self.captured.graph.nodes)}
        for node in reversed(self.captured.graph.nodes):
            if node not in wanted:
                continue
            if node in self.faults:
                yield self.faults[node]
            call = call_of(node) if node.op == "call_function" else ""
            wanted.update(self.old.inputs(call) if call in self.modules else node.all_input_nodes)

    # -- modules ----------------------------------------------------------------------------------------------

    def code(self, model: nn.Module) -> tuple[dict[nn.Module, str | None], list[Fault]]:
        """The new code by module; a module that is called several times needs the same in all of its calls."""
        calls: dict[nn.Module, list[str]] = {}
        for call, nodes in self.old.nodes.items():
            calls.setdefault(model.get_submodule(path_of(nodes[0])), []).append(call)
        code, faults = dict[nn.Module, str | None](), list[Fault]()
        for call, text in self.texts.items():
            module, path = self.modules[call], path_of(self.old.nodes[call][0])
            if any(self.texts.get(other) != text for other in calls[module]):
                reason = f"'{path}' is called {len(calls[module])} times, and not all of its calls are rewritten alike"
                faults.append(Fault(reason, tuple(path_of(self.old.nodes[other][0]) for other in calls[module])))
            code[module] = text
        return code, faults

    # -- weights ----------------------------------------------------------------------------------------------

    def weights(self) -> tuple[Weights, tuple[str, ...], list[Fault]]:
        """The table of the model afterwards, the parameters that are read no more, and what cannot be said by the old keys."""
        table, faults = self.captured.weights.copy(), list[Fault]()
        if self.rewritten.weights.live:
            return table, (), faults
        made: dict[Hashable, Apply] = {}
        consumed, gone = set[str](), set[str]()
        fresh = {name for names in self.added.values() for name in names.values()}
        for name, weight in self.rewritten.weights.entries.items():
            if not weight.edited or self.storage(name) in self.live:
                continue
            try:
                if name not in fresh:
                    made[self.storage(name)] = self.edited(name)
            except Refused as refusal:
                faults.append(Fault(str(refusal), (name.rpartition(".")[0],)))
            consumed.update(leaves(weight.expression))
        unread = list[str]()
        for name in consumed & set(table.entries):
            storage = self.storage(name)
            if storage in self.read | self.live or storage in made:
                continue
            if self.drop(name):
                gone.add(name)
                continue
            try:
                made[storage] = self.neutral(name)
            except Refused as refusal:
                faults.append(Fault(str(refusal), tuple(path_of(reader) for reader, _ in self.readers(self.old, name))))
            if storage not in self.kept:
                unread.append(name)
        for name, weight in table.entries.items():
            if (expression := made.get(self.storage(name))) is not None:
                trains = weight.requires_grad and name not in unread
                table.entries[name] = replace(weight, expression=expression, requires_grad=trains)
        table.adopt(self.rewritten.weights)
        table.entries |= {name: self.rewritten.weights[name] for name in fresh}
        table.entries = {name: weight for name, weight in table.entries.items() if name not in gone}
        parameters = tuple(sorted(name for name in unread if table[name].kind == "parameter"))
        return table, parameters, faults

    def drop(self, name: str) -> bool:
        """Whether a consumed weight goes: the module that holds it, and nothing else does, holds new ones in its place."""
        leaf = self.captured.weights.leaves[name]
        for module in self.added:
            held = [attribute for attribute, tensor in module._parameters.items() if tensor is leaf]
            if held and len(self.captured.weights.aliases(name)) == 1:
                self.dropped[module] = (*self.dropped.get(module, ()), *held)
                return True
        return False

    def edited(self, name: str) -> Apply:
        """The expression of an edited weight, which all names of its storage get."""
        before, weight = self.captured.weights, self.rewritten.weights[name]
        require(name in before, f"the rewrite needs a new weight '{name}', and the keys of the model stay")
        require(before.whole(name), f"'{name}' shares its memory with another view")
        same = before[name].meta.dtype == weight.meta.dtype and same_shape(before[name].meta.shape, weight.meta.shape)
        require(same, f"'{name}' would change its shape or dtype")
        others = (self.rewritten.weights.entries.get(other, weight) for other in before.aliases(name))
        alike = all(other.expression == weight.expression for other in others)
        require(alike, f"'{name}' is tied, and would be read in two forms")
        assert isinstance(weight.expression, Apply)
        return weight.expression

    def neutral(self, name: str) -> Apply:
        """The value at which a consumed weight does nothing in the code that reads it."""
        reads = self.readers(self.old, name)
        values = {_neutral_in(reader, operand) if self.old.at_run_time(reader) else None for reader, operand in reads}
        known = len(values) == 1 and None not in values
        require(known, f"'{name}' would be read no more, and no value of it leaves the original class right")
        return Apply(aten.full_like.default, (Leaf(name), values.pop()))

    def readers(self, calls: Calls, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Who reads a weight, and through which node: itself, or another view of it."""
        stack = [
            node for node in calls.program.graph.find_nodes(op="get_attr") if self.storage(str(node.target)) == self.storage(name)
        ]
        while stack:
            node = stack.pop()
            for user in node.users:
                if user in calls.constants and user.target in _VIEWS:
                    stack.append(user)
                else:
                    yield user, node


_ANY_SUM, _ANY_PRODUCT = dict.fromkeys(("self", "other"), 0.0), dict.fromkeys(("self", "other"), 1.0)
_NEUTRAL: dict[Any, Mapping[str, float]] = {
    aten.add.Tensor: _ANY_SUM,
    aten.mul.Tensor: _ANY_PRODUCT,
    aten.layer_norm.default: {"weight": 1.0, "bias": 0.0},
    aten.rms_norm.default: {"weight": 1.0},
    aten.linear.default: {"bias": 0.0},
    aten.conv1d.default: {"bias": 0.0},
    aten.conv2d.default: {"bias": 0.0},
    aten.conv3d.default: {"bias": 0.0},
}
_VIEWS = {
    aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.t.default,
    aten.permute.default, aten.transpose.int, aten.to.dtype,
}  # fmt: skip


def _neutral_in(reader: fx.Node, operand: fx.Node) -> float | None:
    values = _NEUTRAL.get(reader.target, {})
    if not values:
        return None
    (name, *more) = [name for name, x in arguments(reader).items() if x is operand] or [""]
    return None if more else values.get(name)
