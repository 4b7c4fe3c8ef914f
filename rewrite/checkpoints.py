"""Parts of a program that the backward runs again: what they read is kept, and nothing of what they compute.

    y = f(x, W)   →   y = checkpointed(f, x, W)        the same numbers are drawn in the second run, so gradients keep their bits

A part is a mark on its nodes: the program stays one flat graph, which rewrites and checks read as ever. It becomes a call of
``torch.utils.checkpoint`` where the program is emitted as a module. A file that a program is written to (ONNX, .pt2) has the flat
graph: who runs it chooses what to keep.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ._torch import HigherOrderOperator, pytree
from .blocks import Block
from .errors import Refused, require
from .interpret import writes
from .program import CHECKPOINT


def checkpointed(body: Callable[..., Any], *operands: Any) -> Any:
    """``body(*operands)``, run once more by the backward, if there will be one."""
    if not torch.is_grad_enabled():
        return body(*operands)
    return checkpoint(body, *operands, use_reentrant=False)


def running_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module, run once more by the backward, if there will be one and the call has nothing that it may write to:
    a cache."""

    @functools.wraps(forward)
    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: type(x) not in (tuple, list, dict))
        if not torch.is_grad_enabled() or not all(x is None or isinstance(x, _PLAIN) for x in leaves):
            return forward(self, *args, **kwargs)

        def body(*leaves: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(leaves), spec)
            return forward(self, *args, **kwargs)

        return checkpoint(body, *leaves, use_reentrant=False)

    return again


_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device)


def parts(graph: fx.Graph) -> dict[str, Block]:
    """The marked parts by name, in order: those that can be run as one call."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if CHECKPOINT in node.meta:
            found.setdefault(node.meta[CHECKPOINT], []).append(node)
    return {name: Block(name, tuple(nodes)) for name, nodes in found.items() if is_one_call(nodes)}


def is_one_call(nodes: list[fx.Node]) -> bool:
    """Whether nothing that ``nodes`` read is computed from what they return."""
    inside, after, node = set(nodes), set[fx.Node](), nodes[0]
    while node is not nodes[-1]:
        node = node.next
        if any(x in after or (x in inside and node not in inside) for x in node.all_input_nodes):
            if node in inside:
                return False
            after.add(node)
    return True


def mark(block: Block) -> None:
    """Let the backward run ``block`` again, under a name of its own. Sizes that it computes of what it is given stay outside.

    Raises:
        Refused: a second run would not be the first, or it is part of another part.
    """
    for node in inside(block):
        node.meta[CHECKPOINT] = f"{block.path or 'calls'} from {block.nodes[0].name}"


def inside(block: Block) -> list[fx.Node]:
    """The calls that the backward runs again if ``block`` is marked.

    Raises:
        Refused: as of ``mark``.
    """
    require(all(CHECKPOINT not in node.meta for node in block.nodes), "it is checkpointed already")
    require_repeatable(block)
    nodes, outside = set(block.nodes), set[fx.Node]()
    for node in block.nodes:
        if not _is_tensor(node) and all(x in outside or x not in nodes for x in node.all_input_nodes):
            outside.add(node)
    return [node for node in block.nodes if node not in outside]


def given(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """What a part of these calls is given and keeps, whatever comes of it: all that it reads, but for weights."""
    read = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x.op != "get_attr")
    return [x for x in read if x not in nodes]


def require_repeatable(block: Block) -> None:
    """Refuse a part whose second run would not be the first."""
    for node in block.nodes:
        require(not writes(node), f"'{node.name}' writes memory, and a second run would write it twice")
        require(not isinstance(node.target, HigherOrderOperator), f"'{node.name}' runs a region of its own")


def settle(graph: fx.Graph) -> None:
    """Leave the marks that can stay: of parts that can be run again, and as one call."""
    found = parts(graph)
    for block in list(found.values()):
        try:
            require_repeatable(block)
        except Refused:
            del found[block.path]
    for node in graph.nodes:
        if node.meta.get(CHECKPOINT) not in found:
            node.meta.pop(CHECKPOINT, None)


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def outlined(graph: fx.Graph, taken: Collection[str]) -> tuple[fx.Graph, dict[str, fx.GraphModule]]:
    """``graph`` with every part as one call of ``checkpointed``, and the bodies by name; ``taken`` are names that are none."""
    found = parts(graph)
    if not found:
        return graph, {}
    part = {node: block for block in found.values() for node in block.nodes}
    free = (name for i in itertools.count() if (name := f"checkpoint_{i}") not in taken)
    new, mapped, bodies = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.GraphModule]()
    waiting = list[fx.Node]()
    for node in graph.nodes:
        if node in part and node is not part[node].nodes[-1]:
            continue
        waiting.append(node)  # it may stand among the calls of a part and read one of them
        while (ready := next((x for x in waiting if _operands(x, part) <= mapped.keys()), None)) is not None:
            waiting.remove(ready)
            if ready in part:
                name = next(free)
                bodies[name] = _call(new, part[ready], name, mapped)
            else:
                mapped[ready] = new.node_copy(ready, mapped.__getitem__)
                mapped[ready].meta = dict(ready.meta)
    return new, bodies


def _operands(node: fx.Node, part: Mapping[fx.Node, Block]) -> set[fx.Node]:
    return {*part[node].inputs, *part[node].weights} if node in part else set(node.all_input_nodes)


def _call(graph: fx.Graph, block: Block, name: str, mapped: dict[fx.Node, fx.Node]) -> fx.GraphModule:
    """Call ``block`` at the end of ``graph``; returns it as a body."""
    operands, results = (*block.inputs, *block.weights), block.outputs
    body = fx.Graph()
    inside = {x: body.placeholder(x.name) for x in operands}
    for node in block.nodes:
        inside[node] = body.node_copy(node, inside.__getitem__)
    body.output(tuple(inside[x] for x in results))
    held = graph.create_node("get_attr", name)
    call = graph.call_function(checkpointed, (held, *(mapped[x] for x in operands)))
    for index, node in enumerate(results):
        mapped[node] = graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
        mapped[node].meta = {key: value for key, value in node.meta.items() if key != CHECKPOINT}
    return fx.GraphModule({}, body)
