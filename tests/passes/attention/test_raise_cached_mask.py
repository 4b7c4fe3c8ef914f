"""Beside a cache, a mask of sizes alone becomes a flag where it is causal behind the past, and nothing where it is full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.library import tautomer as ops

AUTO = torch.export.Dim.AUTO
SIZES = ({0: AUTO, 1: AUTO}, {0: AUTO, 2: AUTO})


def at(t: int, p: int) -> tuple[Tensor, Tensor]:
    """The positions of the queries and of the keys."""
    return p + torch.arange(t)[:, None], torch.arange(p + t)


MASKS = {
    "causal": lambda q, k: k <= q,
    "added": lambda q, k: torch.zeros(()).expand(q.shape[0], k.shape[0]).masked_fill(k > q, -torch.inf),
    "full": lambda q, k: (k >= 0).expand(q.shape[0], k.shape[0]),
    "window": lambda q, k: (k <= q) & (k > q - 2),
    "ahead": lambda q, k: k <= q + 1,
    "one row": lambda q, k: k[None] <= k.shape[0],
}


class Cached(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = MASKS[mask]

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        mask = self.mask(*at(x.shape[1], past.shape[2]))
        result: tuple[Tensor, ...] = ops.cached_attention.v1(x, x, x.sin(), past, past, mask, 2, 2)
        return result


def raised(mask: str) -> tuple[object, object, str]:
    """The mask and the flag afterwards, and what was refused."""
    model, inputs = Cached(mask).eval(), (torch.randn(2, 5, 8), torch.randn(2, 2, 3, 4))
    fast = tautomer.optimize(model, inputs, passes=["raise-cached-mask", "drop-dead-code"], dynamic_shapes=SIZES)
    for t, p in ((5, 3), (1, 4), (4, 0)):
        call = torch.randn(3, t, 8), torch.randn(3, 2, p, 4)
        for a, b in zip(fast(*call), model(*call), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (node,) = fast.graph.find_nodes(op="call_function", target=ops.cached_attention.v1)
    causal = node.args[8] if len(node.args) > 8 else False
    return node.args[5], causal, "\n".join(refusal.reason for refusal in fast.report.log.refusals)


@pytest.mark.parametrize(("mask", "causal"), [("causal", True), ("added", True), ("full", False), ("one row", False)])
def test_it_goes(mask: str, causal: bool) -> None:
    assert raised(mask) == (None, causal, "")


@pytest.mark.parametrize(
    ("mask", "sentence"), [("window", "a window of 2 behind the past"), ("ahead", "a band of None before and 1 after behind")]
)
def test_it_stays(mask: str, sentence: str) -> None:
    node, causal, refused = raised(mask)
    assert isinstance(node, torch.fx.Node) and causal is False and sentence in refused


def test_positions_count_from_the_end_of_the_past() -> None:
    # Counted from the first key, as scaled_dot_product_attention counts, the mask is a triangle too, and another one.
    class Start(nn.Module):
        def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
            mask = torch.arange(past.shape[2] + x.shape[1]) <= torch.arange(x.shape[1])[:, None]
            result: tuple[Tensor, ...] = ops.cached_attention.v1(x, x, x, past, past, mask, 2, 2)
            return result

    inputs = torch.randn(2, 5, 8), torch.randn(2, 2, 3, 4)
    fast = tautomer.optimize(Start().eval(), inputs, passes=["raise-cached-mask"], dynamic_shapes=SIZES)
    assert fast.report.fired("raise-cached-mask") == 0
