"""One spelling per fact: what a capture writes in several ways, or for nothing, is written one way or not at all.

Each step is one equation with a claim; they are applied until none fires. All are bit for bit exact in values and
gradients, except those that make a product with a weight a ``linear``, which may sum in another order.

``SPELLINGS`` are written over ``op``: the same code brings a graph and the left side of a rule to canonical form, so that
a pattern written with ``view``, ``bmm`` or ``type_as`` finds what the graph has in their place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import erased, no_new_guards
from .build import drop_dead
from .claims import ALGEBRAIC, BITWISE, Claim
from .emit import Editor, GraphOps
from .errors import Refused
from .functional import mark_writes
from .interpret import may_alias
from .ops import Ops, fill
from .program import Program, arguments
from .record import silence
from .shapes import Size, product, same, same_shape, static
from .substitution import compare
from .weights import opaque

aten = torch.ops.aten
_END = 2**63 - 1

Judge = Callable[[Claim, fx.Node, fx.Node, GraphOps], None]


def canonicalize(program: Program, judge: Judge | None = None) -> Program:
    """Bring the graph of ``program`` to canonical form, in place; a second call changes nothing.

    Args:
        judge: is shown each step before it is made: its claim, the old node, the new one, and what was emitted for it.

    Example: ``str(canonicalize(program)) == str(canonicalize(program.copy()))``
    """
    mark_writes(program)
    editor = Editor(program)
    for view in program.graph.find_nodes(op="call_function", target=aten.view.default):
        editor.metadata.learn(view)  # a reshape could not always tell again that it is one
    with no_new_guards(program.fake_mode), silence():
        changed = True
        while changed:
            fired = [_visit(node, editor, judge) for node in list(program.graph.nodes)]
            changed = any(fired) | drop_dead(program.graph)
    mark_writes(program)
    return program


def _visit(node: fx.Node, editor: Editor, judge: Judge | None) -> bool:
    """Make the first step that can be made at ``node``."""
    if erased(node) or node.op != "call_function" or not node.users or opaque(node) or any(map(opaque, node.all_input_nodes)):
        return False
    for step in _steps(node):
        op = editor.before(node, fold=False)
        try:
            result = step.result(op, node)
            if isinstance(result, fx.Node) and _stand_in(node, result, step, op, judge):
                return True
        except Refused:
            pass
        op.rollback()
    return False


def _stand_in(node: fx.Node, other: fx.Node, step: Step | Spelling, op: GraphOps, judge: Judge | None) -> bool:
    """Let the readers of ``node`` read ``other``; False if none of them may."""
    if not isinstance(node.meta.get("val"), Tensor) or not isinstance(other.meta.get("val"), Tensor):
        return False
    readers = list(node.users)
    if _packet(node) in _COPIES and other not in op.created:
        # What the caller gets stays a tensor of its own; only readers inside the graph see the original.
        readers = [reader for reader in readers if not _returned(reader)]
    if not readers:
        return False
    overlay = compare([node], [other], op.editor.metadata, readers)
    if judge is not None:
        judge(step.claim, node, other, op)
    node.replace_all_uses_with(other, delete_user_cb=lambda reader: reader in readers)
    for reader, value in overlay.items():
        if reader is not node:
            reader.meta["val"] = value
    if not node.users:
        op.program.graph.erase_node(node)
    return True


@dataclass(frozen=True)
class Step:
    """One equation of the canonical form: what stands for a node, given an ``op`` to make it with; None if nothing does."""

    result: Callable[[GraphOps, fx.Node], Any]
    claim: Claim = BITWISE


@dataclass(frozen=True)
class Spelling:
    """call(*args) = after(op, *args), over any ``op``; ``after`` gives None where it is no equation.

    Attributes:
        where: what a graph must know beyond that; a pattern, which cannot know it, keeps both spellings.
    """

    after: Callable[..., Any]
    where: Callable[..., bool] | None = None
    claim: Claim = BITWISE

    def result(self, op: GraphOps, node: fx.Node) -> Any:
        args = fill(node.target, node.args, dict(node.kwargs))
        return self.after(op, *args) if self.where is None or self.where(*args) else None


def respell(op: Ops, target: Any, args: tuple[Any, ...], call: Any) -> Any:
    """``call``, which is ``target(*args)`` over ``op``, in canonical form."""
    for spelling in SPELLINGS.get(target, ()):
        new = spelling.after(op, *args)
        if new is not None:
            return new if spelling.where is None else op.any_of(new, call)
    return call


# Calls whose result is a new tensor, although it may hold what another one holds.
_COPIES = frozenset({"clone", "contiguous", "cat", "add", "sub", "mul", "div", "repeat", "lift_fresh_copy", "_to_copy"})


def _packet(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, name = node.target._schema.name.split("::")
    return name if namespace == "aten" else ""


def _returned(reader: fx.Node) -> bool:
    """Whether ``reader`` hands the memory it reads to the caller, itself or through views."""
    if reader.op == "output":
        return True
    passes_on = bool(may_alias(reader))
    return passes_on and any(_returned(user) for user in reader.users if user.op == "output" or reader in may_alias(user))


# -- nothing happens ------------------------------------------------------------------------------------------


def drop_cast(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """to(x, dtype of x) = x"""
    x, given = node.args[0], arguments(node)
    if given.get("copy") or given.get("memory_format") not in (None, torch.preserve_format):
        return None
    return _same_meta(node, x) if _dtype(node) == _dtype(x) else None


def drop_alias(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """alias(x) = x;  lift_fresh_copy(x) = x"""
    return _node(node.args[0])


def drop_detach(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """detach(x) = x where no gradient flows into x"""
    x = _node(node.args[0])
    if x is None or not _dtype(x):
        return None
    if x.op == "get_attr" and x.target in op.program.weights:
        return x if op.program.weights[str(x.target)].kind != "parameter" else None
    if x.target is aten.detach.default or not (_dtype(x).is_floating_point or _dtype(x).is_complex):
        return x
    return None


def drop_slice(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """slice(x, k, 0, end) = x where end is at least the size of axis k"""
    given = arguments(node)
    x, start, end, step = _node(given["self"]), given["start"], given["end"], given["step"]
    if x is None or start not in (None, 0) or step != 1 or not (end is None or isinstance(end, (int, fx.Node))):
        return None
    size = _shape(x)[given["dim"]]
    end = end.meta.get("val") if isinstance(end, fx.Node) else end
    if end is None or same(end, _END) or same(end, size):
        return x
    return None


def drop_reshape(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """reshape(x, shape of x) = x;  expand, repeat, permute and transpose likewise"""
    return _same_meta(node, node.args[0])


def drop_permute(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """permute(x, 0 1 2 …) = x;  transpose(x, k, k) = x"""
    x = _node(node.args[0])
    rank = len(_shape(x)) if x is not None else 0
    if _packet(node) == "transpose":
        a, b = (int(axis) % max(rank, 1) for axis in node.args[1:3])  # type: ignore[arg-type]
        return x if a == b else None
    order = [int(axis) % max(rank, 1) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    return x if order == list(range(rank)) else None


def drop_contiguous(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """contiguous(x) = x and clone(x) = x where x has this layout already, or where every reader is a reshape"""
    x = _node(node.args[0])
    layout = arguments(node).get("memory_format")
    if x is None or layout not in (None, torch.contiguous_format, torch.preserve_format) or not _dtype(x):
        return None
    if _same_strides(node, x):
        return x
    return x if all(user.target is aten.reshape.default for user in node.users) else None


def drop_zero(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """x + 0 = x for integers;  x - 0 = x"""
    x, zero = _node(node.args[0]), node.args[1]
    if x is None or not _is_number(zero, 0) or not _dtype(x):
        return None
    # -0.0 + 0 is +0.0, so floating sums stay.
    return _same_meta(node, x) if _packet(node) == "sub" or not _dtype(x).is_floating_point else None


def drop_one(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """x · 1 = x;  x / 1 = x"""
    if _packet(node) == "div" and "rounding_mode" in node.kwargs:
        return None
    return _same_meta(node, node.args[0]) if _is_number(node.args[1], 1) else None


def drop_dropout(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """dropout(x, p, False) = x;  dropout(x, 0, …) = x"""
    given = arguments(node)
    return _node(node.args[0]) if given["train"] is False or _is_number(given["p"], 0) else None


def drop_empty_cat(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """cat([empty, x]) = x;  cat([x]) = x"""
    parts = [part for part in node.args[0] if static(product(_shape(part))) != 0]  # type: ignore[union-attr, arg-type]
    return _same_meta(node, parts[0]) if len(parts) == 1 else None


# -- one spelling ---------------------------------------------------------------------------------------------


def spell_shape(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """reshape_as(x, y) = reshape(x, s) where one size of y at most is free, which follows from the others: then y is not read"""
    sizes = [static(size) for size in _shape(node)]
    if sizes.count(None) > 1 or (None in sizes and 0 in sizes):
        return None
    return op.reshape(node.args[0], [-1 if size is None else size for size in sizes])  # type: ignore[no-any-return]


def spell_cast(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """to(x, dtype=d, device of x, layout of x) = to(x, d)"""
    x, given = _node(node.args[0]), arguments(node)
    if x is None or node.target is aten.to.dtype or _dtype(x) is None or _device(node) != _device(x):
        return None
    extra = ("copy", "pin_memory", "memory_format", "non_blocking")
    if any(given.get(name) not in (None, False, torch.preserve_format) for name in extra) or _packet(node) == "_to_copy":
        return None
    return op.cast(x, _dtype(node))  # type: ignore[no-any-return]


def spell_type(op: Ops, x: Any, y: Any) -> Any:
    """type_as(x, y) = to(x, dtype of y)"""
    return op.cast(x, op.dtype(y))


def spell_view(op: Ops, x: Any, shape: Any) -> Any:
    """view(x, s) = reshape(x, s)"""
    return op.reshape(x, shape)


def spell_product(op: Ops, x: Any, y: Any) -> Any:
    """bmm(x, y) = matmul(x, y)"""
    return op.matmul(x, y)


def spell_permute(op: Ops, x: Any, order: Any) -> Any:
    """permute(x, 0 2 1 3) = transpose(x, 1, 2): what exchanges two axes of three or more is a transposition"""
    if not isinstance(order, (list, tuple)) or len(order) < 3 or not all(isinstance(axis, int) for axis in order):
        return None
    moved = [axis - len(order) for axis, source in enumerate(order) if axis != source % len(order)]
    return op.transpose(x, *moved) if len(moved) == 2 else None


def merge_reshapes(op: Ops, x: Any, shape: Any) -> Any:
    """reshape(reshape(x, s), r) = reshape(x, r)"""
    inner = op.inside(x, "reshape")
    return None if inner is None else op.reshape(inner[0], shape)


def drop_double_transpose(op: Ops, x: Any) -> Any:
    """t(t(x)) = x"""
    inner = op.inside(x, "t")
    return None if inner is None else inner[0]


def spell_number(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """where(m, x, full([], c)) = where(m, x, c);  masked_fill likewise; c may be a constant that export lifted out of the code"""
    if node.target not in (aten.where.self, aten.masked_fill.Tensor):
        return None
    number = _number(node.args[2], op.program)
    if number is None:
        return None
    call = aten.where.ScalarOther if node.target is aten.where.self else aten.masked_fill.Scalar
    return op(call)(*node.args[:2], number)  # type: ignore[no-any-return]


def spell_lifted(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """max(x, constant of no axes) = max(x, full([], c)): a number of the user's code that export lifted out of it"""
    x, number = _node(node.args[0]), node.args[1] if len(node.args) == 2 else None
    if x is None or not isinstance(number, fx.Node) or number.op != "get_attr":
        return None
    value = _number(number, op.program)
    if value is None:
        return None
    full = op(aten.full.default)([], value, dtype=_dtype(number), device=_device(number), pin_memory=False)
    return op(node.target)(x, full)  # type: ignore[no-any-return, arg-type]


