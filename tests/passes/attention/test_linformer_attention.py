"""Exact where keys and values are constant in segments, and where every position has a slot of its own; E and F train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.linformer_attention import LinformerAttention
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    return q, k, v


def segments(longest: int, slots: int) -> Tensor:
    return (torch.arange(longest)[:, None] * slots // longest == torch.arange(slots)).double()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)


def test_a_slot_for_every_position_is_attention_in_any_order() -> None:
    q, k, v = heads(9)
    order = torch.eye(9, dtype=torch.float64)[torch.randperm(9)]
    found = ops.linformer_attention.v1(q, k, v, order, order, None, 0.3)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [3, 15, 16])
def test_segments_of_equal_keys_are_exact_of_any_length_and_padded(n: int) -> None:
    q, k, v = heads(16)
    segment = torch.arange(16) * 5 // 16
    q, k, v = q[:, :, :n], k[:, :, segment][:, :, :n], v[:, :, segment][:, :, :n]
    keep = torch.rand(2, 1, 1, n) > 0.3
    keep[..., 0] = True
    E = segments(16, 5)
    torch.testing.assert_close(ops.linformer_attention.v1(q, k, v, E, E, None, 0.3), attend(q, k, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ops.linformer_attention.v1(q, k, v, E, E, keep, 0.3), attend(q, k, v, keep), rtol=1e-12, atol=1e-12
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, bias[:, None, None])


def test_new_parameters_stand_in_the_state_dict_and_train() -> None:
    x, keep = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    fast = tautomer.optimize(Attention().train(), (x, keep), passes=[LinformerAttention(3, longest=12, architecture=True)])
    assert {name: p.shape for name, p in fast.named_parameters() if len(name) == 1} == {"E": (12, 3), "F": (12, 3)}
    assert "72 parameters more" in fast.report.applications[0].note and "train it" in str(fast.report)
    fast(x, keep).sum().backward()
    assert all(bool(parameter.grad.any()) for name, parameter in fast.named_parameters() if len(name) == 1)
    model = Attention()
    assert set(fast.weights.to_original(fast.state_dict())) == set(model.state_dict())
    assert set(fast.weights.from_original(model.state_dict())) == set(fast.state_dict())


def test_numbers_for_padding_and_too_many_positions_are_refused() -> None:
    x = torch.randn(2, 9, 8)
    added = tautomer.optimize(Attention().eval(), (x, torch.zeros(2, 9)), passes=[LinformerAttention(3, architecture=True)])
    assert "numbers are added to its scores key by key" in added.report.refusals[0].reason
    given = (x, torch.ones(2, 9, dtype=torch.bool))
    made = LinformerAttention(3, longest=8, architecture=True)
    long = tautomer.optimize(Attention().eval(), given, passes=[made], dynamic_shapes="static")
    assert "its 9 positions are more than the 8" in long.report.refusals[0].reason
    with pytest.raises(UsageError, match="9 slots for 8 positions"):
        LinformerAttention(9, longest=8)
