"""Add a mask to the scores of a softmax instead of filling it in, where it is computed from sizes alone.

    softmax(where(keep, s, -1e9) + b) = softmax(s + where(keep, 0, -inf) + b)        every row keeps something

The two are equal, gradients too, unless a row is masked everywhere; the rows of a mask of sizes can be seen
(``rewrite/masks.py``). ``add_filled_mask`` is for other masks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.masks import LOW, Band, Masks
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import dtype, shape
from tautomer.rewrite.shapes import same

from .spellings import ZEROS, additive_mask

aten = torch.ops.aten


class AddMaskOfSizes(Pass):
    """A filled mask of sizes alone → a mask that is added; see the module."""

    claim = ALGEBRAIC("a masked position weighs nothing, not exp(-1e9); the mask is checked at a few sizes, not proved")
    phase: ClassVar[Phase] = "raise"

    def run(self, program: Program, context: Context) -> None:
        masks, editor = Masks(program), Editor(program)
        for node in list(program.graph.nodes):
            biases = _biases(node) if node.target in _FILLS else None
            if biases is None:
                continue
            keeps = node.target in _KEEPS
            low: Any = node.args[2]
            scores, mask = (node.args[1], node.args[0]) if keeps else node.args[:2]
            if scores.target in ZEROS:  # type: ignore[union-attr]
                continue  # the mask is added already
            try:
                _require_rows(low, dtype(node), masks.values(mask), keeps)  # type: ignore[arg-type]
                for bias in biases if low > -float("inf") else ():
                    _require_own_positions(masks.band(mask, keeps=keeps), masks.band(bias), node)  # type: ignore[arg-type]
            except Refused as refusal:
                context.refused(self, node, str(refusal))
                continue
            if context.admits(self, node):
                context.applied(self, node)
                op = editor.before(node)
                bias = additive_mask(op, mask, dtype(node), -float("inf"), keeps=keeps)
                program.replace(node, op.node(op.add(scores, bias)))


_KEEPS = {aten.where.ScalarOther, aten.where.self}
_FILLS = _KEEPS | {aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def _biases(node: fx.Node) -> list[fx.Node] | None:
    """What is added to the filled scores before softmax along the last axis, which nothing else reads; None otherwise."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target is aten.add.Tensor and not user.kwargs and all(isinstance(x, fx.Node) for x in user.args):
            further = _biases(user)
            if further is None:
                return None
            found += [*(x for x in user.all_input_nodes if x is not node), *further]
        elif user.target is not aten.softmax.int or normal(user)[1] != -1:
            return None
    return found if node.users else None


def _require_own_positions(mask: Band, other: Band, scores: fx.Node) -> None:
    """Two masks that keep every position's own leave something of every row."""
    require(mask.keeps_own and other.keeps_own, "two masks together may mask a row everywhere")
    require(same(*shape(scores)[-2:]), "two masks together may mask a row everywhere: there may be fewer keys than queries")


def _require_rows(low: Any, kind: torch.dtype, masks: list[Tensor], keeps: bool) -> None:
    require(isinstance(low, (int, float)), "what fills the masked scores is computed at run time")
    require(low <= max(LOW, torch.finfo(kind).min), f"masked scores are {low}: softmax may still see them")
    require(all(bool((mask if keeps else ~mask).any(-1).all()) for mask in masks), "a row is masked everywhere")