def drop_stretched_mask(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """masked_fill(x, expand(m, …), c) = masked_fill(x, m, c)"""
    x, mask, fill = node.args
    inner = _node(mask)
    if inner is None or _packet(inner) not in ("expand", "expand_as") or not _shape(inner.args[0]):
        return None
    return op(node.target)(x, inner.args[0], fill)  # type: ignore[no-any-return, arg-type]


def drop_softmax_dtype(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """softmax(x, k, dtype of x) = softmax(x, k)"""
    x, dim, dtype = (arguments(node)[name] for name in ("self", "dim", "dtype"))
    return op.softmax(x, dim) if dtype is not None and dtype == _dtype(x) else None


# -- products with a weight are linear ------------------------------------------------------------------------


def linear_from_addmm(op: Ops, b: Any, x: Any, W: Any, beta: Any, alpha: Any) -> Any:
    """addmm(b, x, W) = linear(x, t(W), b)"""
    if not op.constant(W) or op.constant(x) or not (_is_number(beta, 1) and _is_number(alpha, 1)):
        return None
    return op.linear(x, op.t(W), b)


def _one_bias(b: Any, x: Any, W: Any, beta: Any, alpha: Any) -> bool:
    return len(_shape(b)) == 1 and same(_shape(b)[0], _shape(W)[1]) and _dtype(b) == _dtype(x)


def linear_from_matmul(op: Ops, x: Any, W: Any) -> Any:
    """matmul(x, W) = linear(x, t(W));  mm(x, W) likewise"""
    return op.linear(x, op.t(W)) if op.constant(W) and not op.constant(x) else None


def _one_matrix(x: Any, W: Any) -> bool:
    return len(_shape(W)) == 2 and len(_shape(x)) > 0


def lift_reshape(op: GraphOps, node: fx.Node) -> fx.Node | None:
    """reshape(linear(reshape(x, [-1, k]), W, b), [*lead, n]) = linear(reshape(x, [*lead, k]), W, b)"""
    inner = _node(node.args[0])
    if inner is None or inner.target is not aten.linear.default or len(inner.users) != 1:
        return None
    flat = _node(inner.args[0])
    if flat is None or flat.target is not aten.reshape.default or not same(_shape(node)[-1], _shape(inner)[-1]):
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    x = op.reshape(flat.args[0], [*sizes[:-1], _shape(flat)[-1]])
    return op.linear(x, *inner.args[1:])  # type: ignore[no-any-return]


_SUM = ALGEBRAIC("a linear layer may sum in another order than the product")
_CASTS = (Step(drop_cast), Step(spell_cast))
_STEPS: dict[str, tuple[Step, ...]] = {
    "to": _CASTS,
    "type_as": (Step(drop_cast),),
    "_to_copy": _CASTS,
    "alias": (Step(drop_alias),),
    "lift_fresh_copy": (Step(drop_alias),),
    "detach": (Step(drop_detach),),
    "slice": (Step(drop_slice),),
    "view_as": (Step(spell_shape),),
    "reshape_as": (Step(spell_shape),),
    "reshape": (Step(drop_reshape), Step(lift_reshape, _SUM)),
    "expand": (Step(drop_reshape),),
    "repeat": (Step(drop_reshape),),
    "permute": (Step(drop_permute),),
    "transpose": (Step(drop_permute),),
    "contiguous": (Step(drop_contiguous),),
    "clone": (Step(drop_contiguous),),
    "add": (Step(drop_zero),),
    "sub": (Step(drop_zero),),
    "mul": (Step(drop_one),),
    "div": (Step(drop_one),),
    "cat": (Step(drop_empty_cat),),
    "where": (Step(spell_number),),
    **dict.fromkeys(("max", "maximum"), (Step(spell_lifted),)),
    "masked_fill": (Step(spell_number), Step(drop_stretched_mask)),
    "softmax": (Step(drop_softmax_dtype),),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), (Step(drop_dropout),)),
}
_PRODUCT = Spelling(linear_from_matmul, _one_matrix, _SUM)
SPELLINGS: dict[Any, tuple[Spelling, ...]] = {
    aten.type_as.default: (Spelling(spell_type),),
    aten.view.default: (Spelling(spell_view),),
    aten._unsafe_view.default: (Spelling(spell_view),),
    aten.reshape.default: (Spelling(merge_reshapes),),
    aten.permute.default: (Spelling(spell_permute),),
    aten.t.default: (Spelling(drop_double_transpose),),
    aten.addmm.default: (Spelling(linear_from_addmm, _one_bias, _SUM),),
    aten.bmm.default: (Spelling(spell_product),),
    aten.mm.default: (_PRODUCT,),
    aten.matmul.default: (_PRODUCT,),
}


