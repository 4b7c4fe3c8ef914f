"""One program for both modes: the train export and the eval export, compared call by call.

    dropout(x, p, True)  |  dropout(x, p, False)   =  dropout(x, p, m.training)
    sdpa(…, dropout_p=p) |  sdpa(…, dropout_p=0)   =  sdpa(…, dropout_p=p · m.training)
    n.add_(1)            |  nothing                =  n.add_(m.training)

where m is the module that made the call. Everything else must be equal, or the two are not one program. A layout is
no difference: attention gives other strides in training, so ``contiguous`` stands where either mode needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .errors import Refused, require
from .program import Program, arguments, path_of, place, target_name

aten = torch.ops.aten


def merge(train: Program, evaluated: Program, training: dict[str, bool]) -> Program:
    """``train``, reading a ``<module>.training`` flag wherever ``evaluated`` differs from it.

    Args:
        train: the raw capture with every module in training mode; it is changed.
        evaluated: the raw capture with every module in eval mode.
        training: the current flag of every module, by path.

    Raises:
        Refused: with the sentence that says where the two differ in more than a flag.
    """
    merging = _Merge(train, training)
    others = _steps(evaluated.graph)
    other = next(others, None)
    for node in list(_steps(train.graph)):
        while other is not None and _is_layout(other) and not _alike(node, other):
            merging.add_layout(other)
            other = next(others, None)
        if other is not None and _alike(node, other):
            merging.pair(node, other, evaluated)
            other = next(others, None)
        else:
            merging.only_in_training(node)
    if other is not None:
        raise Refused(f"eval mode computes {target_name(other)} at {place(other)}, which train mode does not")
    train.mode = "both"
    return train


def _steps(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op != "get_attr")


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return node.op == other.op and (node.op in ("placeholder", "output") or node.target == other.target)


def _is_layout(node: fx.Node) -> bool:
    return node.target is aten.contiguous.default and len(node.args) == 1


def _through_layout(node: fx.Node) -> fx.Node:
    while _is_layout(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


class _Merge:
    def __init__(self, program: Program, training: dict[str, bool]) -> None:
        self.program = program
        self.current = training
        self.pairs: dict[fx.Node, fx.Node] = {}
        self.flags: dict[tuple[str, bool, float], fx.Node] = {}

    def pair(self, node: fx.Node, other: fx.Node, evaluated: Program) -> None:
        """``other`` of eval mode is ``node`` of train mode, up to flags, which are put in."""
        self.pairs[other] = node
        if not isinstance(node.target, torch._ops.OpOverload):
            require(self._equal_tree(_operands(node), _operands(other), evaluated), _difference(node))
            return
        mine, theirs = arguments(node), arguments(other)
        for name, value in mine.items():
            if self._equal_tree(value, theirs[name], evaluated):
                continue
            flag = self._flag_for(node, value, theirs[name])
            require(flag is not None, _difference(node))
            _set(node, name, flag)

    def add_layout(self, other: fx.Node) -> None:
        """Put in a ``contiguous`` that only eval mode needs."""
        assert isinstance(other.args[0], fx.Node)
        source = self.pairs.get(_through_layout(other))
        if source is None:
            return
        with self.program.graph.inserting_after(source):
            node = self.program.graph.call_function(aten.contiguous.default, (source,))
        node.meta = dict(source.meta)
        source.replace_all_uses_with(node, delete_user_cb=lambda reader: reader is not node)

    def only_in_training(self, node: fx.Node) -> None:
        """Besides layouts and sizes, a counter of batches is the one thing that only train mode may do."""
        if _is_layout(node) or node.target is aten.sym_size.int:
            return
        counts = node.target is aten.add_.Tensor and node.args[1] == 1 and not node.users
        counter = node.args[0] if counts else None
        known = isinstance(counter, fx.Node) and counter.op == "get_attr" and counter.target in self.program.weights
        require(known, f"train mode computes {target_name(node)} at {place(node)}, which eval mode does not")
        node.args = (counter, self._flag(path_of(node)))

    def _flag_for(self, node: fx.Node, value: Any, other: Any) -> fx.Node | None:
        if isinstance(value, bool) and isinstance(other, bool):
            return self._flag(path_of(node), negated=other)
        if isinstance(value, float) and isinstance(other, (int, float)) and other == 0:
            return self._flag(path_of(node), times=value)
        return None

    def _flag(self, path: str, *, negated: bool = False, times: float = 1.0) -> fx.Node:
        """The node that reads ``<path>.training``, or its negation, or ``times`` it."""
        require(path in self.current, f"a call in '{path}' depends on the mode, but that is no module of the model")
        key = (path, negated, times)
        if key not in self.flags:
            self.program.training[path] = self.current[path]
            self.flags[key] = self._new_flag(path, negated, times)
        return self.flags[key]

    def _new_flag(self, path: str, negated: bool, times: float) -> fx.Node:
        graph = self.program.graph
        if not negated and times == 1.0:
            first = next(iter(graph.nodes))
            with graph.inserting_before(first):
                name = f"{path}.training".removeprefix(".")
                flag = graph.create_node("get_attr", name, name=name.replace(".", "_"))
            flag.meta["val"] = True
            return flag
        plain = self._flag(path)
        with graph.inserting_after(plain):
            call = graph.call_function(operator.not_, (plain,)) if negated else graph.call_function(operator.mul, (times, plain))
        call.meta["val"] = False if negated else times
        return call

    def _equal_tree(self, a: Any, b: Any, evaluated: Program) -> bool:
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(self._equal_tree(x, y, evaluated) for x, y in zip(a, b, strict=True))
        return self._equal(a, b, evaluated)

    def _equal(self, a: Any, b: Any, evaluated: Program) -> bool:
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return type(a) is type(b) and bool(a == b)
        if b.op != "get_attr":
            return self.pairs.get(_through_layout(b)) is _through_layout(a)
        return a.op == "get_attr" and self._equal_attribute(str(a.target), str(b.target), evaluated)

    def _equal_attribute(self, a: str, b: str, evaluated: Program) -> bool:
        if a in self.program.regions and b in evaluated.regions:
            return str(self.program.regions[a].graph) == str(evaluated.regions[b].graph)
        if a not in self.program.weights or b not in evaluated.weights:
            return False
        if self.program.weights[a].kind != "constant":
            return a == b
        x, y = self.program.weights.leaves[a], evaluated.weights.leaves.get(b)
        return isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)


def _set(node: fx.Node, name: str, value: fx.Node | None) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name != name:
            continue
        if index < len(node.args):
            node.update_arg(index, value)
        elif argument.kwarg_only:
            node.update_kwarg(name, value)
        else:
            filled = list(arguments(node).values())
            node.args = (*filled[:index], value)


def _operands(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def _difference(node: fx.Node) -> str:
    return f"{target_name(node)} at {place(node)} differs between train and eval mode in more than a flag"
