"""Recognise the mask of an attention that is computed from sizes alone.

    attention(q, k, v, mask that keeps everything) = attention(q, k, v)
    attention(q, k, v, mask that keeps j ≤ i)      = attention(q, k, v, is_causal)       as many keys as queries

What a mask keeps is checked at several sizes (``rewrite/masks.py``). A sum of a bias and a mask that keeps everything
is the bias.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.masks import Masks
from tautomer.rewrite.metadata import Metadata
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.rules import rank, shape
from tautomer.rewrite.shapes import same
from tautomer.rewrite.substitution import follow

aten = torch.ops.aten


class RaiseMask(Pass):
    """A mask of sizes alone → no mask, or ``is_causal``; see the module."""

    claim = ALGEBRAIC("another kernel sums in another order; the mask is checked at a few sizes, not proved")
    phase: ClassVar[Phase] = "raise"

    def run(self, program: Program, context: Context) -> None:
        masks, metadata = Masks(program), Metadata(program.fake_mode)
        plan: list[tuple[fx.Node, Any, str]] = []
        for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if arguments(node)["attn_mask"] is not None:
                try:
                    plan.append((node, *_without_mask(node, masks)))
                except Refused as refusal:
                    context.refused(self, node, str(refusal))
        for node, mask, what in plan:
            if not context.admits(self, node):
                continue
            try:
                _give(node, mask, what.startswith("causal"), metadata)
                context.applied(self, node, f"the mask is {what}")
            except Refused as refusal:
                context.refused(self, node, str(refusal))


def _give(node: fx.Node, mask: Any, causal: bool, metadata: Metadata) -> None:
    """Another mask to an attention; refused, and nothing changed, if a reader minds the layout of what it then returns."""
    before, given = (node.args, node.kwargs), arguments(node)
    node.args = (given["query"], given["key"], given["value"], mask, given["dropout_p"], causal)
    node.kwargs = {name: given[name] for name in ("scale", "enable_gqa")}
    try:
        fresh = follow({}, [node], metadata)
    except Refused:
        node.args, node.kwargs = before
        raise
    for reader, value in fresh.items():
        reader.meta["val"] = value


def _without_mask(node: fx.Node, masks: Masks) -> tuple[Any, str]:
    """The mask that stays, and what the one that goes is."""
    given = arguments(node)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    bias = _without_zeros(mask, masks)
    try:
        band = masks.band(bias)
    except Refused:
        if bias is not mask:
            return bias, "full beside a bias"
        raise
    if band.full:
        return None, f"full, checked at {band.sizes}"
    require(band.causal, f"the mask is {band}: it stays a mask, attention has words for full and causal ones alone")
    rows, columns = shape(query)[-2], shape(key)[-2]
    require(same(rows, columns), "the mask is causal, but there may be more keys than queries")
    require(same(shape(bias)[-2], rows) and same(shape(bias)[-1], columns), "the mask is spread over the queries or keys")
    return None, f"causal, checked at {band.sizes}"


def _without_zeros(mask: Any, masks: Masks) -> Any:
    """``mask`` without the summands that are zero everywhere."""
    if mask.op != "call_function" or mask.target is not aten.add.Tensor or mask.kwargs:
        return mask
    for zero, other in (mask.args, reversed(mask.args)):
        if isinstance(zero, fx.Node) and isinstance(other, fx.Node) and rank(other) >= 2 and _is_zero(zero, masks):
            return _without_zeros(other, masks)
    return mask


def _is_zero(x: fx.Node, masks: Masks) -> bool:
    try:
        return x.meta["val"].is_floating_point() and masks.band(x).full
    except Refused:
        return False
