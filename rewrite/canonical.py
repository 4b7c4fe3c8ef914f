"""One spelling per fact: what a capture writes in several ways, or for nothing, is written one way or not at all.

Each rule is one equation; the rules are applied until none fires. All are bit for bit exact in values and gradients,
except the rules that make a product with a weight a ``linear`` (they may sum in another order).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import FakeTensorMode, erased, no_new_guards
from .build import drop_dead, spell
from .functional import mark_writes
from .interpret import may_alias
from .metas import meta_of, refresh, same_meta
from .program import Program, arguments, inherit
from .record import silence
from .shapes import Size, product, same, same_shape, static
from .weights import expression_of, opaque

aten = torch.ops.aten
_END = 2**63 - 1


def canonicalize(program: Program) -> Program:
    """Bring the graph of ``program`` to canonical form, in place; a second call changes nothing.

    Example: ``str(canonicalize(program)) == str(canonicalize(program.copy()))``
    """
    mark_writes(program)
    editor = Editor(program)
    with no_new_guards(program.fake_mode), silence():
        changed = True
        while changed:
            fired = [editor.visit(node) for node in list(program.graph.nodes)]
            changed = any(fired) | drop_dead(program.graph)
    mark_writes(program)
    return program


class Editor:
    """Applies rules to the nodes of one program, and makes the nodes they ask for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mode: FakeTensorMode | None = program.fake_mode
        self.at: fx.Node | None = None
        self.made: list[fx.Node] = []

    def visit(self, node: fx.Node) -> bool:
        """Apply the first rule that fires at ``node``."""
        if erased(node) or node.op != "call_function" or not node.users or opaque(node) or any(map(opaque, node.all_input_nodes)):
            return False
        for rule in _RULES.get(_packet(node), ()):
            self.at, self.made = node, []
            result = rule(node, self)
            if result is not None and self._replace(node, result):
                return True
            for extra in reversed(self.made):
                self.program.graph.erase_node(extra)
        return False

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call before the visited node, with its metadata and provenance."""
        assert self.at is not None
        with self.program.graph.inserting_before(self.at):
            node = self.program.graph.create_node("call_function", target, args, kwargs, name=target._schema.name.split("::")[1])
        inherit(node, self.at)
        node.meta["val"] = meta_of(target, node.args, node.kwargs, self.mode)
        spell(node)
        self.made.append(node)
        return node

    def is_weight(self, node: Any) -> bool:
        return expression_of(node, self.program.weights) is not None

    def _replace(self, node: fx.Node, other: fx.Node) -> bool:
        """Let the readers of ``node`` read ``other``; False, and nothing changed, if that cannot be done."""
        before, after = node.meta.get("val"), other.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        if before.dtype != after.dtype or not same_shape(before.shape, after.shape) or before.device != after.device:
            return False
        readers = list(node.users)
        if _packet(node) in _COPIES and other not in self.made:
            # What the caller gets stays a tensor of its own; only readers inside the graph see the original.
            readers = [reader for reader in readers if not _returned(reader)]
        if not readers:
            return False
        node.replace_all_uses_with(other, delete_user_cb=lambda reader: reader in readers)
        # Readers see a difference only in the layout.
        fresh = {} if same_meta(before, after) else refresh(readers, self.mode)
        if fresh is None:
            for reader in readers:
                reader.replace_input_with(other, node)
            return False
        for reader, value in fresh.items():
            reader.meta["val"] = value
        if not node.users:
            self.program.graph.erase_node(node)
        return True


Rule = Callable[[fx.Node, Editor], fx.Node | None]

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


def drop_cast(node: fx.Node, edit: Editor) -> fx.Node | None:
    """to(x, dtype of x) = x"""
    x, given = node.args[0], arguments(node)
    if given.get("copy") or given.get("memory_format") not in (None, torch.preserve_format):
        return None
    return _same_meta(node, x) if _dtype(node) == _dtype(x) else None


def drop_alias(node: fx.Node, edit: Editor) -> fx.Node | None:
    """alias(x) = x;  lift_fresh_copy(x) = x"""
    return _node(node.args[0])


def drop_detach(node: fx.Node, edit: Editor) -> fx.Node | None:
    """detach(x) = x where no gradient flows into x"""
    x = _node(node.args[0])
    if x is None or not _dtype(x):
        return None
    if x.op == "get_attr" and x.target in edit.program.weights:
        return x if edit.program.weights[str(x.target)].kind != "parameter" else None
    if x.target is aten.detach.default or not (_dtype(x).is_floating_point or _dtype(x).is_complex):
        return x
    return None


def drop_slice(node: fx.Node, edit: Editor) -> fx.Node | None:
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


def drop_reshape(node: fx.Node, edit: Editor) -> fx.Node | None:
    """reshape(x, shape of x) = x;  expand, repeat, permute and transpose likewise"""
    return _same_meta(node, node.args[0])


def drop_permute(node: fx.Node, edit: Editor) -> fx.Node | None:
    """permute(x, 0 1 2 …) = x;  transpose(x, k, k) = x"""
    x = _node(node.args[0])
    rank = len(_shape(x)) if x is not None else 0
    if _packet(node) == "transpose":
        a, b = (int(axis) % max(rank, 1) for axis in node.args[1:3])  # type: ignore[arg-type]
        return x if a == b else None
    order = [int(axis) % max(rank, 1) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    return x if order == list(range(rank)) else None


def drop_double_transpose(node: fx.Node, edit: Editor) -> fx.Node | None:
    """t(t(x)) = x"""
    inner = _node(node.args[0])
    return _node(inner.args[0]) if inner is not None and inner.target is aten.t.default else None


def drop_contiguous(node: fx.Node, edit: Editor) -> fx.Node | None:
    """contiguous(x) = x and clone(x) = x where x has this layout already, or where every reader is a reshape"""
    x = _node(node.args[0])
    layout = arguments(node).get("memory_format")
    if x is None or layout not in (None, torch.contiguous_format, torch.preserve_format) or not _dtype(x):
        return None
    if _same_strides(node, x):
        return x
    return x if all(user.target is aten.reshape.default for user in node.users) else None


def drop_zero(node: fx.Node, edit: Editor) -> fx.Node | None:
    """x + 0 = x for integers;  x - 0 = x"""
    x, zero = _node(node.args[0]), node.args[1]
    if x is None or not _is_number(zero, 0) or not _dtype(x):
        return None
    # -0.0 + 0 is +0.0, so floating sums stay.
    return _same_meta(node, x) if _packet(node) == "sub" or not _dtype(x).is_floating_point else None


def drop_one(node: fx.Node, edit: Editor) -> fx.Node | None:
    """x · 1 = x;  x / 1 = x"""
    if _packet(node) == "div" and "rounding_mode" in node.kwargs:
        return None
    return _same_meta(node, node.args[0]) if _is_number(node.args[1], 1) else None


def drop_dropout(node: fx.Node, edit: Editor) -> fx.Node | None:
    """dropout(x, p, False) = x;  dropout(x, 0, …) = x"""
    given = arguments(node)
    return _node(node.args[0]) if given["train"] is False or _is_number(given["p"], 0) else None


def drop_empty_cat(node: fx.Node, edit: Editor) -> fx.Node | None:
    """cat([empty, x]) = x;  cat([x]) = x"""
    parts = [part for part in node.args[0] if static(product(_shape(part))) != 0]  # type: ignore[union-attr, arg-type]
    return _same_meta(node, parts[0]) if len(parts) == 1 else None


# -- one spelling ---------------------------------------------------------------------------------------------


def spell_view(node: fx.Node, edit: Editor) -> fx.Node | None:
    """view(x, s) = reshape(x, s)"""
    return edit.call(aten.reshape.default, node.args[0], node.args[1])


def spell_cast(node: fx.Node, edit: Editor) -> fx.Node | None:
    """to(x, dtype=d, device of x, layout of x) = to(x, d);  type_as(x, y) = to(x, dtype of y)"""
    x, given = _node(node.args[0]), arguments(node)
    if x is None or node.target is aten.to.dtype or _dtype(x) is None or _device(node) != _device(x):
        return None
    extra = ("copy", "pin_memory", "memory_format", "non_blocking")
    if any(given.get(name) not in (None, False, torch.preserve_format) for name in extra) or _packet(node) == "_to_copy":
        return None
    return edit.call(aten.to.dtype, x, _dtype(node))


def spell_product(node: fx.Node, edit: Editor) -> fx.Node | None:
    """bmm(x, y) = matmul(x, y)"""
    return edit.call(aten.matmul.default, *node.args)


def merge_reshapes(node: fx.Node, edit: Editor) -> fx.Node | None:
    """reshape(reshape(x, s), r) = reshape(x, r)"""
    inner = _node(node.args[0])
    if inner is None or inner.target is not aten.reshape.default:
        return None
    return edit.call(aten.reshape.default, inner.args[0], node.args[1])


def spell_number(node: fx.Node, edit: Editor) -> fx.Node | None:
    """where(m, x, full([], c)) = where(m, x, c);  masked_fill likewise; c may be a constant that export lifted out of the code"""
    if node.target is aten.where.self:
        (mask, x), call = node.args[:2], aten.where.ScalarOther
    elif node.target is aten.masked_fill.Tensor:
        (x, mask), call = node.args[:2], aten.masked_fill.Scalar
    else:
        return None
    number = _number(node.args[2], edit.program)
    if number is None:
        return None
    return edit.call(call, mask, x, number) if call is aten.where.ScalarOther else edit.call(call, x, mask, number)


def spell_lifted(node: fx.Node, edit: Editor) -> fx.Node | None:
    """max(x, constant of no axes) = max(x, full([], c)): a number of the user's code that export lifted out of it"""
    x, number = _node(node.args[0]), node.args[1] if len(node.args) == 2 else None
    if x is None or not isinstance(number, fx.Node) or number.op != "get_attr":
        return None
    value = _number(number, edit.program)
    if value is None:
        return None
    full = edit.call(aten.full.default, [], value, dtype=_dtype(number), device=_device(number), pin_memory=False)
    return edit.call(node.target, x, full)  # type: ignore[arg-type]


