"""An attention with a cache keeps the cache: heads stay packed, keys and values are joined inside, and a causal mask goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.rewrite.library import tautomer as ops

aten = torch.ops.aten
PASSES = ["add-mask-of-sizes", "move-transpose", "pack-cached-attention", "raise-cached-mask", "merge-views", "drop-dead-code"]


class Cached(nn.Module):
    """One attention of a decoder: four query heads, two key heads, a cache."""

    def __init__(self, returned: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, n) for n in (32, 16, 16))
        self.o = nn.Linear(32, 16)
        self.returned = returned

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        if mask is None:
            at = past_k.shape[2] + torch.arange(x.shape[1])[:, None]
            mask = torch.arange(k.shape[2]) <= at
        y = self.o(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2))
        return (y, k, v) if self.returned else (y,)


X, PAST = torch.randn(2, 5, 16), tuple(torch.randn(2, 2, 2, 3, 8).unbind())


def rewritten(model: nn.Module, *more: Tensor) -> tuple[tuple[object, ...] | None, str, nn.Module]:
    """The operands of the packed attention behind its caches, what was refused, and the module."""
    auto = torch.export.Dim.AUTO
    sizes = ({0: auto, 1: auto}, {0: auto, 2: auto}, {0: auto, 2: auto}, *(None for _ in more))
    fast = tautomer.optimize(model.eval(), (X, *PAST, *more), passes=PASSES, dynamic_shapes="static" if more else sizes)
    found = fast.graph.find_nodes(op="call_function", target=ops.cached_attention.v1)
    refused = "\n".join(refusal.reason for refusal in fast.report.log.refusals)
    return (found[0].args[5:] if found else None), refused, fast


@torch.no_grad()
def test_a_causal_mask_behind_the_past_goes() -> None:
    model = Cached()
    operands, _, fast = rewritten(model)
    assert operands == (None, 4, 2, True, None)
    calls = {node.target for node in fast.graph.nodes if node.op == "call_function"}
    assert not calls & {aten.transpose.int, aten.flatten.using_ints, aten.unflatten.int, aten.cat.default, aten.arange.default}
    for length, past in ((1, 6), (4, 0), (3, 1)):
        inputs = torch.randn(3, length, 16), *torch.randn(2, 3, 2, past, 8).unbind()
        for a, b in zip(fast(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_mask_of_the_user_stays() -> None:
    operands, refused, _ = rewritten(Cached(), torch.rand(2, 1, 5, 8) > 0.2)
    assert operands is not None and isinstance(operands[0], torch.fx.Node)
    assert "the mask depends on the input 'mask'" in refused


def test_a_cache_that_nobody_reads_is_refused() -> None:
    # ONNX Runtime has no kernel that takes a past and returns none.
    operands, refused, _ = rewritten(Cached(returned=False))
    assert operands is None and "nobody reads the cache" in refused