def _steps(node: fx.Node) -> tuple[Step | Spelling, ...]:
    return (*_STEPS.get(_packet(node), ()), *SPELLINGS.get(node.target, ()))


# -- questions about nodes ------------------------------------------------------------------------------------


def _number(x: Any, program: Program) -> float | None:
    """The number that ``x`` is, as its dtype holds it: a full of no axes, or a lifted constant of no axes."""
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor) or _shape(x):
        return None
    if x.op == "get_attr" and x.target in program.weights and program.weights[str(x.target)].kind == "constant":
        value = program.weights.value(str(x.target))
        return None if value.is_meta else value.item()
    number = x.args[1] if x.target is aten.full.default else None
    return torch.full((), number, dtype=_dtype(x)).item() if isinstance(number, (int, float)) else None


def _node(x: Any) -> fx.Node | None:
    return x if isinstance(x, fx.Node) else None


def _shape(x: Any) -> Sequence[Size]:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _dtype(x: Any) -> Any:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _device(x: fx.Node) -> Any:
    value = x.meta.get("val")
    return value.device if isinstance(value, Tensor) else None


def _same_meta(node: fx.Node, x: Any) -> fx.Node | None:
    """``x`` if it has the shape, dtype and device of ``node``."""
    if _dtype(x) is None or _dtype(x) != _dtype(node) or _device(x) != _device(node):
        return None
    return x if same_shape(_shape(x), _shape(node)) else None


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.layout is y.layout is torch.strided and same_shape(x.stride(), y.stride())


def _is_number(x: Any, value: int) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and operator.eq(x, value)
