"""The attentions of a program: what each one reads, and what its mask is made of.

    y = softmax(scale q kᵀ + mask) v

A mask is a conjunction, ``a & b`` or a sum, of parts that are known by themselves: a band of positions (causal, a window;
masks.py), padding (what does not depend on the query; of it, numbers are what may do more to a score than hide it), a bias of
positions alone. Whatever is none of these is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, fx

from .axes import rank, shape
from .errors import Refused, require
from .masks import Band, Masks, inputs_of
from .ops import OPS, Ops, normal
from .program import Program, arguments
from .projections import common_source, origin
from .shapes import same, static

aten = torch.ops.aten


class Masking(Flag):
    """What a mask is made of. ``Masking(0)``: there is none."""

    CAUSAL = auto()
    WINDOW = auto()
    PADDING = auto()
    NUMBERS = auto()
    BIAS = auto()
    OTHER = auto()

    def __str__(self) -> str:
        return ", ".join(part.name.lower() for part in self if part.name) or "none"


@dataclass(frozen=True)
class Part:
    """A part of a mask that no size decides.

    Attributes:
        node: broadcast to ``[batch, heads, queries, keys]``; boolean, or added to the scores.
        keeps: whether True keeps a score.
    """

    node: fx.Node
    keeps: bool = True


@dataclass(frozen=True)
class AttentionSite:
    """One ``scaled_dot_product_attention`` with queries ``[batch, heads, n, d]``.

    Attributes:
        node: the call.
        query, key, value: what it reads; keys and values are ``[batch, heads / groups, m, ·]``.
        scale: what scores are multiplied by.
        dropout: the probability; a node where the model's mode decides.
        groups: how many query heads share one head of keys and values.
        own: whether q, k and v are made of one tensor (self-attention), as many keys as queries.
        cached: whether keys of the past are joined to those of now.
        masking: what the mask is made of.
        band: which positions it keeps, as far as sizes decide.
        padding: its parts that do not depend on the query.
        bias: its parts that depend on positions alone.
        unknown: why a part is none of these.
        mask: the whole of it, as the call reads it, beside a causal flag; None if it reads none.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    dropout: Any
    groups: int
    own: bool
    cached: bool
    masking: Masking
    band: Band
    padding: tuple[Part, ...]
    bias: tuple[Part, ...]
    unknown: str
    mask: fx.Node | None = None

    @property
    def causal(self) -> bool:
        return Masking.CAUSAL in self.masking

    @property
    def heads(self) -> int:
        return int(shape(self.query)[1])

    @property
    def width(self) -> int:
        """d."""
        return int(shape(self.query)[-1])

    def on(self, twins: Mapping[fx.Node, fx.Node]) -> AttentionSite:
        """The same attention in a copy of the program, whose nodes ``twins`` has by those of this one."""
        nodes = {name: twins[getattr(self, name)] for name in ("node", "query", "key", "value")}
        padding, bias = (tuple(replace(part, node=twins[part.node]) for part in parts) for parts in (self.padding, self.bias))
        mask = None if self.mask is None else twins[self.mask]
        return replace(self, **nodes, padding=padding, bias=bias, mask=mask)  # type: ignore[arg-type]

    def keys_kept(self, op: Ops) -> Any:
        """The padding as one mask, boolean (True is kept) or added, broadcast to ``[batch, 1, 1, keys]``; None without any."""
        found = None
        for part in self.padding:
            row = op.slice(part.node, -2, 0, 1) if rank(part.node) > 1 else part.node
            if not part.keeps:
                row = op(aten.logical_not.default)(row)
            found = row if found is None else _both(op, found, row)
        return found


def _both(op: Ops, a: Any, b: Any) -> Any:
    """Two masks as one."""
    flags = [op.dtype(x) is torch.bool for x in (a, b)]
    if all(flags):
        return op(aten.logical_and.default)(a, b)
    if not any(flags):
        return op.add(a, b)
    keep, bias = (a, b) if flags[0] else (b, a)
    return op(aten.where.ScalarOther)(keep, bias, -math.inf)


_ATTENTION = OPS["scaled_dot_product_attention"].target


def kept(mask: Tensor) -> Tensor:
    """A mask's values as booleans: True is kept, or what is added is not low."""
    return mask if mask.dtype is torch.bool else mask > -1e4


def attentions(program: Program) -> list[fx.Node]:
    """Every attention of a program, in order."""
    return program.graph.find_nodes(op="call_function", target=_ATTENTION)


