"""Turn every LayerNorm that reads a residual stream into a CRMSNorm, and drop the last coordinate of the stream.

    x' = (x - mean(x))[..., :-1]          the last coordinate of a centred vector is minus the sum of the others
    LayerNorm(x; eps) = [n', -sum(n')],   n' = CRMSNorm(x'; eps) = x' / sqrt((sum(x'²) + (sum x')²)/d + eps)

Writers lose a row, W <- (W - mean(W))[:-1]; readers lose a column, W <- W[:, :-1] - W[:, -1:]. The same function, and its
gradients through the weight map; trained further it is another parametrization, so another trajectory.

arXiv:2305.14858.
"""

from __future__ import annotations

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.ops import Operand, Ops

from .compress_stream import Basis, CompressStream


class DroppedCoordinate(Basis):
    """All entries but the last."""

    def narrow(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        return op.slice(op.sub(x, op.mean(x, [axis], True)), axis, 0, d - 1)

    def widen(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        return op.cat([x, op.neg(op.sum(x, [axis], True))], axis)

    def read(self, op: Ops, W: Operand, d: int) -> Operand:
        return op.sub(op.slice(W, 1, 0, d - 1), op.slice(W, 1, d - 1, d))


class LayerNormToCrmsNorm(CompressStream):
    """Pre-LN → Pre-CRMSNorm; see the module."""

    claim = ALGEBRAIC("the mean and a coordinate are removed from the weights in float64 and rounded once")
    paper = "arXiv:2305.14858"
    basis = DroppedCoordinate()

    def norm(self, op: Ops, x: Operand, d: int, eps: float) -> Operand:
        return op.crms_norm(x, None, eps)
