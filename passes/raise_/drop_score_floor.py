"""Drop the floor under scores that are masked by adding a low number.

    softmax(max(s, low)) = softmax(s)        low as low as a masked score

It is there so that two masks do not overflow. Where a whole row is masked the weights are uniform with and without it:
a score drowns in the number that masks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import FORWARD
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require

from .add_filled_mask import LOW

aten = torch.ops.aten


class DropScoreFloor(Rule):
    """A floor under masked scores → none; see the module."""

    claim = FORWARD("none: a score drowns in the number that masks it; a row that is masked everywhere gets a gradient")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, s: Tensor, low: Scalar, merge: Operand, kind: Operand, device: Operand,
               pin: Operand) -> Operand:  # fmt: skip
        number = op(aten.full.default)([], low, dtype=kind, device=device, pin_memory=pin)
        floored = op.any_of(op(aten.max.other)(s, number), op.maximum(s, number), op(aten.clamp.default)(s, low))
        return op.softmax(op.any_of(floored, op.reshape(floored, merge)), -1)

    def where(self, m: Match) -> None:
        require(m.low <= LOW, f"scores below {m.low} would be seen")

    def after(self, op: Ops, s: Tensor, low: Scalar, merge: Operand, kind: Operand, device: Operand,
              pin: Operand) -> Operand:  # fmt: skip
        return op.softmax(s if merge is None else op.reshape(s, merge), -1)

    def samples(self) -> Iterator[dict[str, Any]]:
        literal = {"kind": torch.float64, "device": torch.device("cpu"), "pin": None}
        yield {"s": torch.randn(2, 3, 4, dtype=torch.float64), "low": -3.4028234663852886e38, "merge": [6, 4], **literal}