def site_of(node: fx.Node, masks: Masks) -> AttentionSite:
    """What is known of one attention.

    Raises:
        Refused: it is not of four axes, or the number or width of its heads depends on the input.
    """
    given = arguments(node)
    q, k, v = (given[name] for name in ("query", "key", "value"))
    require(rank(q) == rank(k) == rank(v) == 4, f"queries of {rank(q)} axes: not 4")
    heads, key_heads, width = (static(size) or 0 for size in (shape(q)[1], shape(k)[1], shape(q)[-1]))
    require(heads and key_heads and width, "the number of heads or their width depends on the input")
    require(same(shape(k)[1], shape(v)[1]), "keys and values have not the same number of heads")
    require(all(same(shape(x)[0], shape(q)[0]) for x in (k, v)), "one batch of keys or values serves all batches of the queries")
    own = same(shape(q)[-2], shape(k)[-2]) and common_source(q, k, v)
    scale = float(given["scale"]) if given["scale"] is not None else 1 / math.sqrt(width)
    mask = _decomposed(node, given["attn_mask"], bool(given["is_causal"]), masks)
    read = given["attn_mask"]
    return AttentionSite(node, q, k, v, scale, given["dropout_p"], heads // key_heads, own, cached(k), *mask, read)


def cached(key: fx.Node) -> bool:
    """Whether keys of the past are joined to those of now, which only then stand in memory."""
    value = origin(key)
    return value.target is aten.cat.default and normal(value)[1] == -2


# -- masks ----------------------------------------------------------------------------------------------------

_Decomposed = tuple[Masking, Band, tuple[Part, ...], tuple[Part, ...], str]


def _decomposed(node: fx.Node, mask: fx.Node | None, causal: bool, masks: Masks) -> _Decomposed:
    band, padding, bias, unknown = Band(None, 0 if causal else None), list[Part](), list[Part](), ""
    numbers = False
    for part in _parts(mask) if mask is not None else ():
        try:
            band = band & _band(part, node, masks)
        except Refused as refusal:
            if _rowless(part.node) and (rank(part.node) < 3 or same(shape(part.node)[-3], 1)):
                padding.append(part)
                numbers = numbers or not (part.node.meta["val"].dtype is torch.bool or _hides(part.node))
            elif part.node.meta["val"].is_floating_point() and not inputs_of(part.node):
                bias.append(part)
            else:
                unknown = unknown or str(refusal)
    found = {
        Masking.CAUSAL: band.right == 0,
        Masking.WINDOW: band.left is not None or band.right not in (0, None),
        Masking.PADDING: bool(padding),
        Masking.NUMBERS: numbers,
        Masking.BIAS: bool(bias),
        Masking.OTHER: bool(unknown),
    }
    masking = reduce(or_, (part for part, there in found.items() if there), Masking(0))
    return masking, band, tuple(padding), tuple(bias), unknown


def _band(part: Part, attention: fx.Node, masks: Masks) -> Band:
    """The band that a part of a mask keeps.

    Raises:
        Refused: it is none, or is spread over queries or keys of which there may be more than it has.
    """
    band = masks.band(part.node, keeps=part.keeps)
    q, k = attention.args[:2]
    fits = same(shape(part.node)[-2], shape(q)[-2]) and same(shape(part.node)[-1], shape(k)[-2])
    require(band.full or fits, "the mask is spread over the queries or keys")
    return band


_SAME = {aten.expand.default, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.to.dtype}
_ANDS = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor}
_ORS = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}
_NOTS = {aten.bitwise_not.default, aten.logical_not.default}
_WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}


def _parts(node: fx.Node, keeps: bool = True) -> Iterator[Part]:
    """The parts whose conjunction or sum a mask is."""
    target, args = node.target, node.args
    kind = node.meta["val"].dtype
    if target in _SAME and _kind(args[0]) == kind:
        yield from _parts(args[0], keeps)  # type: ignore[arg-type]
    elif kind is torch.bool and target in (_ANDS if keeps else _ORS):
        for operand in node.all_input_nodes:
            yield from _parts(operand, keeps)
    elif kind is torch.bool and target in _NOTS:
        yield from _parts(args[0], not keeps)  # type: ignore[arg-type]
    elif target is aten.add.Tensor and not node.kwargs and all(_kind(x) == kind for x in args):
        for operand in node.all_input_nodes:
            yield from _parts(operand)
    elif target in _WHERES and "low" in (_filled(args[1]), _filled(args[2])):
        kept = 2 if _filled(args[1]) == "low" else 1
        yield from _parts(args[0], keeps=kept == 1)  # type: ignore[arg-type]
        yield from _summand(args[kept])
    elif target is aten.masked_fill.Scalar and _filled(args[2]) == "low":
        yield from _parts(args[1], keeps=False)  # type: ignore[arg-type]
        yield from _summand(args[0])
    elif not (_filled(node) == 1.0 and kind is torch.bool and keeps):
        yield Part(node, keeps)


def _summand(x: Any) -> Iterator[Part]:
    """The parts of what is added where a mask keeps."""
    if _filled(x) != 0.0:
        require(isinstance(x, fx.Node), "a number that is no zero is added to all scores that the mask keeps")
        yield from _parts(x)


def _kind(x: Any) -> torch.dtype | None:
    return x.meta["val"].dtype if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor) else None


_FULLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}


def _filled(x: Any) -> Any:
    """The number that ``x`` is everywhere, "low" if that masks a score; None if it is no number."""
    if isinstance(x, fx.Node):
        if x.target in _ZEROS | _ONES:
            return float(x.target in _ONES)
        x = normal(x)[_FULLS[x.target]] if x.target in _FULLS else None  # type: ignore[index]
    if not isinstance(x, (int, float)):
        return None
    return "low" if x <= -1e4 else float(x)


_MOVED = _SAME | {
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
}


def _hides(x: Any) -> bool:
    """Whether a number that is added to scores, wherever it stands, is known to be 0, or low enough to mask one."""
    if _filled(x) in (0.0, "low"):
        return True
    if not isinstance(x, fx.Node):
        return False
    args = x.args
    if x.target in _MOVED:
        return _hides(args[0])
    if x.target in _WHERES:
        return _hides(args[1]) and _hides(args[2])
    if x.target is aten.masked_fill.Scalar:
        return _hides(args[0]) and _filled(args[2]) in (0.0, "low")
    if x.target in (aten.mul.Tensor, aten.mul.Scalar):  # (1 - keep) · low, where keep is 0 or 1
        return "low" in map(_filled, args)
    return x.target is aten.add.Tensor and not x.kwargs and all(map(_hides, args))


def _rowless(node: Any) -> bool:
    """Whether every row of a mask is the same."""
    if not isinstance(node, fx.Node) or rank(node) < 2 or same(shape(node)[-2], 1):
        return True
    if node.target in _SAME:
        return _rowless(node.args[0])
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise and all(map(_rowless, node.all_input_nodes))
