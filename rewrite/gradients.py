"""Compare the gradients of two programs block by block, through the weight map.

    d<r, f(x; W)>/d(x, W)  =  d<r, f'(x; w(W))>/d(x, W)        r random, one block of the model at a time

Gradients compose: if every block's vector-Jacobian products agree, under the relations stated at its borders, the
model's do. A block is what is repeated (blocks.py: a module ``h.3``, a turn of a loop), or what stands between. Its
inputs are the values recorded in the float64 run of the original, and again those scaled down so that eps dominates.
Blocks of one structure are differentiated once; every block's forward was already checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import storage_key
from .blocks import Block, blocks, structure
from .evidence import AMPLIFIED, FLOOR, GRADIENT, by_a_rounding, magnitude, relative_error
from .expressions import digest
from .interpret import Interpretation, written
from .program import Program
from .relations import related
from .weights import Expression, evaluate, leaves

_LARGE = 4_000_000
"""A weight with more entries that no rewrite edited is held constant: its reader is the same node on both sides."""


Leaf = Callable[[str], Tensor]
"""The value of a weight of the user's model, by name."""


def compare_gradients(old: Program, new: Program, values: Mapping[str, Any]) -> tuple[float, int, list[str]]:
    """The worst relative gradient error, how many gradients were compared, and what is to be said of them.

    Args:
        values: the float64 value of every node of ``old``, by name.
    """
    varying = _varying(old)
    pairs = _closed(old, new, _pair_blocks(old, new), varying)
    worst, count, notes = 0.0, 0, list[str]()
    seen: set[object] = set()
    for ours, theirs in pairs:
        signature = (structure(old, ours, _note), structure(new, theirs, _note), _weight_map(old, ours, new, theirs))
        if signature in seen or _same(old, new, ours, theirs):
            continue
        seen.add(signature)
        try:
            error, compared = _compare_block(old, new, ours, theirs, values, varying, notes)
        except _CannotPairError as reason:
            notes.append(f"gradients of block '{ours.path or 'root'}' were not compared: {reason}")
            continue
        worst, count = max(worst, error), count + compared
    return worst, count, notes


def _weight_map(old: Program, ours: Block, new: Program, theirs: Block) -> tuple[str, ...]:
    """What every weight that either block reads is over the leaves, which are named by their order: equal in another layer."""
    numbers: dict[str, str] = {}
    read = [*_expressions(old, ours), *_expressions(new, theirs)]
    return tuple(digest(expression, lambda leaf: numbers.setdefault(leaf, f"leaf {len(numbers)}")) for expression in read)


class _CannotPairError(Exception):
    """A block of the new program reads a value that the old one does not have."""


# -- blocks ----------------------------------------------------------------------------------------------------


def _pair_blocks(old: Program, new: Program) -> list[tuple[Block, Block]]:
    """Cut the new program where the old one is cut: at the nodes that stand for the first nodes of its blocks.

    New nodes come before the node they were built for, so a node without an origin belongs to the next one that has.
    """
    ours = blocks(old)
    home = {node.name: index for index, block in enumerate(ours) for node in block.nodes}
    assigned: list[list[fx.Node]] = [[] for _ in ours]
    waiting: list[fx.Node] = []
    latest = 0
    for node in new.graph.nodes:
        if node.op != "call_function":
            continue
        waiting.append(node)
        index = home.get(node.meta.get("origin", node.name))
        if index is None:
            continue
        if index < latest:  # code moved across a border: there is no cut to compare at
            whole = Block("", tuple(n for block in ours for n in block.nodes))
            return [(whole, Block("", tuple(n for n in new.graph.nodes if n.op == "call_function")))]
        latest = index
        assigned[index].extend(waiting)
        waiting = []
    if ours:
        assigned[latest].extend(waiting)
    return [(block, Block(block.path, tuple(nodes))) for block, nodes in zip(ours, assigned, strict=True)]


Pair = tuple[Block, Block]


def _closed(old: Program, new: Program, pairs: list[Pair], varying: set[str]) -> list[Pair]:
    """Join neighbouring blocks until nothing unpaired crosses a border.

    A shift may have moved into the next block, a value may now be computed in an earlier one.
    """
    closed: list[Pair] = []
    pending: Pair | None = None

    def settle(reach: int) -> bool:
        """Whether ``pending``, joined with up to ``reach`` closed blocks before it, is closed; if so it is entered."""
        nonlocal pending
        candidate = pending
        for taken in range(min(reach, len(closed)) + 1):
            if taken:
                candidate = _join(closed[-taken], candidate)
            assert candidate is not None
            ours, theirs = candidate
            if _crosses_paired(ours, theirs, varying) and _leaves_of(old, ours) == _leaves_of(new, theirs):
                closed[len(closed) - taken :] = [candidate]
                pending = None
                return True
        return False

    for pair in pairs:
        pending = _join(pending, pair)
        settle(reach=2)
    if pending is not None and not settle(reach=len(closed)):
        closed.append(pending)
    return closed


