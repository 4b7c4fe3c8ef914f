"""A window over everything is the model; on a trained one, window and kernel beat the window alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.hybrid_attention import HybridAttention
from tautomer.passes.attention.transfer import Transfer
from tautomer.passes.attention.window_attention import WindowAttention
from tautomer.rewrite.errors import UsageError


class Attention(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.q, self.kv, self.causal = nn.Linear(8, 16), nn.Linear(8, 16), causal

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=0.8, enable_gqa=True)


@pytest.mark.parametrize("terraced", [False, True])
def test_a_window_over_everything_is_the_model(terraced: bool) -> None:
    model, x = Attention().double(), torch.randn(2, 9, 8, dtype=torch.float64)
    fast = tautomer.optimize(model, (x,), passes=[HybridAttention(9, terraced=terraced, architecture=True)])
    assert len(fast.report.applications) == 1
    torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    names, seed = [name for name, _ in model.named_parameters()], torch.randn_like(model(x))
    of = lambda m: torch.autograd.grad((m(x) * seed).sum(), [m.get_parameter(name) for name in names])  # noqa: E731
    for found, wanted in zip(of(fast), of(model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    near = tautomer.optimize(model, (x,), passes=[HybridAttention(3, terraced=terraced, architecture=True)])
    assert (near(x) - model(x)).abs().max() > 1e-3


def test_what_sees_the_future_is_refused() -> None:
    fast = tautomer.optimize(Attention(False), (torch.randn(2, 9, 8),), passes=[HybridAttention(3, architecture=True)])
    assert "it is not causal" in fast.report.refusals[0].reason


def test_a_window_holds_a_position() -> None:
    with pytest.raises(UsageError, match="window is 0"):
        HybridAttention(0)


@pytest.mark.zoo
def test_on_a_trained_model_it_learns_to_beat_its_window(byte_lm: nn.Module, held_out: Tensor) -> None:
    from train_byte_lm import corpus, windows

    call: Callable[[Tensor], dict[str, Any]] = lambda ids: {"input_ids": ids, "use_cache": False}  # noqa: E731
    data = [call(ids) for ids in windows(corpus(held_out=False), 70, 8, seed=5)]
    ids = torch.cat(list(windows(held_out, 4, 32, seed=1)))

    def nats(model: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(**call(ids)).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    hybrid = HybridAttention(16, transfer=Transfer(steps=60))
    found = {
        type(rewrite): nats(tautomer.optimize(byte_lm, (), data[0], passes=[rewrite], data=data, check=False))
        for rewrite in (hybrid, WindowAttention(16, sinks=0))
    }
    assert nats(byte_lm) < found[HybridAttention] < found[WindowAttention]
