"""One block, one leaf, or a sample of every key once, is attention; samples are counted once and weigh what they stand for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.hyper_attention import HyperAttention
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops
from tautomer.rewrite.subset_attention import _hash, _reduced, _weights


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    return q, k, v


PLANES = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DRAWS = torch.randint(2**40, (4, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("n", "leaf", "causal", "padded"), list(product((1, 5, 12, 13), (2, 16), (True, False), (True, False))))
def test_blocks_as_long_as_what_they_see_are_attention(n: int, leaf: int, causal: bool, padded: bool) -> None:
    q, k, v = heads(n)
    keep = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
    mask = torch.rand(2, 1, 1, n) > 0.3 if padded else None
    if mask is not None:
        mask[..., 0] = True
        keep = keep & mask
    wanted = F.scaled_dot_product_attention(q, k, v, keep, scale=0.3, enable_gqa=True)
    found = ops.hyper_attention.v3(q, k, v, PLANES, DRAWS, mask, 0.3, 16, leaf, 64, causal)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_a_sample_of_every_key_once_is_attention(block: int) -> None:
    q, k, v = heads(13)
    everyone = torch.stack([torch.randperm(13) for _ in range(4)])
    found = ops.hyper_attention.v3(q, k, v, PLANES, everyone, None, 0.3, block, 2, 64, False)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_sample_weighs_what_it_stands_for() -> None:
    """With q = 0 every key weighs 1: block b and m draws of n keys estimate a mean, without bias."""
    q, k, v = heads(12)
    found = torch.zeros(2, 4, 12, 6, dtype=torch.float64)
    for seed in range(200):
        draws = torch.randint(2**40, (4, 12), generator=torch.Generator().manual_seed(seed))
        found += ops.hyper_attention.v3(q * 0, k, v, PLANES, draws, None, 0.3, 3, 2, 64, False) / 200
    wanted = v.repeat_interleave(2, 1).mean(2, keepdim=True).expand(found.shape)
    assert float((found - wanted).norm() / wanted.norm()) < 0.15


def test_neighbouring_hashes_differ_in_one_sign() -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 7)
    order = _hash(signs, torch.eye(7)).argsort()
    assert sorted(_hash(signs, torch.eye(7)).tolist()) == list(range(128))
    assert ((signs[order][1:] != signs[order][:-1]).sum(-1) == 1).all()


def test_no_block_is_wrong() -> None:
    with pytest.raises(UsageError, match="block is 0"):
        HyperAttention(block=0)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _reduced(x.sum(-1, keepdim=True)), *_weights(x)


def test_sums_over_nothing_have_their_shape_on_onnx_runtime(tmp_path: Path) -> None:
    """A level that is longer than the sequence has no pieces."""
    path = tmp_path / "sums.onnx"
    tautomer.export_onnx(Sums().eval(), path, (torch.randn(2, 3, 7),), check=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (0, 2):
        x = torch.randn(batch, 3, 7)
        for found, wanted in zip(session.run(None, {"x": x.numpy()}), Sums()(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


def test_what_exponentials_sum_to_is_read_off_the_softmax() -> None:
    logits = torch.randn(5, 700, dtype=torch.float64) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]
    logits[0], logits[1, 1:] = -1e30, -1e30
    weights, mass = _weights(logits)
    torch.testing.assert_close(mass, logits.logsumexp(-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weights, logits.softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-7])
def test_their_gradient_is_the_softmax_also_where_a_rounding_tells_logits_apart(scale: float) -> None:
    logits = (scale * torch.randn(5, 70)).requires_grad_()
    weights, mass = _weights(logits)
    (gradient,) = torch.autograd.grad(mass.sum(), logits)
    torch.testing.assert_close(gradient, weights, rtol=1e-3, atol=1e-6)
