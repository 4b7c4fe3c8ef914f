"""The calls of leaf modules in a program: what one module computes from one tensor, with its own code and weights.

    … → [ hidden → code of h.0.ln_1 → normed ] → …        one tensor in, one tensor out

A module without submodules that maps one tensor to one tensor is the unit of a rewrite in place: its code can be exchanged
and nothing around it notices. Every other node is fixed, with the sentence that says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tautomer.rewrite.build import spell
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.interpret import writes
from tautomer.rewrite.pass_base import FIXED
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.record import eager

aten = torch.ops.aten
Seen = Mapping[nn.Module, Sequence[tuple[Any, Any]]]


def watch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """What every leaf module is given and returns in one eager run: rank and dtype, None for anything but one tensor."""
    seen: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = [*args, *kwargs.values()]
        seen.setdefault(module, []).append((_look(given[0]) if len(given) == 1 else None, _look(result)))

    leaves = [module for module in model.modules() if is_leaf(module)]
    handles = [module.register_forward_hook(hook, prepend=True, with_kwargs=True) for module in leaves]
    try:
        eager(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _look(x: Any) -> Any:
    return (x.dim(), x.dtype) if isinstance(x, Tensor) else None


def call_of(node: fx.Node) -> str:
    """Which call of which module made ``node``; empty outside of all modules. A second call of a module has a key of its own."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack)[-1]) if stack else ""


class Calls:
    """The calls of modules in a program.

    Attributes:
        nodes: what each call computes at run time, in order, by its key.
        constants: the nodes that read weights alone; they belong to whoever reads them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: dict[str, list[fx.Node]] = {}
        self.constants: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if program.expression(node) is not None:
                self.constants.add(node)
            else:
                self.nodes.setdefault(call_of(node), []).append(node)

    def at_run_time(self, node: fx.Node) -> bool:
        return node.op != "get_attr" and node not in self.constants

    def inputs(self, call: str) -> list[fx.Node]:
        """The values from outside that a call reads."""
        inside = set(self.nodes.get(call, ()))
        read = (x for node in self.nodes.get(call, ()) for x in node.all_input_nodes if x not in inside)
        return list(dict.fromkeys(filter(self.at_run_time, read)))

    def outputs(self, call: str) -> list[fx.Node]:
        """The values of a call that the outside reads."""
        inside = set(self.nodes.get(call, ()))
        return [node for node in self.nodes.get(call, ()) if not inside.issuperset(node.users)]


def settle_edges(program: Program, model: nn.Module, seen: Seen) -> None:
    """Give a reshape at the edge of a leaf's call to the code around it, where that is what the leaf was given or returned.

    The graph keeps one of two reshapes in a row: that of the heads in attention or the one that a Conv1D begins with.
    """
    calls = Calls(program)
    for call, nodes in calls.nodes.items():
        looks = set(seen.get(model.get_submodule(path_of(nodes[0])), ()))
        if len(looks) != 1 or len(nodes) == 1:
            continue
        ((given, returned),) = looks
        first, outputs = nodes[0], calls.outputs(call)
        own = set(filter(calls.at_run_time, first.all_input_nodes))
        alone = first not in outputs and set(calls.inputs(call)) == own
        if first.target in _RESHAPES and _look(first.meta["val"]) == given and alone:
            _hand_over(first)
        if len(outputs) == 1 and outputs[0].target in _RESHAPES and _look(outputs[0].meta["val"]) != returned:
            before = outputs[0].args[0]
            if before in nodes and _look(before.meta["val"]) == returned:  # type: ignore[union-attr]
                _hand_over(outputs[0])


_RESHAPES = (aten.reshape.default, aten.view.default)


def _hand_over(node: fx.Node) -> None:
    """Let the module around run ``node``."""
    node.meta["nn_module_stack"] = dict(list(node.meta["nn_module_stack"].items())[:-1])


def exchangeable(program: Program, model: nn.Module, seen: Seen) -> dict[str, nn.Module]:
    """The calls whose code can be exchanged, with their modules; every other node of ``program`` is marked as fixed."""
    calls, found, reasons = leaf_calls(program, model, seen)
    for call, reason in reasons.items():
        for node in calls.nodes[call]:
            if not _takes_a_neutral_weight(node, calls):
                node.meta[FIXED] = reason
    return found


def leaf_calls(program: Program, model: nn.Module, seen: Seen) -> tuple[Calls, dict[str, nn.Module], dict[str, str]]:
    """The calls of ``program``; those that map one tensor to one tensor by a leaf's own code; why the others do not."""
    settle_edges(program, model, seen)
    calls, found, reasons = Calls(program), dict[str, nn.Module](), dict[str, str]()
    for call, nodes in calls.nodes.items():
        path = path_of(nodes[0])
        module = model.get_submodule(path)
        try:
            _require_own_code(module, path)
            _require_one_tensor(calls, call, module, path, seen)
        except Refused as refusal:
            reasons[call] = str(refusal)
        else:
            found[call] = module
    return calls, found, reasons


