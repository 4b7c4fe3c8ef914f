"""A call of a module as the statements of its ``forward``: what is read once is written where it is read.

    h = norm(x); a = attention(h); y = x + a      =      y = x + attention(norm(x))

Random draws and writes keep their order. Calls of numbered modules in a row become a loop.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite.errors import ExportError
from tautomer.rewrite.program import arguments
from tautomer.rewrite.shapes import key, static

from .loops import after, rolled
from .nesting import Call, Graph
from .ops import SEMANTIC_NAMES, express
from .pieces import ATOM, Code, code, literal, tuple_of, var, within
from .statements import Function, Index, Statement, attribute
from .torch_layers import tied

MOST = 5
"""How many operations a statement has at most, unless it is one call."""

LONGEST = 70
"""How many characters are written inside one call, about."""

aten = torch.ops.aten


class Functions:
    """The functions of all calls of a program."""

    def __init__(self, graph: Graph, root: Call, tensors: Mapping[str, Tensor], lists: Mapping[str, int]) -> None:
        self.graph, self.root, self.tensors, self.lists = graph, root, tensors, lists
        self.home = {node: call for call in root.calls() for node in call.items if isinstance(node, fx.Node)}
        self.inside = {call: set(call.nodes()) for call in root.calls()}
        self.made: dict[Call, Function] = {}
        for call in root.calls():
            self.made[call] = _Writer(self, call).function()

    def attribute(self, call: Call, name: str) -> Code | None:
        """A weight or flag as an attribute, if it is below the module of ``call``."""
        names = tied(self.tensors, name) if name in self.tensors else [name]
        prefix = f"{call.path}." if call.path else ""
        for other in sorted(names, key=lambda x: (x != name, x)):
            if other.startswith(prefix):
                return attribute(other.removeprefix(prefix))
        return None


class _Writer:
    def __init__(self, functions: Functions, call: Call) -> None:
        self.all, self.graph, self.call = functions, functions.graph, call
        self.items = call.items
        self.inside = functions.inside[call]
        self.outputs = self._outputs()
        self.inputs = list[fx.Node]()
        self.axes: dict[Hashable, tuple[fx.Node, int]] = {}
        self._find_inputs()

    # -- what it takes and gives ------------------------------------------------------------------------------

    def _outputs(self) -> list[fx.Node]:
        if self.call is self.all.root:
            return []
        return [
            node
            for node in self._given()
            if any(user not in self.inside and user not in self.graph.silent for user in self._readers(node))
        ]

    def _given(self) -> Iterator[fx.Node]:
        for item in self.items:
            yield from self.all.made[item].outputs if isinstance(item, Call) else [item]

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if user in self.graph.sizes:
                if user.target is not aten.sym_size.int:
                    yield from self._readers(user)
            else:
                yield user

    def _find_inputs(self) -> None:
        found = dict[fx.Node, None]()
        if self.call is self.all.root:
            found.update(dict.fromkeys(self.graph.program.placeholders))
        sizes = dict[fx.Node, None]()
        for item in self.items:
            for x in self._reads(item):
                if x in self.graph.sizes:
                    sizes[x] = None
                elif x not in self.inside and not self._own(x):
                    found[x] = None
        self.inputs = list(found)
        for x in self.inputs:
            value = x.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if static(size) is None:
                    self.axes.setdefault(key(size), (x, axis))
        for node in sizes:
            self.inputs.extend(x for x in self._unknown(node) if x not in self.inputs)

    def _own(self, x: fx.Node) -> bool:
        return x.op == "get_attr" and self.all.attribute(self.call, str(x.target)) is not None

    def _reads(self, item: fx.Node | Call) -> list[fx.Node]:
        """The values an item reads, in order, as often as it reads them."""
        if isinstance(item, Call):
            return self.all.made[item].inputs
        if item in self.graph.layers:
            return [self.graph.layers[item].operand]
        found = list[fx.Node]()
        fx.node.map_arg((item.args, item.kwargs), found.append)
        return found

    def _unknown(self, size: fx.Node) -> Iterator[fx.Node]:
        """The parts of a size that must be given as arguments."""
        value = size.meta.get("val")
        if isinstance(value, torch.SymInt) and (static(value) is not None or key(value) in self.axes):
            return
        if size in self.inputs or size.op == "get_attr":
            if size.op == "get_attr" and not self._own(size):
                yield size
            return
        if size.target is aten.sym_size.int:
            if size.all_input_nodes[0] not in self.inside and size.all_input_nodes[0] not in self.inputs:
                yield size
            return
        for x in size.all_input_nodes:
            yield from self._unknown(x)

    # -- text -------------------------------------------------------------------------------------------------

    def __call__(self, x: Any, role: str = "value") -> Code:
        if isinstance(x, (list, tuple)):
            return tuple_of([self(y, role) for y in x])
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise ExportError(f"a size of {self.graph.program.name} is no value of its graph")
        if not isinstance(x, fx.Node):
            try:
                return literal(x, role)
            except TypeError as error:
                raise ExportError(f"{self.graph.program.name} holds {error}, which has no Python text") from None
        if x in self.pending:
            return self.pending[x]
        if x in self.inputs or x in self.inside:
            return var(x)
        if x.op == "get_attr":
            found = self.all.attribute(self.call, str(x.target))
            assert found is not None, x
            return found
        return self._size(x)

    def device(self, node: fx.Node) -> Code:
        value = node.meta.get("val")
        for x in self.inputs:
            if isinstance(x.meta.get("val"), Tensor) and (value is None or x.meta["val"].device == value.device):
                return code(var(x), ".device", cost=0)
        given = torch.device(arguments(node)["device"])
        prefix = f"{self.call.path}." if self.call.path else ""
        for name, tensor in self.all.tensors.items():
            if name.startswith(prefix) and tensor.device == given:
                return code(attribute(name.removeprefix(prefix)), ".device", cost=0)
        return literal(given, "device")

    def _size(self, node: fx.Node) -> Code:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            fixed = static(value)
            if fixed is not None:
                return literal(fixed, "size")
            if key(value) in self.axes:
                self.sizes.setdefault(key(value), None)
                return var(("size", key(value)))
        if node.target is aten.sym_size.int:
            return code(within(self(node.args[0]), ATOM), f".shape[{node.args[1]}]", cost=0)
        return express(node, self)

    def function(self) -> Function:
        self.sizes: dict[Hashable, None] = {}
        self.pending: dict[fx.Node, Code] = {}
        self.where: dict[fx.Node, int] = {}
        self.statements: dict[int, Statement] = {}
        self.last_effect: dict[fx.Node, int] = {}
        reads = Counter[fx.Node]()
        for item in self.items:
            reads.update(self._reads(item))
            for x in self._shapes(item):
                reads[x] += 2
        reads.update(self.outputs * 2)
        if self.call is self.all.root:
            reads.update(self.graph.program.output.all_input_nodes * 2)
        self.reads = reads
        self.effects = [i for i, item in enumerate(self.items) if self._effect(item)]
        self.hot = [self._hot(item) for item in self.items]
        self.within: dict[fx.Node, set[int]] = {}
        for position, item in enumerate(self.items):
            self._write(position, item)
        body = [self.statements[i] for i in sorted(self.statements)]
        self.pending.clear()
        function = Function(self.inputs, self.outputs, list(rolled(body, set(self._later()), self.all.lists, self.call.path)))
        if self.call is not self.all.root:
            function.result = self._result(function)
        replaced = after(function.body)
        function.kept = [replaced.get(x, x) for x in self._later()]
        if self.sizes:
            function.body[:0] = self._size_statements()
        return function

    def _later(self) -> list[fx.Node]:
        outputs = self.graph.program.output.all_input_nodes if self.call is self.all.root else self.outputs
        return list(dict.fromkeys(outputs))

    def _result(self, function: Function) -> Code | None:
        """What is returned: the last statement's value itself, if it is that alone."""
        if not self.outputs:
            return None
        last = function.body[-1] if function.body else None
        if isinstance(last, Statement) and last.targets == tuple(self.outputs) and not last.spread and len(self.outputs) == 1:
            function.body.pop()
            return last.value
        replaced = after(function.body)
        return code(*[x for y in self.outputs for x in (", ", code(var(replaced.get(y, y)), cost=0))][1:], cost=0)

    def _shapes(self, item: fx.Node | Call) -> Iterator[fx.Node]:
        """The values whose sizes an item asks for by name."""
        stack = [x for x in self._reads(item) if x in self.graph.sizes]
        while stack:
            x = stack.pop()
            value = x.meta.get("val")
            if x in self.inputs or (isinstance(value, torch.SymInt) and key(value) in self.axes):
                continue
            if x.target is aten.sym_size.int:
                yield x.all_input_nodes[0]
            else:
                stack.extend(y for y in x.all_input_nodes if y in self.graph.sizes)

    def _effect(self, item: fx.Node | Call) -> bool:
        nodes = self.all.inside[item] if isinstance(item, Call) else {item}
        silent = {x for node in nodes if node in self.graph.layers for x in self.graph.layers[node].silent}
        return bool((nodes | silent) & (self.graph.effects | self.graph.ordered))

    def _write(self, position: int, item: fx.Node | Call) -> None:
        if isinstance(item, fx.Node) and item.target is operator.getitem and item.args[0] in self.where and self._spread(item):
            return
        index = self._index(item)
        inlined = self._inlined(position, item, index)
        outer, self.pending = self.pending, {x: self.pending[x] for x in inlined}
        value = self._text(item)
        self.pending = outer
        effect = max([self.last_effect[x] for x in inlined if x in self.last_effect], default=-1)
        for x in inlined:
            del self.statements[self.where[x]], self.pending[x]
        targets = tuple(self.all.made[item].outputs) if isinstance(item, Call) else (item,)
        used = tuple(x if self.reads[x] or self._members(x) else None for x in targets)
        if not any(x is not None for x in used):
            used = ()
        self.statements[position] = Statement(used, value, index, spread=len(targets) > 1)
        effect = position if self._effect(item) else effect
        members = {position, *(i for x in inlined for i in self.within[x])}
        for x in targets:
            self.where[x], self.within[x] = position, members
            if effect >= 0:
                self.last_effect[x] = effect
        if len(targets) == 1 and self.reads[targets[0]] == 1 and not _named(item):
            self.pending[targets[0]] = value

    def _members(self, x: fx.Node) -> bool:
        return any(user.target is operator.getitem for user in x.users)

    def _text(self, item: fx.Node | Call) -> Code:
        prefix = f"{self.call.path}." if self.call.path else ""
        if isinstance(item, Call):
            owner = attribute(item.path.removeprefix(prefix))
            return code(owner, "(", *[x for y in self.all.made[item].inputs for x in (", ", self(y))][1:], ")")
        if item in self.graph.layers:
            layer = self.graph.layers[item]
            return code(attribute(layer.path.removeprefix(prefix)), "(", self(layer.operand), ")")
        return express(item, self)

    def _spread(self, item: fx.Node) -> bool:
        """A member of a tuple is a target of the statement that makes the tuple, if all readers read members."""
        source = item.args[0]
        assert isinstance(source, fx.Node)
        statement = self.statements.get(self.where[source])
        members = {user.args[1]: user for user in source.users if user.target is operator.getitem}
        value = source.meta.get("val")
        count = len(value) if isinstance(value, (list, tuple)) else None
        one = len(members) == 1 and count is not None and count > 1
        if statement is None or count is None or len(members) != len(source.users) or one or source not in self.home_items():
            return False
        if not statement.spread:
            used = [members.get(i) for i in range(count)]
            statement.targets = tuple(x if x is not None and self.reads[x] else None for x in used)
            statement.spread = True
            self.pending.pop(source, None)
            for x in members.values():
                self.where[x] = self.where[source]
        return True

    def home_items(self) -> set[fx.Node]:
        return {item for item in self.items if isinstance(item, fx.Node)}

    def _inlined(self, position: int, item: fx.Node | Call, index: Index | None) -> list[fx.Node]:
        """The operands of an item that are written inside it."""
        found, room, length = list[fx.Node](), MOST - 1, 0
        names = isinstance(item, fx.Node) and _wants_names(item)
        for x in self._reads(item):
            piece = self.pending.get(x)
            if piece is None or self.statements[self.where[x]].index != index:
                continue
            effect = self.last_effect.get(x)
            blocked = effect is not None and any(effect < i < position for i in self.effects)
            moved = x in self.graph.ordered and x not in self.graph.effects and not isinstance(self.items[self.where[x]], Call)
            if names:
                room = 0 if _op(item) == "scaled_dot_product_attention" else 1
            length += sum(len(part) if isinstance(part, str) else 5 for part in piece.parts)
            if not blocked and not moved and piece.cost <= room and length <= LONGEST:
                found.append(x)
                room -= piece.cost
        while (crossing := self._crossing(found, position)) is not None:
            found.remove(crossing)
        return found

    def _crossing(self, found: list[fx.Node], position: int) -> fx.Node | None:
        """The first operand for which three and more readers of one value would run in another order than the graph's:
        their gradients are added in that order."""
        inside, last = {i for x in found for i in self.within[x]}, dict[fx.Node, int]()
        for x in found:
            reads = [(u, i) for i in sorted(self.within[x]) for u in self.hot[i]]
            for u, i in reads:
                between = (k for k in range(i + 1, position) if k not in inside)
                if last.get(u, -1) > i or any(u in self.hot[k] for k in between):
                    return x
            last.update(reads)
        return None

    def _hot(self, item: fx.Node | Call) -> set[fx.Node]:
        """The values that an item reads and that have three readers and more."""
        reads = self.all.inside[item] if isinstance(item, Call) else {item}
        outside = {x for node in reads for x in node.all_input_nodes if x not in reads}
        return {x for x in outside if len(x.users) > 2}

    def _index(self, item: fx.Node | Call) -> Index | None:
        path = item.path if isinstance(item, Call) else self.graph.layers[item].path if item in self.graph.layers else ""
        prefix = f"{self.call.path}." if self.call.path else ""
        found = re.match(r"(.*?)\.?\b(\d+)(\.|$)", path.removeprefix(prefix)) if path else None
        return (found[1], int(found[2])) if found else None

    def _size_statements(self) -> list[Statement]:
        """``batch, length = x.shape[:2]`` for every input whose sizes are read."""
        wanted: dict[fx.Node, dict[int, Hashable]] = {}
        for size in self.sizes:
            source, axis = self.axes[size]
            wanted.setdefault(source, {})[axis] = ("size", size)
        statements = list[Statement]()
        for source in [x for x in self.inputs if x in wanted]:
            axes = wanted[source]
            rank = source.meta["val"].dim()
            first = max(axes) + 1
            if len(axes) == 1:
                (axis,) = axes
                statements.append(Statement((axes[axis],), code(var(source), f".shape[{axis}]", cost=0)))
                continue
            end = ".shape" if first == rank else f".shape[:{first}]"
            targets = tuple(axes.get(axis) for axis in range(first))
            statements.append(Statement(targets, code(var(source), end, cost=0), spread=True))
        return statements


_NAMED = {"scaled_dot_product_attention", "softmax", "cat", "stack"}


def _named(item: fx.Node | Call) -> bool:
    """Whether the result has a name of its own even if it is read once."""
    if isinstance(item, Call):
        return False
    return _op(item) in _NAMED


def _wants_names(item: fx.Node) -> bool:
    """Whether the operands are easier to read with names."""
    return _op(item) == "scaled_dot_product_attention" or _op(item).partition(".")[0] in SEMANTIC_NAMES


def _op(item: fx.Node | Call) -> str:
    target = None if isinstance(item, Call) else item.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""
