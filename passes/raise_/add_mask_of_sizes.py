"""Add a mask to the scores of a softmax instead of filling it in, where it is computed from sizes alone.

    softmax(where(keep, s, -1e9)) = softmax(s + where(keep, 0, -inf))        every row keeps something

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
from tautomer.rewrite.masks import LOW, Masks
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import dtype

from .spellings import additive_mask

aten = torch.ops.aten


class AddMaskOfSizes(Pass):
    """A filled mask of sizes alone → a mask that is added; see the module."""

    claim = ALGEBRAIC("a masked position weighs nothing, not exp(-1e9); the mask is checked at a few sizes, not proved")
    phase: ClassVar[Phase] = "raise"

    def run(self, program: Program, context: Context) -> None:
        masks, editor = Masks(program), Editor(program)
        for node in list(program.graph.nodes):
            if node.target not in _FILLS or not _under_softmax(node):
                continue
            keeps = node.target in _KEEPS
            scores, mask = (node.args[1], node.args[0]) if keeps else node.args[:2]
            try:
                _require_rows(_number(node), dtype(node), masks.values(mask), keeps)  # type: ignore[arg-type]
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


def _under_softmax(node: fx.Node) -> bool:
    """Whether nothing but softmax along the last axis reads the filled scores."""
    return bool(node.users) and all(user.target is aten.softmax.int and normal(user)[1] == -1 for user in node.users)


def _require_rows(low: float | None, kind: torch.dtype, masks: list[Tensor], keeps: bool) -> None:
    require(low is not None, "what fills the masked scores is computed at run time")
    assert low is not None
    require(low <= max(LOW, torch.finfo(kind).min), f"masked scores are {low}: softmax may still see them")
    require(all(bool((mask if keeps else ~mask).any(-1).all()) for mask in masks), "a row is masked everywhere")


def _number(node: fx.Node) -> float | None:
    number: Any = node.args[2]
    if isinstance(number, fx.Node):
        number = number.args[1] if number.target is aten.full.default else None
    return float(number) if isinstance(number, (int, float)) else None