def drop_stretched_mask(node: fx.Node, edit: Editor) -> fx.Node | None:
    """masked_fill(x, expand(m, …), c) = masked_fill(x, m, c)"""
    x, mask, fill = node.args
    inner = _node(mask)
    if inner is None or _packet(inner) not in ("expand", "expand_as") or not _shape(inner.args[0]):
        return None
    return edit.call(node.target, x, inner.args[0], fill)  # type: ignore[arg-type]


def drop_softmax_dtype(node: fx.Node, edit: Editor) -> fx.Node | None:
    """softmax(x, k, dtype of x) = softmax(x, k)"""
    x, dim, dtype = (arguments(node)[name] for name in ("self", "dim", "dtype"))
    return edit.call(aten.softmax.int, x, dim) if dtype is not None and dtype == _dtype(x) else None


def drop_norm_flag(node: fx.Node, edit: Editor) -> fx.Node | None:
    """layer_norm(x, n, w, b, eps, flag) = layer_norm(x, n, w, b, eps): PyTorch does not read the flag"""
    given = arguments(node)
    if given["cudnn_enable"] is True:
        return None
    return edit.call(aten.layer_norm.default, *(given[name] for name in ("input", "normalized_shape", "weight", "bias", "eps")))


# -- products with a weight are linear ------------------------------------------------------------------------


