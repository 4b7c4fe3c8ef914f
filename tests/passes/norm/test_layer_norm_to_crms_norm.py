"""The basis of all coordinates but the last, and the norm in it. What happens to a model is in test_compress_stream.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tautomer.passes.norm.layer_norm_to_crms_norm import DroppedCoordinate, LayerNormToCrmsNorm
from tautomer.rewrite.ops import TorchOps

OP, D = TorchOps(), 8
X = torch.randn(3, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CENTRED = X - X.mean(-1, keepdim=True)


def test_widen_undoes_narrow_up_to_the_mean() -> None:
    for axis, x in ((-1, X), (1, X.transpose(1, 2))):
        wide = DroppedCoordinate().widen(OP, DroppedCoordinate().narrow(OP, x, axis, D), axis, D)
        torch.testing.assert_close(wide, x - x.mean(axis, keepdim=True), rtol=0, atol=1e-14)


def test_a_reader_sees_the_same_through_its_narrow_weight() -> None:
    W = torch.randn(5, D, dtype=torch.float64)
    narrow = F.linear(DroppedCoordinate().narrow(OP, X, -1, D), DroppedCoordinate().read(OP, W, D))
    torch.testing.assert_close(narrow, F.linear(CENTRED, W), rtol=0, atol=1e-13)


def test_the_norm_is_the_layer_norm_in_this_basis() -> None:
    rewrite = LayerNormToCrmsNorm()
    for scale in (1.0, 1e-3):
        normed = rewrite.norm(OP, DroppedCoordinate().narrow(OP, scale * X, -1, D), D, 1e-5)
        wanted = F.layer_norm(scale * X, [D], eps=1e-5)
        torch.testing.assert_close(DroppedCoordinate().widen(OP, normed, -1, D), wanted, rtol=0, atol=1e-13)
