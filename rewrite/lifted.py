"""A graph whose parameters are inputs, as torch.compile hands it to a backend, becomes a program.

    f(W, b, n, x)  with f of torch functions   =   program(x)  over the weights W and b, of ATen calls

Tensors that are parameters and buffers of a module are entered as weights, so that rewrites see what they see in a captured
model. They are not the graph's to keep: the next call may bring other values, without a new compilation. Every one is
therefore taken for one that trains, so that nothing reads its values, and what is computed from weights is computed at
every call. Sizes that dynamo passes as numbers are read from the tensors they belong to. The trace shares dynamo's
symbols: a branch that it takes on a size is a guard of the compiled code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    Replay,
    pytree,
    set_grad_enabled_region,
    source_of_input,
    traced,
)
from .build import translate
from .canonical import canonicalize
from .errors import Refused, require
from .functional import functionalize
from .program import Program, target_name
from .shapes import key
from .signature import Signature
from .weights import Weights

_PLAIN = (Tensor, nn.Parameter)
_STATE = re.compile(r"\._(modules|parameters|buffers)\['(.*?)'\]")
_ROOT = re.compile(r"^[A-Z]\['\w+'\]\.?")


@dataclass(frozen=True)
class Lifted:
    """A program and where its inputs and weights stand in the graph it comes from.

    Attributes:
        program: over weights of its own table.
        inputs: the position of every placeholder, in order.
        weights: the position of every weight that is an input, by name.
    """

    program: Program
    inputs: tuple[int, ...]
    weights: Mapping[str, int]


def lift(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Lifted:
    """The program of a graph of dynamo's, called with ``inputs``; neither is changed.

    Raises:
        Refused: it holds a call that hides a graph, or an input that is more than a tensor or a number.
    """
    nodes = graph_module.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value") for node in nodes]
    mode = _check(graph_module, fakes, inputs)
    sizes = _sizes(fakes)
    leaves = [index for index in range(len(nodes)) if index not in sizes]

    def run(*given: Any) -> Any:
        values = dict(zip(leaves, given, strict=True))
        values |= {index: values[tensor].shape[axis] for index, (tensor, axis) in sizes.items()}
        return Replay(graph_module).run(*[values[index] for index in range(len(nodes))])

    given = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in map(fakes.__getitem__, leaves)]
    module = traced(run, given, mode)  # not on dynamo's own fakes: what is written in place is written to them
    regions = module.graph.find_nodes(op="call_function", target=set_grad_enabled_region)
    reopened = any(region.args[0] for region in regions) and not torch.is_grad_enabled()
    require(not reopened, "it enables gradients in a part of what runs without")
    weights = {name: index for name, index in _weights(nodes, inputs).items() if index in leaves}
    example = {index: _value(inputs[index]) for index in leaves if index not in weights.values()}
    _read_as_weights(module, {leaves.index(index): name for name, index in weights.items()}, mode)
    names = tuple(_input_name(nodes[index]) for index in example)
    program = translate(module, _table(module, weights, inputs), _user_path, _signature(module, names), list(example.values()))
    functionalize(program)
    return Lifted(canonicalize(program), tuple(example), weights)


def _check(graph_module: fx.GraphModule, fakes: Sequence[Any], inputs: Sequence[Any]) -> FakeTensorMode:
    for node in graph_module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise Refused(f"it calls '{target_name(node)}', which hides a graph")
    for fake, value in zip(fakes, inputs, strict=True):
        sized = isinstance(fake, torch.SymInt) and isinstance(value, torch.SymInt | int)
        known = isinstance(fake, FakeTensor) and not isinstance(value, FakeTensor)
        require(sized or (known and type(value) in _PLAIN), f"it takes a {type(value).__name__} as an input")
        require(sized or _alike(fake, value), "it changes the shape of an input in place, or writes to it what needs a gradient")
    modes = [fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)]
    require(modes, "it takes no tensor")
    return modes[0]


def _alike(fake: Tensor, value: Tensor) -> bool:
    """Whether dynamo's example, on which it ran the graph, is still what the graph begins with."""
    shapes = [tuple(map(_value, x)) for x in (fake.shape, fake.stride())]
    return shapes == [tuple(value.shape), value.stride()] and fake.requires_grad == value.requires_grad


def _value(given: Any) -> Any:
    """A number as it is in this call; asking the symbol would fix it."""
    return given.node.hint if isinstance(given, torch.SymInt) else given


def _sizes(fakes: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """For every input that is the size of another: which tensor, which axis."""
    found: dict[Any, tuple[int, int]] = {}
    for index, fake in enumerate(fakes):
        for axis, size in enumerate(fake.shape) if isinstance(fake, Tensor) else ():
            found.setdefault(key(size), (index, axis))
    numbers = [(index, fake) for index, fake in enumerate(fakes) if not isinstance(fake, Tensor)]
    return {index: found[key(number)] for index, number in numbers if key(number) in found}


# -- weights --------------------------------------------------------------------------------------------------


def _weights(nodes: Sequence[fx.Node], inputs: Sequence[Any]) -> dict[str, int]:
    """Name and position of the parameters and buffers among the inputs, under the paths of their modules."""
    found: dict[str, int] = {}
    for index, (node, value) in enumerate(zip(nodes, inputs, strict=True)):
        path = ".".join(name for _, name in _STATE.findall(source_of_input(node)))
        if isinstance(value, nn.Parameter) or (path and isinstance(value, Tensor)):
            name = path or str(node.target).strip("_")
            found[name if name not in found else f"{name}_{index}"] = index
    return found


def _read_as_weights(module: fx.GraphModule, names: Mapping[int, str], mode: FakeTensorMode) -> None:
    """Let the graph read the inputs at these positions as attributes of these names."""
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if index in names:
            with module.graph.inserting_before(node):
                read = module.graph.create_node("get_attr", names[index])
            read.meta = node.meta
            node.replace_all_uses_with(read)
            module.graph.erase_node(node)
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        if isinstance(value, Tensor):
            node.meta.setdefault("val", mode.from_tensor(value))


def _table(module: fx.GraphModule, positions: Mapping[str, int], inputs: Sequence[Any]) -> Weights:
    given = {name: inputs[index] for name, index in positions.items()}
    parameters = {name: value for name, value in given.items() if isinstance(value, nn.Parameter)}
    buffers = {name: value for name, value in given.items() if name not in parameters}
    reads = {str(node.target) for node in module.graph.find_nodes(op="get_attr")} - set(given)
    constants = {name: value for name in reads if isinstance(value := getattr(module, name), Tensor)}
    weights = Weights.of(parameters, buffers, constants)
    entries = {name: replace(weight, requires_grad=name in given) for name, weight in weights.entries.items()}
    weights = Weights(weights.leaves, entries)
    weights.live = True
    return weights


# -- names ----------------------------------------------------------------------------------------------------


def _user_path(path: str) -> str:
    """``L['self'].layers.0`` is ``layers.0``: what stands before it is the variable the model was in."""
    return _ROOT.sub("", path)


def _input_name(node: fx.Node) -> str:
    return str(node.target).strip("_").removeprefix("L_").removeprefix("l_")


def _signature(module: fx.GraphModule, names: tuple[str, ...]) -> Signature:
    outputs = tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]
    in_spec = pytree.tree_structure((tuple(range(len(names))), {}))
    return Signature("graph", (), len(names), (), in_spec, pytree.tree_structure(tuple(range(len(outputs)))), {}, names)
