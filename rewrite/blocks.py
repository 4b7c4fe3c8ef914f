"""The blocks of a program: runs of calls that are equal up to names, and what stands between them.

Two blocks are equal if they have the same ops, the same literals and the same wiring; if everything they read has the
same shape and dtype, weights included; if the tables that select (integers, booleans, lowest numbers: a mask) hold the
same values; and if what enters from outside is the same value in both or comes from another of the equal blocks. So a
layer with another eps, width, window or mask is another block; trained values are names.

Provenance first: a numbered module (``h.3``), the outermost one that has an equal. Where it says nothing, the graph
does: calls get the label of a first Weisfeiler–Lehman round (op, literals, types of the operands), a loop shows as a
period of the labels, cut where the fewest values cross. Either way it is the whole structure that decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, arguments, target_name
from .shapes import key

LOW = -1e9
"""A constant with entries this low is a mask."""


@dataclass(frozen=True, eq=False)
class Block:
    """A run of calls.

    Attributes:
        path: the module that owns it, ``transformer.h.3``; empty where provenance says nothing.
        nodes: its calls, in the order of the program.
    """

    path: str
    nodes: tuple[fx.Node, ...]

    @cached_property
    def order(self) -> tuple[fx.Node, ...]:
        """The calls in an order that the wiring alone decides: from the results down, operands first."""
        inside, order = set(self.nodes), dict[fx.Node, None]()
        stack = [node for node in reversed(self.nodes) if not any(user in inside for user in node.users)]
        while stack:
            pending = [x for x in stack[-1].all_input_nodes if x in inside and x not in order]
            if pending:
                stack.append(pending[0])
            else:
                order[stack.pop()] = None
        return tuple(order)

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values it reads from outside, weights apart, in the order of their first reading."""
        return tuple(dict.fromkeys(x for x in self._read if x.op != "get_attr"))

    @cached_property
    def weights(self) -> tuple[fx.Node, ...]:
        """The weights it reads, in the order of their first reading."""
        return tuple(dict.fromkeys(x for x in self._read if x.op == "get_attr"))

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values that are read outside."""
        inside = set(self.nodes)
        return tuple(node for node in self.order if any(user not in inside for user in node.users))

    @property
    def _read(self) -> Iterator[fx.Node]:
        inside = set(self.nodes)
        return (x for node in self.order for x in node.all_input_nodes if x not in inside)

    def __str__(self) -> str:
        return self.path or f"{self.nodes[0].name} … {self.nodes[-1].name}"


def blocks(program: Program) -> list[Block]:
    """All calls of a program in order, cut into its blocks and what stands between.

    Example: ``[block.path for block in blocks(program)]`` gives ``["", "h.0", "h.1", ""]``
    """
    found = _owned(program, _calls(program))
    owned = {block for group in equal(program, found) for block in group if block.path}
    return [piece for block in found for piece in ([block] if block in owned else _periods(program, block))]


def repeated(program: Program) -> tuple[tuple[Block, ...], ...]:
    """The groups of equal blocks, in order; a block of one call is no block.

    Example: ``[len(group) for group in repeated(program)]`` gives ``[12]`` for GPT-2
    """
    return equal(program, blocks(program))


# -- equality --------------------------------------------------------------------------------------------------


def structure(program: Program, block: Block, note: Callable[[fx.Node], Hashable] = lambda node: None) -> Hashable:
    """What equal blocks share: ops, literals, wiring, and the types of all they read.

    Args:
        note: something more that a value must share, ``requires_grad`` for one.
    """
    position: dict[Hashable, int] = {}

    def shown(x: Any) -> Hashable:
        if isinstance(x, fx.Node):
            weight = x.op == "get_attr" and x.target in program.weights
            name = program.weights.storage(str(x.target)) if weight else x
            return (position.setdefault(name, len(position)), _type(program, x), note(x))
        if isinstance(x, (list, tuple)):
            return tuple(map(shown, x))
        return repr(x)  # 1, 1.0 and True are equal and hash alike

    outputs = set(block.outputs)
    return tuple((target_name(n), shown(_arguments(n)), shown(n), n in outputs) for n in block.order)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    if isinstance(node.target, torch._ops.OpOverload):
        return (node.target._overloadname, *arguments(node).values())
    return (*node.args, *node.kwargs.items())


def _type(program: Program, node: fx.Node) -> Hashable:
    """Everything but the name of a value; of a table that selects, its entries too."""
    if node.op == "get_attr" and node.target in program.weights:
        meta = program.weights[str(node.target)].meta
        return ("weight", tuple(map(key, meta.shape)), meta.dtype, _selection(program, str(node.target)))
    if node.op == "get_attr":
        region = program.regions.get(str(node.target))
        return ("flag", program.training.get(str(node.target))) if region is None else ("region", region.code)
    value = node.meta.get("val")
    leaves = value if isinstance(value, (list, tuple)) else (value,)
    return tuple((tuple(map(key, x.shape)), x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)


def _selection(program: Program, name: str) -> Hashable:
    weight = program.weights[name]
    if weight.kind == "parameter" and weight.meta.is_floating_point():
        return None
    if weight.edited or program.weights.leaves[name].is_meta:
        return None if weight.meta.is_floating_point() else name
    value = program.weights.leaves[name].detach()
    if value.is_floating_point() and not bool((value <= LOW).any()):
        return None
    return sha256(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def equal(program: Program, found: Iterable[Block]) -> tuple[tuple[Block, ...], ...]:
    """The sets of two and more equal blocks, each of two and more calls."""
    alike: dict[Hashable, list[Block]] = {}
    for block in (block for block in found if len(block.nodes) > 1):
        alike.setdefault(structure(program, block), []).append(block)
    groups: dict[Hashable, list[Block]] = {}
    for name, same in alike.items():
        carried = _carried(program, same) if len(same) > 1 else set()
        for block in same:
            context = tuple(x for i, x in enumerate(block.inputs) if i not in carried)
            groups.setdefault((name, context), []).append(block)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _carried(program: Program, same: Sequence[Block]) -> set[int]:
    """The inputs, by position, that come from another of the blocks: a stream, where others are a mask or sizes."""
    reached = {node for block in same for node in block.nodes}
    for node in program.graph.nodes:
        if any(x in reached for x in node.all_input_nodes):
            reached.add(node)
    return {i for block in same for i, x in enumerate(block.inputs) if x in reached}


# -- by provenance ---------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(^|.*\.)\d+$")


def _calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _owned(program: Program, calls: Sequence[fx.Node], path: str = "", depth: int = 0) -> list[Block]:
    """``calls`` of ``path``, cut where the numbered module changes: the outermost one that has an equal."""
    runs = groupby(zip(_owners(calls, depth), calls, strict=True), lambda pair: pair[0])
    cut = [(owner, tuple(node for _, node in run)) for owner, run in runs]
    units = [Block(owner[1], nodes) if owner and len(nodes) > 1 else Block(path, nodes) for owner, nodes in cut]
    settled = {block for group in equal(program, units) for block in group}
    found = list[Block]()
    for unit in units:
        inner = _owned(program, unit.nodes, unit.path, depth + 1) if unit.path != path and unit not in settled else []
        if equal(program, inner):
            found.extend(inner)
        elif unit.path == path and found and found[-1].path == path:
            found[-1] = Block(path, found[-1].nodes + unit.nodes)
        else:
            found.append(unit)
    return found


def _owners(calls: Sequence[fx.Node], depth: int) -> list[tuple[str, str] | None]:
    """The ``depth``-th numbered module of each call: the key of the call of that module (one per call), and its path.

    A call without one between two of one owner (a rewrite's, say) is the owner's.
    """
    owners = list[tuple[str, str] | None]()
    for node in calls:
        stack = [(str(call), str(entry[0])) for call, entry in (node.meta.get("nn_module_stack") or {}).items()]
        numbered = [entry for entry in stack if _NUMBERED.match(entry[1])]
        owners.append(numbered[depth] if len(numbered) > depth else None)
    last = {owner: index for index, owner in enumerate(owners)}
    for index in range(1, len(owners)):
        before, owner = owners[index - 1 : index + 1]
        if owner is None and before is not None and last[before] > index:
            owners[index] = before
    return owners


# -- by repetition ---------------------------------------------------------------------------------------------


def _periods(program: Program, whole: Block) -> list[Block]:
    """``whole`` cut where it repeats itself: the repetition that covers most, then in what is left of it."""
    calls = whole.nodes
    label = [structure(program, Block("", (node,))) for node in calls]
    for start, period, count in _candidates(label, calls):
        cuts = [start + i * period for i in range(count + 1)]
        chain = _longest_chain(program, [Block(whole.path, calls[a:b]) for a, b in pairwise(cuts)])
        if chain:
            first, behind = calls.index(chain[0].nodes[0]), calls.index(chain[-1].nodes[-1]) + 1
            rest = [Block(whole.path, nodes) for nodes in (calls[:first], calls[behind:])]
            before, after = (_periods(program, block) if block.nodes else [] for block in rest)
            return [*before, *chain, *after]
    return [whole]


def _candidates(label: Sequence[Hashable], calls: Sequence[fx.Node]) -> list[tuple[int, int, int]]:
    """Start, period and count of the repetitions of ``label``, best first: by the calls covered, then the smaller period."""
    number = {name: index for index, name in enumerate(dict.fromkeys(label))}
    text, places = [number[name] for name in label], dict[int, list[int]]()
    for index, name in enumerate(text):
        places.setdefault(name, []).append(index)
    crossing, found = _crossing(calls), list[tuple[int, int, int]]()
    for period in {b - a for at in places.values() for a, b in pairwise(at)} - {1}:
        alike = (text[i] == text[i + period] for i in range(len(text) - period))
        for same, run in groupby(enumerate(alike), lambda pair: pair[1]):
            at = [index for index, _ in run]
            count, spare = len(at) // period + 1, len(at) % period
            if same and count > 1:
                start = min(range(at[0], at[0] + spare + 1), key=lambda s: sum(crossing[s + i * period] for i in range(1, count)))
                found.append((start, period, count))
    return sorted(found, key=lambda c: (-c[1] * c[2], c[1]))


def _crossing(calls: Sequence[fx.Node]) -> list[int]:
    """How many values of ``calls`` cross from before each of them to it or beyond."""
    index = {node: i for i, node in enumerate(calls)}
    change = Counter[int]()
    for node, i in index.items():
        if node.users:
            change[i + 1] += 1
            change[max(index.get(user, len(calls)) for user in node.users) + 1] -= 1
    return list(accumulate(change[i] for i in range(len(calls) + 1)))


def _longest_chain(program: Program, links: Sequence[Block]) -> list[Block]:
    """The longest run of equal blocks of which each hands on what it has from the one before; empty if there are no two."""
    name = [structure(program, block) for block in links]
    runs = [[links[0]]]
    for i, (before, block) in enumerate(pairwise(links)):
        if name[i] == name[i + 1] and _hands_on(before, block):
            runs[-1].append(block)
        else:
            runs.append([block])
    longest = max(runs, key=len)
    return longest if len(longest) > 1 else []


def _hands_on(before: Block, block: Block) -> bool:
    """Whether what ``block`` takes from ``before`` reaches what it gives in turn: in q, k and v in a row it does not."""
    taken = [node in block.inputs for node in before.outputs]
    reached = set(before.outputs) & set(block.inputs)
    for node in block.order:
        if any(x in reached for x in node.all_input_nodes):
            reached.add(node)
    return any(node in reached for node, read in zip(block.outputs, taken, strict=True) if read)
