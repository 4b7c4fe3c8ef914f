"""A causal program as a program of one position: what its attentions know of the past goes in and comes out as a state.

    logits, state = prefill(tokens)                      the program itself, and the state behind its last position
    logits, state = step(token, position, state)         the program at one position more

In ``step`` an attention is what attention_steps.py makes of it, and what counts positions (0, 1, … from sizes alone; the first
rows of a table) counts from the position on. Everything else has to act on each position by itself. That is not read off the
ops but checked: both are run in float64 against the program, past every window, and the first value that differs is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import pytree
from .attention_steps import STATELESS, STEPS, Emit
from .divergence import logits_of
from .errors import Refused, UsageError
from .evidence import FORWARD, relative_error
from .interpret import interpret
from .masks import evaluate, size_region
from .program import Program, arguments, place, source_of, target_name
from .shapes import Size, key, same
from .signature import Signature

aten = torch.ops.aten
ALONE = "capture the model with its tokens alone: no attention_mask, no position_ids, no cache (use_cache=False)"


@dataclass(frozen=True)
class Stepping:
    """A program position by position.

    Attributes:
        program: the program.
        prefill: its inputs → (logits, the tensors of the state).
        step: (its inputs at one position, position, the tensors of the state) → (logits, the tensors of the new state).
        tokens: which flat input has the tokens, ``[batch, positions, …]``.
        logits: which flat output has one row for each, ``[batch, positions, …]``.
        window: the longest past that an attention treats unlike those that are longer.
        grows: the places whose state becomes longer with every position.
        counted: the names of the nodes that count positions.
        positions: how many rows a table has of which the first are read; None if none is. A lookup fails alone.
    """

    program: Program
    prefill: Program
    step: Program
    tokens: int
    logits: int
    window: int
    grows: tuple[str, ...]
    counted: frozenset[str]
    positions: int | None

    def flat(self, tokens: Tensor) -> list[Any]:
        """The flat inputs of a call."""
        flat = list(self.program.example)
        flat[self.tokens] = tokens
        return flat


def stepping(program: Program) -> Stepping:
    """``program`` position by position, not checked yet.

    Raises:
        UsageError: it has no such form, with the place and the reason.
    """
    sites = [node for node in program.graph.nodes if node.target in STEPS or node.target in STATELESS]
    if not sites:
        raise _no(program, "it has no attention, and nothing else that is known to keep a past")
    for node in sites:
        try:
            if node.target in STATELESS:
                raise Refused(STATELESS[node.target])
            STEPS[node.target].fits(arguments(node))
        except Refused as refusal:
            raise _no(program, f"{place(node)}: {refusal}", node) from refusal
    time = arguments(sites[0])["query"].meta["val"].shape[-2]
    if isinstance(time, int):
        raise _no(program, f"it was captured for {time} positions", hint="leave the length free: dynamic_shapes='auto'")
    tokens, logits, counted = _tokens(program, time), _logits(program, time), dict(_counted(program, time))
    prefill, step = _prefill(program, sites, logits), _step(program, sites, counted, logits)
    with torch.no_grad():
        _, *state = interpret(prefill, program.example)
    example = [*program.example]
    example[tokens] = example[tokens].narrow(1, 0, 1)
    call = (tuple(example), torch.tensor(program.example[tokens].shape[1], device=example[tokens].device), tuple(state))
    out = pytree.tree_structure((0, (0,) * len(state)))
    prefill.signature = replace(program.signature, out_spec=out)
    step.signature, step.example = Signature.of(_call, program.name, call, {}, out), tuple(pytree.tree_leaves(call))
    window = max(int(arguments(node).get(name, 0)) for node in sites for name in ("window", "block", "chunk"))
    grows = tuple(place(node) for node in sites if STEPS[node.target].grows)
    names, rows = frozenset(node.name for node in counted), (_rows(node, row) for node, row in counted.items() if row is not None)
    return Stepping(program, prefill, step, tokens, logits, window, grows, names, min(rows, default=None))


def _call(inputs: Any, position: Any, state: Any) -> None:
    """How a step is called."""


def _no(program: Program, reason: str, node: fx.Node | None = None, hint: str | None = None) -> UsageError:
    where = None if node is None else source_of(node)
    return UsageError(f"{program.name} cannot be decoded position by position: {reason}", where=where, hint=hint)


def _along(node: fx.Node, time: Size) -> list[int]:
    """The axes of positions of a value."""
    value = node.meta.get("val")
    return [axis for axis, size in enumerate(value.shape) if same(size, time)] if isinstance(value, Tensor) else []


def _tokens(program: Program, time: Size) -> int:
    """The one flat input that is a tensor."""
    found = [i for i, node in enumerate(program.placeholders) if isinstance(node.meta.get("val"), Tensor) and node.users]
    if len(found) != 1 or _along(program.placeholders[found[0]], time) != [1]:
        names = " and ".join(program.signature.leaf_names[i] for i in found)
        raise _no(program, f"it reads {names}, and a step has nothing but the next token, [batch, positions]", hint=ALONE)
    return found[0]


def _logits(program: Program, time: Size) -> int:
    """Which flat output is the logits, or else the only tensor."""
    outputs: Any = program.output.args[0]
    named = logits_of(program)
    tensors = [i for i, x in enumerate(outputs) if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]
    if named is None and len(tensors) != 1:
        hint = "a model with a head (…LMHeadModel, …ForCausalLM), or a module that returns one tensor"
        raise _no(program, f"it returns {len(tensors)} tensors, and none of them is called logits", hint=hint)
    index = tensors[0] if named is None else named
    if _along(outputs[index], time) != [1]:
        reason = "what it returns has not one row per position, [batch, positions]"
        raise _no(program, reason, hint="the logits of all positions: no logits_to_keep, no pooling")
    return index


# -- the two graphs -------------------------------------------------------------------------------------------


def _twins(copy: Program, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    named = {node.name: node for node in copy.graph.nodes}
    return [named[node.name] for node in nodes]


def _emitter(program: Program, before: fx.Node) -> Emit:
    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with program.graph.inserting_before(before):
            return program.graph.call_function(target, args, kwargs)

    return emit


def _return(program: Program, logits: int, state: Sequence[fx.Node]) -> Program:
    """``program`` with its logits and a state for outputs, computing nothing else."""
    outputs: Any = program.output.args[0]
    program.output.args = ((outputs[logits], *state),)
    program.graph.eliminate_dead_code()
    return program


def _prefill(program: Program, sites: Sequence[fx.Node], logits: int) -> Program:
    prefill, state = program.copy(), list[fx.Node]()
    for node in _twins(prefill, sites):
        state += STEPS[node.target].state(_emitter(prefill, node.next), arguments(node))
    return _return(prefill, logits, state)


Counted = Mapping[fx.Node, tuple[int, int] | None]


def _step(program: Program, sites: Sequence[fx.Node], counted: Counted, logits: int) -> Program:
    step, state = program.copy(), list[fx.Node]()
    with step.graph.inserting_after(step.placeholders[-1]):
        last = position = step.graph.placeholder("position")
    moving, attending = _twins(step, list(counted)), _twins(step, sites)
    for twin, row in zip(moving, counted.values(), strict=True):
        emit = _emitter(step, twin.next)
        if row is None:  # it has one row, and that counts from zero
            moved = emit(aten.add.Tensor, twin, position)
            for user in [user for user in twin.users if user is not moved]:
                user.replace_input_with(twin, moved)
        else:
            index = emit(aten.reshape.default, emit(aten.add.Scalar, position, row[1]), [1])
            twin.replace_all_uses_with(emit(aten.index_select.default, twin.args[0], row[0], index))
    for node in attending:
        past = list[fx.Node]()
        for _ in range(STEPS[node.target].size):
            with step.graph.inserting_after(last):
                last = step.graph.placeholder(f"state_{len(state) + len(past)}")
            past.append(last)
        attended, *new = STEPS[node.target].step(_emitter(step, node), arguments(node), position, past)
        node.replace_all_uses_with(attended)
        step.graph.erase_node(node)
        state += new
    return _return(step, logits, state)


def _counted(program: Program, time: Size) -> Iterator[tuple[fx.Node, tuple[int, int] | None]]:
    """The nodes that count positions from sizes alone: i + a at position i, None; or row i + a of a table, (its axis, a)."""
    behind = set[fx.Node]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        axes, row = _along(node, time), None
        if any(operand in behind for operand in node.all_input_nodes):
            behind.add(node)
        elif len(axes) == 1 and (_counts(program, node, axes[0], time) or (row := _row(node, axes[0], time))):
            behind.add(node)
            yield node, row


def _row(node: fx.Node, axis: int, time: Size) -> tuple[int, int] | None:
    """The axis and the start of the first rows of a table, as many as positions; None if it is anything else."""
    if node.target is not aten.slice.Tensor:
        return None
    cut = arguments(node)
    start, there = cut["start"] or 0, cut["dim"] % node.meta["val"].ndim == axis
    rows = there and cut["step"] == 1 and isinstance(start, int) and start >= 0 and not _along(cut["self"], time)
    return (axis, start) if rows else None


def _rows(node: fx.Node, row: tuple[int, int]) -> int:
    """How many positions a table has rows for."""
    (axis, start), table = row, arguments(node)["self"]
    return int(table.meta["val"].shape[axis]) - start


def _counts(program: Program, node: fx.Node, axis: int, time: Size) -> bool:
    """Whether a value is i + a at position i, whatever the sizes are."""
    if node.meta["val"].dtype is torch.bool:
        return False
    try:
        region = size_region(node, program.weights)
        shapes = [x.meta["val"].shape for x in program.placeholders if isinstance(x.meta.get("val"), Tensor)]
        symbols = [size.node.expr.free_symbols for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
        free = set().union(*symbols)
        found = list[Tensor]()
        for length in (1, 3, 6):
            sizes: Any = {**dict.fromkeys(free, 2), key(time): length}
            value = evaluate(region, program.weights, sizes)[node].movedim(axis, -1)
            found.append(value - torch.arange(length, dtype=value.dtype))
        return all(torch.equal(x, found[0].expand(x.shape)) for x in found)
    except (Refused, RuntimeError, IndexError, ValueError, KeyError):
        return False


# -- the proof ------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_stepping(form: Stepping, more: int = 2) -> tuple[str, ...]:
    """Hold a stepping to its program, in float64: behind one position, a few, and more than any window has.

    Args:
        more: how many steps behind each.

    Returns:
        the lengths, for a report; those for which the program has no positions are left out.

    Raises:
        UsageError: they differ, with the first value in the program that does.
    """
    told = list[str]()
    for length in (1, 5, form.window + 3):
        if form.positions is not None and length + more > form.positions:
            continue
        tokens = _draw(form, length + more)
        try:
            wanted = interpret(form.program, form.flat(tokens), dtype=torch.float64)[form.logits]
        except IndexError:
            continue
        found, *first = interpret(form.prefill, form.flat(tokens[:, :length]), dtype=torch.float64)
        if not relative_error(found, wanted[:, :length]) <= FORWARD:
            raise _no(form.program, "what it computes at a position depends on how many there are")
        state: Sequence[Tensor] = first
        for at in range(length, length + more):
            state = _follow(form, tokens, at, state, wanted[:, at : at + 1])
        told.append(f"{length} + {more}")
    return tuple(told)


def _draw(form: Stepping, length: int) -> Tensor:
    """Two samples of tokens that the example holds."""
    example, draw = form.program.example[form.tokens], torch.Generator().manual_seed(0)
    rows = torch.randint(example.shape[1], (2, length), generator=draw).to(example.device)
    return torch.cat([example[:1].index_select(1, row) for row in rows])


def _follow(form: Stepping, tokens: Tensor, at: int, state: Sequence[Tensor], wanted: Tensor) -> Sequence[Tensor]:
    """The state behind one step more."""
    values = dict[str, Any]()
    inputs = (*form.flat(tokens[:, at : at + 1]), torch.tensor(at, device=tokens.device), *state)
    try:
        found, *new = interpret(
            form.step, inputs, dtype=torch.float64, observe=lambda node, value: values.update({node.name: value})
        )
    except RuntimeError as failure:
        raise _no(form.program, f"it does not run on one position: {failure}") from failure
    if not relative_error(found, wanted) <= FORWARD:
        raise _blame(form, tokens, at, values)
    return new


def _blame(form: Stepping, tokens: Tensor, at: int, stepped: Mapping[str, Any]) -> UsageError:
    """The first value of the program that is another one at position ``at`` when it is stepped."""
    time, found = form.program.placeholders[form.tokens].meta["val"].shape[1], list[fx.Node]()

    def see(node: fx.Node, value: Any) -> None:
        axes, twin = _along(node, time), stepped.get(node.name)
        if found or len(axes) != 1 or node.name in form.counted or not isinstance(twin, Tensor):
            return
        if not relative_error(twin, value.narrow(axes[0], at, 1)) <= FORWARD:
            found.append(node)

    interpret(form.program, form.flat(tokens), dtype=torch.float64, observe=see)
    if not found:
        return _no(form.program, "what it computes at a position depends on other positions")
    return _no(form.program, f"{place(found[0])}: its {target_name(found[0])} at a position depends on others", found[0])