def linear_from_addmm(node: fx.Node, edit: Editor) -> fx.Node | None:
    """addmm(b, x, W) = linear(x, t(W), b)"""
    given = arguments(node)
    b, x, W = given["self"], given["mat1"], given["mat2"]
    if not edit.is_weight(W) or edit.is_weight(x) or not (_is_number(given["alpha"], 1) and _is_number(given["beta"], 1)):
        return None
    if len(_shape(b)) != 1 or not same(_shape(b)[0], _shape(W)[1]) or _dtype(b) != _dtype(x):
        return None
    return edit.call(aten.linear.default, x, _transposed(W, edit), b)


def linear_from_matmul(node: fx.Node, edit: Editor) -> fx.Node | None:
    """matmul(x, W) = linear(x, t(W));  mm(x, W) likewise"""
    x, W = node.args[0], node.args[1]
    if not edit.is_weight(W) or edit.is_weight(x) or len(_shape(W)) != 2 or not _shape(x):
        return None
    return edit.call(aten.linear.default, x, _transposed(W, edit))


def lift_reshape(node: fx.Node, edit: Editor) -> fx.Node | None:
    """reshape(linear(reshape(x, [-1, k]), W, b), [*lead, n]) = linear(reshape(x, [*lead, k]), W, b)"""
    inner = _node(node.args[0])
    if inner is None or inner.target is not aten.linear.default or len(inner.users) != 1:
        return None
    flat = _node(inner.args[0])
    if flat is None or flat.target is not aten.reshape.default or not same(_shape(node)[-1], _shape(inner)[-1]):
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    x = edit.call(aten.reshape.default, flat.args[0], [*sizes[:-1], _shape(flat)[-1]])
    return edit.call(aten.linear.default, x, *inner.args[1:])


def _transposed(W: Any, edit: Editor) -> fx.Node:
    if W.target is aten.t.default:
        return W.args[0]  # type: ignore[no-any-return]
    return edit.call(aten.t.default, W)


_CASTS: tuple[Rule, ...] = (drop_cast, spell_cast)
_RULES: dict[str, tuple[Rule, ...]] = {
    "to": _CASTS,
    "type_as": _CASTS,
    "_to_copy": _CASTS,
    "alias": (drop_alias,),
    "lift_fresh_copy": (drop_alias,),
    "detach": (drop_detach,),
    "slice": (drop_slice,),
    "view": (spell_view,),
    "_unsafe_view": (spell_view,),
    "reshape": (drop_reshape, lift_reshape, merge_reshapes),
    "expand": (drop_reshape,),
    "repeat": (drop_reshape,),
    "permute": (drop_permute,),
    "transpose": (drop_permute,),
    "t": (drop_double_transpose,),
    "contiguous": (drop_contiguous,),
    "clone": (drop_contiguous,),
    "add": (drop_zero,),
    "sub": (drop_zero,),
    "mul": (drop_one,),
    "div": (drop_one,),
    "cat": (drop_empty_cat,),
    "where": (spell_number,),
    **dict.fromkeys(("max", "maximum"), (spell_lifted,)),
    "masked_fill": (spell_number, drop_stretched_mask),
    "softmax": (drop_softmax_dtype,),
    "layer_norm": (drop_norm_flag,),
    "addmm": (linear_from_addmm,),
    "bmm": (spell_product,),
    "mm": (linear_from_matmul,),
    "matmul": (linear_from_matmul,),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), (drop_dropout,)),
}


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
