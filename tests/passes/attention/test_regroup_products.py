"""Keys meet values first where that is less to do, at any size; a softmax or a mask between the products keeps their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer

NAME = "regroup-products"
QKV = tuple(torch.randn(2, 24, 4, dtype=torch.float64) for _ in range(3))


class Core(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.body(q, k, v)


def regrouped(body: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: tuple[Tensor, ...] = QKV) -> tuple[nn.Module, nn.Module]:
    model = Core(body).eval()
    return model, tautomer.optimize(model, qkv, passes=[NAME])


@pytest.mark.parametrize(
    "body",
    [
        lambda q, k, v: q @ k.mT @ v,
        lambda q, k, v: (q @ k.transpose(-1, -2) / 24) @ v,
        lambda q, k, v: (q @ k.mT / q.shape[1]) @ v,
        lambda q, k, v: 0.5 * (q @ k.mT) @ v,
    ],
)
def test_it_is_the_same_and_linear_in_positions(body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model, fast = regrouped(body)
    assert fast.report.fired(NAME) == 1
    for n in (24, 2, 57):
        qkv = tuple(torch.randn(3, n, 4, dtype=torch.float64) for _ in range(3))
        torch.testing.assert_close(fast(*qkv), model(*qkv), rtol=1e-12, atol=1e-12)
    shapes = [node.meta["val"].shape[-2:] for node in fast.graph.nodes if node.target is torch.ops.aten.matmul.default]
    assert tuple(shapes[0]) == (4, 4)


@pytest.mark.parametrize(
    "body",
    [
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT).tril() @ v,
        lambda q, k, v: (q @ k.mT / (q @ k.mT).sum(-1, True)) @ v,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    ],
)
def test_what_is_not_linear_between_keeps_the_order(body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert not regrouped(body)[1].report.fired(NAME)


def test_few_positions_are_better_as_they_are() -> None:
    few = tuple(torch.randn(2, 3, 16, dtype=torch.float64) for _ in range(3))
    (refusal,) = regrouped(lambda q, k, v: q @ k.mT @ v, few)[1].report.refusals
    assert refusal.reason == "3 positions and 3 keys of 16 features: 288 products now, 1,536 then"


def test_scores_that_are_returned_too_stay() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            scores = q @ k.mT
            return scores @ v, scores

    assert not tautomer.optimize(Both().eval(), QKV, passes=[NAME]).report.fired(NAME)


def test_a_chain_of_layers_is_no_attention() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 4, 30)), nn.Parameter(torch.randn(2, 30, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a @ self.b

    fast = tautomer.optimize(Layers().eval(), (torch.randn(2, 50, 4),), passes=[NAME])
    assert not fast.report.fired(NAME) and "as a layer does" in fast.report.refusals[0].reason
