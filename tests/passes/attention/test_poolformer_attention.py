"""On a grid it is the mixer of nn/poolformer.py, in a line a mean written out; what makes no grid is told how it might."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.nn.poolformer import PoolMixer
from tautomer.passes.attention.poolformer_attention import PoolformerAttention
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


class Attention(nn.Module):
    """Heads of keys that each serve two of the queries."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.kv, self.causal = nn.Linear(12, 16), nn.Linear(12, 16), causal

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True)

    def values(self, x: Tensor) -> Tensor:
        return self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)[1].repeat_interleave(2, 1)


def put(model: nn.Module, *args: Any, sizes: str = "static", **options: Any) -> Any:
    return tautomer.optimize(model, args, passes=[PoolformerAttention(architecture=True, **options)], dynamic_shapes=sizes)


@pytest.mark.parametrize(
    ("n", "grid", "prefix", "size"), [(9, None, 0, 3), (6, (2, 3), 0, 5), (17, None, 1, 3), (18, (4, 4), 2, 3)]
)
def test_on_a_grid_it_is_the_mixer(n: int, grid: tuple[int, int] | None, prefix: int, size: int) -> None:
    model, x = Attention().double().eval(), torch.randn(2, n, 12, dtype=F64)
    fast = put(model, x, grid=grid, prefix=prefix, size=size)
    assert fast.report.attentions[0].places[0].replaced, str(fast.report)
    v = model.values(x)
    image = v[:, :, prefix:].mT.unflatten(-1, grid or (-1, int((n - prefix) ** 0.5)))
    mixed = PoolMixer(size)(image.flatten(0, 1)).unflatten(0, (2, 4)).flatten(-2).mT
    first = v[:, :, prefix:].mean(2, keepdim=True) - v[:, :, :prefix]
    torch.testing.assert_close(fast(x), torch.cat([first, mixed], 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_in_a_line_it_is_the_mean_of_neighbours_of_any_length(causal: bool) -> None:
    model, x = Attention(causal).double().eval(), torch.randn(2, 9, 12, dtype=F64)
    fast = put(model, x, sizes="auto", grid=(), size=5)
    assert fast.report.attentions[0].places[0].replaced, str(fast.report)
    for length in (9, 2, 14):
        x = torch.randn(3, length, 12, dtype=F64)
        v = model.values(x)
        spans = [slice(max(0, i - 4), i + 1) if causal else slice(max(0, i - 2), i + 3) for i in range(length)]
        wanted = torch.stack([v[:, :, span].mean(2) for span in spans], 2) - v
        torch.testing.assert_close(fast(x), wanted, rtol=1e-12, atol=1e-12)
    still = put(model, x, sizes="auto", grid=(), size=1)
    assert still(x).abs().max() == 0


def test_in_a_line_padding_does_not_count() -> None:
    model, x, keep = Attention().double().eval(), torch.randn(2, 9, 12, dtype=F64), torch.arange(9) < torch.tensor([[9], [5]])
    fast = put(model, x, keep, grid=())
    alone = put(model, x[1:, :5], grid=())
    torch.testing.assert_close(fast(x, keep)[1, :, :5], alone(x[1:, :5])[0], rtol=1e-12, atol=1e-12)


def test_what_makes_no_grid_is_refused_with_what_might() -> None:
    def reason(n: int, **options: Any) -> str:
        model = Attention(options.pop("causal", False)).eval()
        return str(put(model, torch.randn(2, n, 12), **options).report.refusals[0].reason)

    advice = "4 × 4 of them are, and prefix=1 says that the first 1 stand before it (a class token)"
    assert reason(17) == f"its 17 positions are no square grid: {advice}"
    assert "prefix=2 says that the first 2" in reason(18, prefix=1)
    assert reason(15).endswith("grid=(height, width) says how they lie, grid=() takes them in a line")
    assert reason(17, grid=(4, 4)) == "its 17 positions are not 0 and 4 × 4 more"
    assert "it is causal, and a grid is seen whole" in reason(16, causal=True)
    assert "depends on the input" in reason(16, sizes="auto")
    for wrong in ({"size": 2}, {"grid": (3,)}, {"grid": (), "prefix": 1}):
        with pytest.raises(UsageError):
            PoolformerAttention(**wrong)
