"""Our own ops: what they compute, that they survive export and compilation, and that a body changes only with its version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.library import SEMANTIC, tautomer

BODIES = {
    "crms_norm.v1": "bbcf8e02bfc4",
    "add_layer_norm.v1": "dd94e88a6505",
    "add_rms_norm.v1": "e5987813643f",
}
"""torch.compile's disk cache knows an op by its name: if a hash here is wrong, give the op the next version."""


@pytest.mark.parametrize("op", SEMANTIC, ids=lambda op: op.name)
def test_a_body_changes_only_with_its_version(op: Any) -> None:
    assert BODIES.get(op.name) == sha256(inspect.getsource(op.body).encode()).hexdigest()[:12]


def test_every_op_is_listed() -> None:
    assert set(BODIES) == {op.name for op in SEMANTIC}


def test_crms_norm_is_the_rms_norm_of_the_whole_vector() -> None:
    x, g = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    wanted = F.rms_norm(whole, [8], eps=1e-2)[..., :-1] * g
    torch.testing.assert_close(tautomer.crms_norm.v1(x, g, 1e-2), wanted, rtol=1e-14, atol=1e-14)


def test_crms_norm_sums_half_precision_in_single() -> None:
    x = torch.full((1, 511), 300.0, dtype=torch.float16)
    assert torch.isfinite(tautomer.crms_norm.v1(x)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_sum_returns_the_norm_and_the_sum(bias: bool) -> None:
    x, r, g, b = (torch.randn(n, dtype=torch.float64) for n in ((2, 8), (2, 8), (8,), (8,)))
    normed, total = tautomer.add_layer_norm.v1(x, r, [8], g, b if bias else None, 1e-3)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, F.layer_norm(x + r, [8], g, b if bias else None, 1e-3))
    normed, total = tautomer.add_rms_norm.v1(x, r, [8], g, 1e-3)
    assert torch.equal(total, x + r)
    assert torch.equal(normed, F.rms_norm(x + r, [8], g, 1e-3))


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "crms_norm.v1": lambda x: tautomer.crms_norm.v1(x),
    "add_layer_norm.v1": lambda x: tautomer.add_layer_norm.v1(x, x.sin(), [8])[0],
    "add_rms_norm.v1": lambda x: tautomer.add_rms_norm.v1(x, x.sin(), [8])[1],
}


@pytest.mark.parametrize("op", SEMANTIC, ids=lambda op: op.name)
def test_an_op_survives_export_and_trains_exported_and_compiled(op: Any) -> None:
    module, x = Calls(CALLS[op.name]), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(module, (torch.randn(4, 8, dtype=torch.float64),))
    assert op.name in {str(node.target).removeprefix("tautomer.") for node in exported.graph.nodes}
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    for again in (exported.module(), torch.compile(module, fullgraph=True, backend="aot_eager")):
        (gradient,) = torch.autograd.grad(again(x).square().sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
