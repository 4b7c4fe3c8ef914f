"""In-place calls become functional where nothing else sees the memory; where they cannot, their memory is marked.

    y = op_(x, …)   =   y = op(x, …), and who reads x later reads y

holds when x is no input, parameter or buffer, and nothing reads another name of its memory afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ._torch import no_new_guards
from .build import spell
from .errors import Refused
from .interpret import may_alias, roots, writes
from .metadata import Metadata
from .program import Program
from .record import silence
from .shapes import same_shape
from .weights import MUTATED


def functionalize(program: Program) -> None:
    """Make in-place calls functional where that is safe, and mark the memory of those that stay."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    metadata = Metadata(program.fake_mode)
    with silence(), no_new_guards(metadata.mode):
        for node in list(program.graph.nodes):
            _make_functional(node, order, metadata)
    mark_writes(program)


def mark_writes(program: Program) -> None:
    """Mark every node that shares memory with a remaining in-place write, and the writing call itself."""
    for node in program.graph.nodes:
        node.meta.pop(MUTATED, None)
    for node in program.graph.nodes:
        for operand in writes(node):
            node.meta[MUTATED] = True
            for alias in _aliases(operand, program):
                alias.meta[MUTATED] = True


def _make_functional(node: fx.Node, order: dict[fx.Node, int], metadata: Metadata) -> None:
    functional = _functional_form(node.target)
    if functional is None or not node.args or not isinstance(node.args[0], fx.Node):
        return
    written, when = node.args[0], order[node]
    if _computed_outside(written):
        return
    # Names of the memory from before the call: whoever reads one of them afterwards must see the write.
    older = {alias for alias in _family(written) if order[alias] < when and alias is not written}
    if any(order[reader] > when for alias in older for reader in alias.users):
        return
    try:
        result = metadata.call(functional, node.args, dict(node.kwargs))
    except Refused:
        return
    if not _same_type(result, node.meta.get("val")):
        return
    node.target = functional
    spell(node)
    for reader in list(written.users):
        if order[reader] > when:
            reader.replace_input_with(written, node)


def _functional_form(target: Any) -> torch._ops.OpOverload | None:
    """``aten.add`` for ``aten.add_``, if there is such an operator with the same arguments."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    form = getattr(packet, target._overloadname, None)
    if not isinstance(form, torch._ops.OpOverload) or form._schema.is_mutable:
        return None
    mine, other = ([(a.name, a.kwarg_only) for a in schema.arguments] for schema in (target._schema, form._schema))
    return form if mine == other else None


def _computed_outside(node: fx.Node) -> bool:
    """Whether the memory may belong to an input, a weight, or a call that hides what it returns."""
    for root in roots(node):
        if root.op != "call_function" or not isinstance(root.target, torch._ops.OpOverload):
            if root.op == "call_function" and getattr(root.target, "__name__", "") == "getitem":
                continue
            return True
    return False


def _family(node: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with ``node``."""
    family = roots(node)
    stack = list(family)
    while stack:
        for reader in stack.pop().users:
            if reader not in family and any(operand in family for operand in may_alias(reader)):
                family.add(reader)
                stack.append(reader)
    return family


def _aliases(node: fx.Node, program: Program) -> set[fx.Node]:
    """The family of ``node`` through every name of the weights in it."""
    found = _family(node)
    for weight in [member for member in found if member.op == "get_attr" and member.target in program.weights]:
        names = set(program.weights.aliases(str(weight.target)))
        for other in program.graph.find_nodes(op="get_attr"):
            if other.target in names and other not in found:
                found |= _family(other)
    return found


def _same_type(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and same_shape(a.shape, b.shape)
