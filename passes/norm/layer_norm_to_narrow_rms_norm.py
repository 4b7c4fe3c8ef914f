"""Turn every LayerNorm that reads a residual stream into a stock RMSNorm over one coordinate less.

    H = I - β v vᵀ,  v = 1/√d - e_d,  β = 1/(1 - 1/√d)         the reflection that takes 1/√d to e_d
    x' = (H x)[..., :-1]                                        lengths of centred vectors stay: |x'| = |P x|
    LayerNorm(x; eps) = H [√(d/(d-1)) RMSNorm(x'; eps·d/(d-1)), 0]

H is applied to the weights that write and read the stream, and the factor is the gain of the norm. Unlike dropping a coordinate
(``layer_norm_to_crms_norm``) this basis is orthonormal, so that SGD follows the original's trajectory; and the norm is a stock
one. It rotates weights: zeros and quantization ranges do not survive.

arXiv:2305.14858 removes the mean; the basis is ours.
"""

from __future__ import annotations

from math import sqrt

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.ops import Operand, Ops

from .compress_stream import Basis, CompressStream


class Reflected(Basis):
    """The first d - 1 entries after the reflection H."""

    def narrow(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        along = op.sub(op.mul(op.sum(x, [axis], True), 1 / sqrt(d)), op.slice(x, axis, d - 1, d))  # v · x
        return op.sub(op.slice(x, axis, 0, d - 1), op.mul(along, 1 / (sqrt(d) - 1)))

    def widen(self, op: Ops, x: Operand, axis: int, d: int) -> Operand:
        last = op.mul(op.sum(x, [axis], True), 1 / sqrt(d))
        return op.cat([op.sub(x, op.mul(last, 1 / (sqrt(d) - 1))), last], axis)

    def read(self, op: Ops, W: Operand, d: int) -> Operand:
        return self.narrow(op, W, 1, d)  # H is symmetric


class LayerNormToNarrowRmsNorm(CompressStream):
    """Pre-LN → Pre-RMSNorm over d - 1 coordinates; see the module."""

    claim = ALGEBRAIC("the reflection is applied to the weights in float64 and rounded once")
    paper = "arXiv:2305.14858"
    basis = Reflected()

    def norm(self, op: Ops, x: Operand, d: int, eps: float) -> Operand:
        return op.rms_norm(x, [d - 1], op.filled(d - 1, sqrt(d / (d - 1)), x), eps * d / (d - 1))
