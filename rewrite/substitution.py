"""Let new nodes stand for old ones: whoever reads them can still run, and nothing else notices.

compare → stand_in → erase_dead        nothing has changed until the second step
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from ._torch import erased
from .errors import require
from .interpret import writes
from .metadata import Metadata, difference, refresh
from .ops import OPS, is_pure, normal
from .program import target_name


def compare(old: Iterable[fx.Node], new: Iterable[fx.Node], metadata: Metadata,
            readers: Iterable[fx.Node] | None = None) -> dict[fx.Node, Any]:  # fmt: skip
    """New metadata by node, where ``readers`` of ``old`` (by default all) will read ``new``; empty if nothing changes.

    Raises:
        Refused: a result has another shape, dtype or device, or a reader downstream cannot run on the new strides.
    """
    changed: dict[fx.Node, Any] = {}
    for before, after in zip(old, new, strict=True):
        was, becomes = before.meta.get("val"), after.meta.get("val")
        if not metadata.agree(was, becomes):
            change = difference(was, becomes)
            require(change is None, f"the result would change: {change}")
            changed[before] = becomes
    if not changed:
        return changed
    return follow(changed, [user for node in changed for user in node.users] if readers is None else readers, metadata)


def follow(changed: Mapping[fx.Node, Any], readers: Iterable[fx.Node], metadata: Metadata) -> dict[fx.Node, Any]:
    """``changed``, and the new metadata of ``readers`` and of everything downstream that changes with it.

    Raises:
        Refused: one of them could not run, or would return another shape, dtype or device.
    """
    overlay = dict(changed)
    pending = sorted(set(readers), reverse=True)
    while pending:
        node = pending.pop()
        if node.op != "call_function" or node in overlay:
            continue
        was, becomes = node.meta.get("val"), refresh(node, metadata, overlay)
        if not metadata.agree(was, becomes):
            change = difference(was, becomes)
            require(change is None, f"'{target_name(node)}' downstream would change: {change}")
            overlay[node] = becomes
            pending = sorted({*pending, *node.users}, reverse=True)
    return overlay


# -- dead nodes -----------------------------------------------------------------------------------------------


def dying(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """What nobody needs once ``roots`` are gone."""
    found, stack = set(roots), list(roots)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found and all(user in found for user in operand.users):
                found.add(operand)
                stack.append(operand)
    return found


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Erase those of ``nodes`` that nobody reads, and what nobody reads after that. Inputs and effects stay.

    Others stand for ``nodes`` now, and draw the random numbers that these drew: those that draw go too, and so does a call whose
    result one of them is.
    """
    gone, stack = [], list(nodes)
    calls = [node.args[0] if node.target is operator.getitem else node for node in stack]
    replaced = {
        node for node in (*stack, *calls) if isinstance(node, fx.Node) and node.op == "call_function" and not writes(node)
    }
    while stack:
        node = stack.pop()
        if not node.users and not erased(node) and (removable(node) or node in replaced):
            stack += node.all_input_nodes
            graph.erase_node(node)
            gone.append(node)
    return gone


def removable(node: fx.Node) -> bool:
    """Whether nothing but the readers of ``node`` would notice that it is gone."""
    if node.op == "get_attr":
        return True
    pure = node.op == "call_function" and (is_pure(node.target) or _draws_nothing(node))
    return pure and not node.meta.get("tautomer_mutated")


def _draws_nothing(node: fx.Node) -> bool:
    """Whether ``node`` is an attention without dropout."""
    return node.target is OPS["scaled_dot_product_attention"].target and normal(node)[4] == 0.0
