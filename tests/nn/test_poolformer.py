"""The mixer against a convolution, and the block against the one that Hugging Face has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PoolFormerConfig
from transformers.models.poolformer.modeling_poolformer import PoolFormerLayer

from tautomer.nn.poolformer import PoolFormerBlock, PoolMixer
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_mixer_is_a_convolution_over_what_is_there_less_the_pixel(size: int) -> None:
    x, kernel = torch.randn(2, 4, 6, 3, dtype=F64), torch.ones(4, 1, size, size, dtype=F64)
    total, count = (F.conv2d(y, kernel, padding=size // 2, groups=4) for y in (x, torch.ones_like(x)))
    torch.testing.assert_close(PoolMixer(size)(x), total / count - x, rtol=1e-12, atol=1e-12)
    assert size > 1 or not PoolMixer(size)(x).any()
    assert PoolMixer(size)(torch.full_like(x, 3.7)).abs().max() < 1e-14


def test_the_block_is_that_of_the_paper() -> None:
    theirs = PoolFormerLayer(PoolFormerConfig(), 8, 3, 8, 20, 0.0).double().eval()
    ours = PoolFormerBlock(8, 20).double()
    pairs = {"norms.0": "before_norm", "norms.1": "after_norm", "up": "output.conv1", "down": "output.conv2"}
    with torch.no_grad():
        for p in theirs.parameters():
            nn.init.normal_(p)
        for mine, other in pairs.items():
            ours.get_submodule(mine).load_state_dict(theirs.get_submodule(other).state_dict())
        ours.scales.copy_(torch.stack([theirs.layer_scale_1, theirs.layer_scale_2])[:, :, None, None])
    x = torch.randn(2, 8, 5, 6, dtype=F64)
    wanted = theirs(x)
    torch.testing.assert_close(ours(x), wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-12, atol=1e-12)
    assert PoolFormerBlock(8, 20).scales.amax().item() == pytest.approx(1e-5)


def test_neighbours_have_a_middle() -> None:
    with pytest.raises(UsageError, match="size=4"):
        PoolMixer(4)
