"""What a rewritten block computes, as data: the call it was captured from, and a graph over its own attributes and submodules.

    block(*args, **kwargs)  =  graph(*leaves)          for a call like the captured one
                               its class's forward     for any other

A leaf module that computes from one tensor what it did stays a call of that module: its hooks, an adapter in its place, its
quantisation go on working. The rest is code of the block, which holds as long as the modules it was taken from are what they
were. Equal code gives equal data, so that blocks can share a class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tautomer.rewrite.build import spell
from tautomer.rewrite.errors import ExportError, Refused, UsageError, require
from tautomer.rewrite.interpret import writes
from tautomer.rewrite.ops import is_pure
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.shapes import key
from tautomer.rewrite.weights import leaves

from .block_text import source
from .correspondence import Fault
from .exchange import form_of, text_of
from .graph_data import encode, encode_graph
from .live_weights import computed
from .module_calls import Calls, Seen, code_of, leaf_calls
from .spec_data import Plain, plain

_SIMPLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Code:
    """The new code of a block, as text, or what stands against it."""

    text: str
    faults: tuple[Fault, ...] = ()


class Block:
    """A module with submodules, its program, and which of its calls may stay calls.

    Args:
        called: the paths of the modules below it that its forward calls.
        seen: what its leaf modules are given and return (see ``watch``).
        edits: whether new code may compute an edited matrix, which it does at every call.

    Raises:
        Refused: its forward is not one that code of its own class can stand for.
    """

    def __init__(self, module: nn.Module, program: Program, called: Iterable[str], seen: Seen, edits: bool) -> None:
        self.module, self.program, self.called, self.edits = module, program, tuple(called), edits
        require(not program.regions, "its forward holds a region of its own (autocast, torch.cond)")
        require(not any(map(writes, program.graph.nodes)), "its forward writes memory")
        self.call = _call(program)
        self.old, self.leaves, _ = leaf_calls(program, module, seen)

    def code(self, rewritten: Program) -> Code:
        """The code of the block that computes ``rewritten``, a rewrite of its program."""
        try:
            graph, inlined = _Writer(self, rewritten).graph()
            data = {**self.call, "inlined": inlined, "graph": encode_graph(graph), "mode": rewritten.mode}
            base, _, _ = form_of(self.module) or (type(self.module), None, None)
            source(data, base)
            return Code(json.dumps(data))
        except (UsageError, ExportError, TypeError) as error:
            return Code("", (Fault(f"its code cannot be written: {str(error).splitlines()[0]}", ()),))
        except _Edited as edited:
            return Code("", (Fault(str(edited), (edited.path,)),))
        except Refused as refusal:
            return Code("", (Fault(str(refusal), ()),))


class _Edited(Refused):
    def __init__(self, sentence: str, path: str) -> None:
        super().__init__(sentence)
        self.path = path


class _Writer:
    def __init__(self, block: Block, rewritten: Program) -> None:
        self.block, self.rewritten = block, rewritten
        self.new = Calls(rewritten)
        self.kept = dict(self._kept())
        self.inside = {node: call for call in self.kept for node in self.new.nodes[call]}
        self.made = fx.Graph()
        self.mapped: dict[fx.Node, fx.Node] = {}
        self.known: dict[Any, fx.Node] = {}
        self.reads: dict[str, fx.Node] = {}

    def _kept(self) -> Iterator[tuple[str, tuple[fx.Node, fx.Node]]]:
        """The calls that compute what they did, with what goes in and what comes out."""
        for call, module in self.block.leaves.items():
            inputs, outputs = self.new.inputs(call), self.new.outputs(call)
            if len(inputs) != 1 or len(outputs) != 1:
                continue
            before = code_of(self.block.old, call, self.block.old.outputs(call)[0], module)
            after = code_of(self.new, call, outputs[0], module)
            if text_of(before) == text_of(after) and not any(map(self._edited, after.find_nodes(op="get_attr"))):
                yield call, (inputs[0], outputs[0])

    def _edited(self, read: fx.Node) -> bool:
        weight = self.rewritten.weights.entries.get(str(read.target))
        return weight is not None and weight.edited

    def graph(self) -> tuple[fx.Graph, list[list[str]]]:
        """The code, and the modules that it is the code of, each with the name of its class."""
        for index, node in enumerate(self.rewritten.placeholders):
            self.mapped[node] = self.made.placeholder(f"leaf_{index}")
        for node in self.rewritten.graph.nodes:
            if node.op != "call_function":
                continue
            call = self.inside.get(node)
            if call is None:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.operand)
                self.mapped[node] = self.made.call_function(node.target, args, kwargs)
                spell(self.mapped[node])
            elif node is self.kept[call][1]:
                self.mapped[node] = self.made.call_module(path_of(node), (self.operand(self.kept[call][0]),))
        self.made.output(fx.node.map_arg(tuple(self.rewritten.output.args[0]), self.operand))  # type: ignore[arg-type]
        for node in reversed(list(self.made.nodes)):
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and is_pure(node.target))):
                self.made.erase_node(node)
        stays = {path_of(self.kept[call][1]) for call in self.kept}
        stays -= {path_of(nodes[0]) for call, nodes in self.block.old.nodes.items() if call not in self.kept}
        inlined = [path for path in self.block.called if path and path not in stays]
        return self.made, [[path, name_of(type(self.block.module.get_submodule(path)))] for path in inlined]

    def operand(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in self.mapped:
            self.mapped[node] = self.weight(str(node.target))
        return self.mapped[node]

    def weight(self, name: str) -> fx.Node:
        table = self.rewritten.weights
        weight = table.entries.get(name)
        if weight is None or not weight.edited:
            return self.read(name)
        matrices = [leaf for leaf in leaves(weight.expression) if table.leaves[leaf].ndim > 1]
        if matrices and not self.block.edits:
            sentence = f"'{matrices[0]}' would be edited at every call: a recipe does that to whole models, not inside of a block"
            raise _Edited(sentence, name.rpartition(".")[0])
        return computed(self.made, weight, table, self.read, self.known)

    def read(self, name: str) -> fx.Node:
        if name not in self.reads:
            flag = name.rpartition(".")[2] == "training" and name not in self.rewritten.weights.leaves
            held = flag or _held(self.block.module, name) is self.rewritten.weights.leaves.get(name)
            require(held, f"it reads '{name}', which is no parameter or buffer of the block")
            self.reads[name] = self.made.get_attr(name)
        return self.reads[name]


def _held(module: nn.Module, name: str) -> Tensor | None:
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    return owner._parameters.get(attribute, owner._buffers.get(attribute))


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# -- the call -------------------------------------------------------------------------------------------------


def _call(program: Program) -> dict[str, Any]:
    """How the block is called and what it returns, as data; sizes that are free are named in order, the same in every block."""
    signature, symbols = program.signature, dict[Any, str]()
    given: list[Any] = []
    positional, keywords = plain(signature.in_spec)[2]  # type: ignore[index]
    names = [argument.name for argument in signature.arguments if not argument.keyword_only]
    require(len(positional[2]) <= len(names), "it takes arguments by position that its forward does not name")
    numbers = iter(range(len(signature.leaf_names)))
    for name, tree in [*zip(names, positional[2], strict=False), *zip(keywords[1], keywords[2], strict=True)]:
        given.append([name, _tree(tree, lambda: next(numbers))])
    leaves: list[Any] = []
    for index, node in enumerate(program.placeholders):
        if index in signature.constants:
            leaves.append({"constant": _simple(signature.constants[index], signature.leaf_names[index])})
            continue
        value = node.meta.get("val")
        sizes = [size if isinstance(size := key(s), int) else symbols.setdefault(size, f"s{len(symbols)}") for s in value.shape]  # type: ignore[union-attr]
        leaves.append({"dtype": encode(value.dtype), "shape": sizes} if node.users else {})  # type: ignore[union-attr]
    for x in program.output.args[0]:  # type: ignore[union-attr]
        require(isinstance(x, (fx.Node, *_SIMPLE)), f"it returns a {type(x).__name__}")
    returned = _tree(plain(signature.out_spec), lambda: None)
    return {"given": given, "leaves": leaves, "conditions": list(signature.conditions), "returned": returned}


def _simple(value: Any, name: str) -> Any:
    require(isinstance(value, _SIMPLE), f"{name} is a {type(value).__name__}")
    return encode(value)


def _tree(tree: Plain, leaf: Callable[[], Any]) -> Any:
    if tree is None:
        return leaf()
    kind, context, children = tree
    require(kind in (tuple, list, dict), f"it takes or returns a {getattr(kind, '__name__', kind)}")
    inner = [_tree(child, leaf) for child in children]
    return {"dict": [[str(name), x] for name, x in zip(context, inner, strict=True)]} if kind is dict else {kind.__name__: inner}


def require_plain(tree: Any) -> None:
    """Refuse a tree of the pytree registry that holds more than tuples, lists and dicts."""
    _tree(plain(tree), lambda: None)


def free_sizes(program: Program) -> Mapping[int, set[int]]:
    """The axes of every flat input of ``program`` whose size is free."""
    found: dict[int, set[int]] = {}
    for index, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            found[index] = {axis for axis, size in enumerate(value.shape) if not isinstance(key(size), int)}
    return found
