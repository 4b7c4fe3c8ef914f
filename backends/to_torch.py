"""Emit a program as a PyTorch module: the user's call, the user's keys, the rewritten graph.

Weights that no rewrite touched share the user's memory, in parameters of their own; an edited weight is a new one, computed
once in float64, or at every call from the leaves if edits are live (live_weights.py); a buffer that the graph writes is a
copy, so that a run never moves the user's statistics.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tautomer.rewrite._torch import storage_key
from tautomer.rewrite.checkpoints import outlined
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expected import expected
from tautomer.rewrite.interpret import written
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import Weights

from .live_weights import compute_edits
from .rewritten import Body, Rewritten


@dataclass(frozen=True)
class Stored:
    """A tensor of an emitted module: a parameter if it is an ``nn.Parameter``, else a buffer, in the state dict or not."""

    value: Tensor
    persistent: bool


def to_torch(program: Program) -> Rewritten:
    """``program`` as a module that is called, trained, copied, compiled, exported and saved like the user's.

    Returns:
        A ``Rewritten`` in the mode of the capture. Its state dict has the names of the weight
        table; two names of one weight are one parameter.

    Its parameters are its own: ``half()`` and ``requires_grad_()`` leave the user's model alone. The memory of a weight
    that no rewrite touched is shared, so an optimizer step on one model moves the other: ``copy.deepcopy(model)`` first if
    you train both.

    Raises:
        UsageError: a weight or submodule at the root has the name of an attribute of the emitted module.

    Example: ``fast = to_torch(capture(model, args)); fast(*args)``
    """
    graph = as_run(program).graph
    for unread in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
        graph.erase_node(unread)
    tensors = stored(program)
    graph, bodies = outlined(graph, {name.partition(".")[0] for name in (*tensors, *program.regions, *program.training)})
    module = Rewritten(graph, program.signature, expected(program), program.mode)
    root = program.mode == "train" or any(program.training.values())
    furnish(module, tensors, {**program.regions, **bodies}, {"": root, **program.training})
    module._edits = program.weights.edits()
    return module


def as_run(program: Program) -> Program:
    """``program`` as its module runs it, over the weights that the module holds: live edits are calls, views are reshapes."""
    twin = program.copy()
    if twin.weights.live:
        compute_edits(twin.graph, twin.weights)
        twin.weights = Weights(twin.weights.leaves, twin.weights.emitted())
    reshape_views(twin.graph)
    return twin


def reshape_views(graph: fx.Graph) -> None:
    """Spell every view as a reshape, which views where it can: what attention returns depends on the kernel that ran."""
    for view in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        view.target = torch.ops.aten.reshape.default


def furnish(
    module: nn.Module, tensors: Mapping[str, Stored], regions: Mapping[str, fx.GraphModule], training: Mapping[str, bool]
) -> None:
    """Give ``module`` the tensors, the bodies and the training flags that a graph reads, under their dotted paths.

    ``training[""]`` is the flag of the root and of every module without its own.
    """
    nn.Module.train(module, training[""])
    for name, stored in tensors.items():
        owner, last = _owner(module, name)
        try:
            if isinstance(stored.value, nn.Parameter):
                owner.register_parameter(last, stored.value)
            else:
                owner.register_buffer(last, stored.value, persistent=stored.persistent)
        except KeyError:
            raise _taken("weight", name) from None
    for name, region in regions.items():
        owner, last = _owner(module, name)
        owner.add_module(last, body(region))
    for path, flag in training.items():
        _owner(module, path + ".training" if path else "training")[0].training = flag


def body(region: fx.GraphModule) -> Body:
    """The body of a higher-order op as a module that can be copied and pickled."""
    inner = {name: body(child) for name, child in region.named_children() if isinstance(child, fx.GraphModule)}
    graph = fx.Graph()
    graph.output(graph.graph_copy(region.graph, {}))
    return Body(inner, graph)


def stored(program: Program) -> dict[str, Stored]:
    """The tensors of the weight table: shared with the user where untouched and never written, new otherwise."""
    weights = program.weights
    moving = {alias for node in written(program.graph) if node.op == "get_attr" for alias in weights.aliases(str(node.target))}
    made: dict[Hashable, Tensor] = {}
    tensors = {}
    for name, weight in weights.emitted().items():
        leaf = None if weight.edited else weights.leaves[name]
        identity: Hashable = weight.expression
        if leaf is not None:
            identity = storage_key(leaf), leaf.storage_offset(), leaf.shape, leaf.stride()
        if identity not in made:
            value = weights.value(name) if leaf is None else leaf
            value = value.detach().clone() if name in moving else value
            if weight.kind == "parameter":
                trains = value.requires_grad if isinstance(value, nn.Parameter) else weight.requires_grad
                value = nn.Parameter(value.detach(), requires_grad=trains)
            made[identity] = value
        tensors[name] = Stored(made[identity], weight.persistent)
    return tensors


def _taken(kind: str, name: str) -> UsageError:
    return UsageError(
        f"the model has a {kind} named '{name}', a name that the emitted module needs itself",
        hint="rename it, or wrap the model in another module",
    )


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a dotted name, made if it does not exist, and the last part of the name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            child = nn.Module()
            child.training = root.training
            try:
                root.add_module(part, child)
            except KeyError:
                raise _taken("submodule", part) from None
        root = root.get_submodule(part)
    return root, last