def _join(first: Pair | None, second: Pair | None) -> Pair | None:
    if first is None or second is None:
        return first or second
    ours, theirs = (Block(a.path, a.nodes + b.nodes) for a, b in zip(first, second, strict=True))
    return ours, theirs


def _crosses_paired(ours: Block, theirs: Block, varying: set[str]) -> bool:
    """Whether every value that leaves the new block stands for one of the old block, and the same values enter both.

    Two equal values that were merged are one input with the gradient of both. A value that gradients do not reach may come
    from anywhere.
    """
    names, inside = {node.name for node in ours.nodes}, set(theirs.nodes)
    leaving = (node for node in theirs.nodes if any(user not in inside for user in node.users))
    entered, enters = ({_origin(node) for node in block.inputs} & varying for block in (ours, theirs))
    return all(_origin(node) in names for node in leaving) and entered == enters


def _varying(program: Program) -> set[str]:
    """The values that gradients reach: those computed from a weight that trains or from a floating input."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            reached = node.target in program.weights and program.weights[str(node.target)].requires_grad
        elif node.op == "placeholder":
            reached = isinstance(value, Tensor) and value.is_floating_point()
        else:
            integer = isinstance(value, Tensor) and not value.is_floating_point()
            cut = integer or node.target is torch.ops.aten.detach.default
            reached = not cut and any(operand in found for operand in node.all_input_nodes)
        if reached:
            found.add(node)
    return {node.name for node in found}


def _leaves_of(program: Program, block: Block) -> set[str]:
    """The leaves a block depends on, through whatever edits."""
    return {leaf for expression in _expressions(program, block) for leaf in leaves(expression)}


def _note(node: fx.Node) -> Hashable:
    """What two values must share besides their type to have the same derivative rule."""
    value = node.meta.get("val")
    return (isinstance(value, Tensor) and value.requires_grad, str(node.meta.get("relation", "")))


def _same(old: Program, new: Program, ours: Block, theirs: Block) -> bool:
    """Whether nothing in a block was rewritten: same nodes, same weights, no relation."""
    if [n.name for n in ours.nodes] != [n.name for n in theirs.nodes]:
        return False
    if structure(old, ours, _note) != structure(new, theirs, _note):
        return False
    return _expressions(old, ours) == _expressions(new, theirs)


def _expressions(program: Program, block: Block) -> list[Expression]:
    """The weights a block reads, in order."""
    read = (x for n in block.nodes for x in n.all_input_nodes if x.op == "get_attr" and x.target in program.weights)
    return [program.weights[str(x.target)].expression for x in read]


# -- one block -------------------------------------------------------------------------------------------------


def _compare_block(
    old: Program, new: Program, ours: Block, theirs: Block, recorded: Mapping[str, Any], varying: set[str], notes: list[str]
) -> tuple[float, int]:
    """The worst error of the gradients of a block, and how many there are; ``notes`` is told of those that amplify rounding."""
    mine_too = {_origin(n) for n in ours.inputs}
    borders = [*ours.inputs, *(n for n in theirs.inputs if _origin(n) not in mine_too)]
    missing = [n.name for n in borders if _origin(n) not in recorded]
    if missing:
        raise _CannotPairError(f"{missing[0]} has no counterpart in the original")
    outputs = _shared_outputs(old, ours, theirs)
    worst, count = 0.0, 0
    for scale in (1.0, 1e-4):
        inputs = {
            _origin(n): _scaled(recorded[_origin(n)], scale) if _origin(n) in varying else recorded[_origin(n)] for n in borders
        }
        leaf = _Leaves(old, _edited(new, theirs))
        for name in sorted(_leaves_of(old, ours) | _leaves_of(new, theirs)):
            leaf(name)
        floats = (x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad)
        wanted = [*floats, *leaf.given.values()]

        def original(inputs: Mapping[str, Any], leaf: Leaf, wanted: Sequence[Tensor] = wanted) -> list[Tensor]:
            values = _run(old, ours, inputs, leaf, relate=False)
            return _pull_back([related(b, values[a]) for a, b in outputs], wanted)

        try:
            mine = original(inputs, leaf)  # one side after the other: each saves its tensors
        except RuntimeError as failure:  # it writes what its backward needs, for one
            raise _CannotPairError(f"the original has none there ({str(failure).splitlines()[0]})") from failure
        values = _run(new, theirs, inputs, leaf, relate=True)
        errors = _apart(_pull_back([values[b] for _, b in outputs], wanted), mine)
        if max(errors, default=0.0) > GRADIENT:
            moved = _moved_by_a_rounding(original, inputs, leaf, mine)
            errors = _amplified(errors, moved, ours.path or "root", notes)
        worst, count = max([worst, *errors]), count + len(wanted)
    return worst, count


def _apart(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """The relative error of every gradient."""
    floor = max(map(magnitude, reference), default=0.0) * FLOOR
    return [relative_error(a, b, floor=floor) for a, b in zip(gradients, reference, strict=True)]


def _moved_by_a_rounding(
    original: Callable[[Mapping[str, Any], Leaf], list[Tensor]],
    inputs: Mapping[str, Any],
    leaf: Leaf,
    reference: Sequence[Tensor],
) -> list[float]:
    """How far each of the original's own gradients moves when every input and weight moves by one rounding.

    Asked only when the plain tolerance fails: a softmax of huge scores, for one, amplifies one rounding beyond it.
    """
    generator = torch.Generator().manual_seed(0)
    moved = {name: by_a_rounding(x, generator) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    errors = _apart(original(moved, lambda name: by_a_rounding(leaf(name), generator)), reference)
    return [error if math.isfinite(error) else 0.0 for error in errors]


def _amplified(errors: Sequence[float], moved: Sequence[float], block: str, notes: list[str]) -> list[float]:
    """``errors`` without those that a rounding accounts for, each held to what moves that gradient; a note has the worst."""
    excused = [GRADIENT < error <= AMPLIFIED * by for error, by in zip(errors, moved, strict=True)]
    if any(excused):
        error, by = max((error, by) for error, by, yes in zip(errors, moved, excused, strict=True) if yes)
        notes.append(
            f"gradients of block '{block}' agree to {error:.1e}: one float64 rounding of what it reads moves them by {by:.1e}"
        )
    return [0.0 if yes else error for error, yes in zip(errors, excused, strict=True)]


def _scaled(value: Any, scale: float) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (value.detach() * scale).requires_grad_()


def _origin(node: fx.Node) -> str:
    return str(node.meta.get("origin", node.name))


def _shared_outputs(old: Program, ours: Block, theirs: Block) -> list[tuple[fx.Node, fx.Node]]:
    """The floating values that leave the block on both sides, paired."""
    inside = set(ours.nodes)
    leaving = {n.name: n for n in ours.nodes if any(user not in inside for user in n.users)}
    pairs = [(leaving[_origin(n)], n) for n in theirs.nodes if _origin(n) in leaving]
    return [(a, b) for a, b in pairs if isinstance(a.meta.get("val"), Tensor) and a.meta["val"].is_floating_point()]


def _edited(program: Program, block: Block) -> set[str]:
    """The leaves that reach a block through an edit."""
    names = {str(x.target) for n in block.nodes for x in n.all_input_nodes if x.op == "get_attr" and x.target in program.weights}
    return {leaf for name in names if program.weights[name].edited for leaf in leaves(program.weights[name].expression)}


class _Leaves:
    """Float64 leaves, one per storage, shared by both sides; those that train require gradients."""

    def __init__(self, program: Program, edited: set[str]) -> None:
        self.program, self.edited = program, edited
        self.given: dict[object, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        tensor = self.program.weights.leaves[name]
        large = tensor.numel() > _LARGE and name not in self.edited
        if large or not tensor.is_floating_point():
            return tensor.detach()
        if not tensor.requires_grad:
            return tensor.to(torch.float64)
        identity = (storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if identity not in self.given:
            self.given[identity] = tensor.detach().to(torch.float64).requires_grad_()
        return self.given[identity]


def _run(program: Program, block: Block, inputs: Mapping[str, Any], leaf: Leaf, *, relate: bool) -> dict[fx.Node, Any]:
    """The values of a block's nodes; the new side's inputs stand in their stated relation to the old side's."""
    run = Interpretation(program, torch.float64, lambda name: evaluate(program.weights[name].expression, leaf), noise=False)
    run.written = written(program.graph)
    for node in block.inputs:
        value = inputs[_origin(node)]
        run.values[node] = related(node, value) if relate and isinstance(value, Tensor) else value
    statistics = {x for node in block.nodes for x in node.all_input_nodes if x.op == "get_attr" and x in run.written}
    for node in (*statistics, *block.nodes):
        run.values[node] = run.step(node)
    return run.values


def _pull_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products with fixed random cotangents; zero for an input that no output depends on."""
    generator = torch.Generator().manual_seed(0)
    live, cotangents = [], []
    for output in outputs:
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        if output.requires_grad:
            live.append(output)
            cotangents.append(cotangent)
    if not live or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(live, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
