"""The orthonormal basis, and the norm in it. What happens to a model is in test_compress_stream.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tautomer.passes.norm.layer_norm_to_narrow_rms_norm import LayerNormToNarrowRmsNorm, Reflected
from tautomer.rewrite.ops import TorchOps

OP, D = TorchOps(), 8
X = torch.randn(3, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CENTRED = X - X.mean(-1, keepdim=True)


def test_widen_undoes_narrow_up_to_the_mean_and_lengths_stay() -> None:
    for axis, x in ((-1, X), (1, X.transpose(1, 2))):
        narrow, centred = Reflected().narrow(OP, x, axis, D), x - x.mean(axis, keepdim=True)
        torch.testing.assert_close(Reflected().widen(OP, narrow, axis, D), centred, rtol=0, atol=1e-14)
        torch.testing.assert_close(narrow.norm(dim=axis), centred.norm(dim=axis), rtol=1e-14, atol=0)


def test_the_map_is_the_reflection() -> None:
    v = torch.full((D,), D**-0.5, dtype=torch.float64)
    v[-1] -= 1
    H = torch.eye(D, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)
    torch.testing.assert_close(Reflected().narrow(OP, X, -1, D), (X @ H)[..., :-1], rtol=0, atol=1e-14)
    W = torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(Reflected().read(OP, W, D), (W @ H)[:, :-1], rtol=0, atol=1e-14)


def test_the_norm_is_the_layer_norm_in_this_basis() -> None:
    rewrite = LayerNormToNarrowRmsNorm()
    for scale in (1.0, 1e-3):
        normed = rewrite.norm(OP, Reflected().narrow(OP, scale * X, -1, D), D, 1e-5)
        wanted = F.layer_norm(scale * X, [D], eps=1e-5)
        torch.testing.assert_close(Reflected().widen(OP, normed, -1, D), wanted, rtol=0, atol=1e-13)
