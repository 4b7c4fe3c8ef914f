"""Recognise the mask of an attention with a cache that is computed from sizes alone.

    cached_attention(…, mask that keeps everything)   = cached_attention(…)
    cached_attention(…, mask that keeps j ≤ past + i) = cached_attention(…, causal)

What a mask keeps is checked at several sizes (``rewrite/masks.py``).
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.masks import Band, Masks
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import at_least, same


class RaiseCachedMask(Pass):
    """A mask of sizes alone beside a cache → no mask, or ``causal``; see the module."""

    claim = ALGEBRAIC("another kernel sums in another order; the mask is checked at a few sizes, not proved")
    phase: ClassVar[Phase] = "rewrite"

    def run(self, program: Program, context: Context) -> None:
        masks, plan = Masks(program), list[tuple[fx.Node, Band]]()
        for node in program.graph.find_nodes(op="call_function", target=tautomer.cached_attention.v1):
            if normal(node)[5] is not None and context.admits(self, node):
                try:
                    plan.append((node, _band(node, masks)))
                except Refused as refusal:
                    context.refused(self, node, str(refusal))
        for node, band in plan:
            *operands, _, heads, key_heads, _, scale = normal(node)
            node.args, node.kwargs = (*operands, None, heads, key_heads, band.causal, scale), {}
            context.applied(self, node, f"the mask is {band} behind the past, checked at {band.sizes}")


def _band(node: fx.Node, masks: Masks) -> Band:
    query, mask = (normal(node)[i] for i in (0, 5))
    band = masks.band(mask, behind=True)
    require(band.full or band.causal, f"the mask is {band} behind the past: it stays a mask")
    rows, columns = shape(mask)[-2:]
    require(band.full or same(rows, shape(query)[1]), "the mask is spread over the queries")
    # An attention takes as many columns as keys, or one. If one is no fewer than the rows, there is one row: it sees everything.
    require(band.full or at_least(columns, rows), "the mask may have fewer columns than rows, and be spread over the keys")
    return band