def _require_own_code(module: nn.Module, path: str) -> None:
    kind = type(module).__name__
    require(is_leaf(module), f"it stands in the forward of {kind}, which runs other modules")
    require("forward" not in vars(module), f"the forward of '{path}' is replaced on the instance, which its class cannot change")
    require(not isinstance(module, torch.jit.ScriptModule), f"'{path}' is a compiled TorchScript module")
    parameters = inspect.signature(type(module).forward).parameters.values()
    alone = [p.kind for p in parameters][1:] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]
    require(alone, f"the forward of {kind} takes more than one tensor")


def _require_one_tensor(calls: Calls, call: str, module: nn.Module, path: str, seen: Seen) -> None:
    kind, inputs, outputs = type(module).__name__, calls.inputs(call), calls.outputs(call)
    require(len(inputs) == 1 and len(outputs) == 1, f"{kind} at '{path}' does not map one tensor to one tensor")
    require(not any(map(writes, calls.nodes[call])), f"{kind} at '{path}' writes memory")
    boundary = (_look(inputs[0].meta.get("val")), _look(outputs[0].meta.get("val")))
    at_the_edge = f"what enters or leaves {kind} at '{path}' is reshaped next to it, and the graph keeps one of the two"
    require(all(call == boundary for call in seen.get(module, ())), at_the_edge)


def _takes_a_neutral_weight(node: fx.Node, calls: Calls) -> bool:
    """Whether ``node`` is a sum or a product with a weight: it can stay in the code, with 0 or 1 for the weight."""
    return node.target in (aten.add.Tensor, aten.mul.Tensor) and not all(map(calls.at_run_time, node.all_input_nodes))


def code_of(
    calls: Calls, call: str, output: fx.Node, module: nn.Module, read: Callable[[fx.Graph, str], fx.Node] = fx.Graph.get_attr
) -> fx.Graph:
    """What a call computes, as a graph from the argument of the module's forward; ``read`` makes the node that reads a weight.

    Equal code gives equal graphs, names included.
    """
    inside = set(calls.nodes.get(call, ()))
    graph = fx.Graph()
    argument = graph.placeholder(list(inspect.signature(type(module).forward).parameters)[1])
    mapped = dict.fromkeys(calls.inputs(call), argument)
    for node in _in_order(output, lambda x: x in inside or not calls.at_run_time(x)):
        if node.op == "get_attr":
            mapped[node] = read(graph, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapped.__getitem__)
            mapped[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            spell(mapped[node])
    graph.output(mapped[output] if output in inside else argument)
    return graph


def _in_order(output: fx.Node, inside: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """What ``output`` is computed from, operands first: an order that the graph around it does not decide."""
    seen, stack = set[fx.Node](), [(output, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen and inside(node):
            seen.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(node.all_input_nodes))


def own_name(name: str, module: nn.Module, leaves: Mapping[str, Tensor]) -> str:
    """The attribute of ``module`` that holds the weight ``name``; ``leaves`` are the model's tensors by name.

    Raises:
        Refused: it holds no such weight.
    """
    if name.rpartition(".")[2] == "training" and name not in leaves:
        return "training"
    require(name in leaves, f"it needs a new weight '{name}', and the keys of the model stay")
    held = {**vars(module), **module._buffers, **module._parameters}
    own = next((attribute for attribute, tensor in held.items() if tensor is leaves[name]), None)
    require(own is not None, f"it reads '{name}', which {type(module).__name__} does not hold")
    return str(own)
