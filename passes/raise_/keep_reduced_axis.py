"""One spelling for a reduction over the last axis that broadcasts against what it reduces.

unsqueeze(mean(x, -1), -1) = mean(x, -1, keepdim=True)            and sum, |x|, var and max likewise
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Operand, Ops, Rule, Tensor


class KeepReducedAxis(Rule):
    """A reduction and an axis of one → a reduction that keeps its axis; see the module."""

    claim = BITWISE("none: the axis is kept instead of put back")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, mean: Tensor, sum: Tensor, vector_norm: Tensor, amax: Tensor, var: Tensor, n: Operand) -> Operand:
        reduced = (op.mean(mean, [-1]), op.sum(sum, [-1]), op.vector_norm(vector_norm, 2, [-1]), op.amax(amax, [-1]),
                   op.var(var, [-1], correction=n))  # fmt: skip
        return op.any_of(*(op.unsqueeze(x, -1) for x in reduced))

    def after(self, op: Ops, mean: Tensor, sum: Tensor, vector_norm: Tensor, amax: Tensor, var: Tensor, n: Operand) -> Operand:
        if mean is not None:
            return op.mean(mean, [-1], True)
        if sum is not None:
            return op.sum(sum, [-1], True)
        if vector_norm is not None:
            return op.vector_norm(vector_norm, 2, [-1], True)
        return op.var(var, [-1], correction=n, keepdim=True) if amax is None else op.amax(amax, [-1], True)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        yield {**dict.fromkeys(("mean", "sum", "vector_norm", "amax", "var"), x), "n": 0}
