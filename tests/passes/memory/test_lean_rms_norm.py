"""An RMSNorm on a CPU keeps its input and a number per row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tautomer
from tautomer.passes.memory.lean_rms_norm import LeanRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.pass_base import Context


class Norm(nn.Module):
    def __init__(self, shape, eps, affine=True):
        super().__init__()
        self.first, self.norm = nn.Linear(7, 7), nn.RMSNorm(shape, eps, affine)

    def forward(self, x):
        return self.norm(self.first(x))


@pytest.mark.parametrize("eps", [None, 1e-2])
def test_what_is_kept(eps):
    model, x = Norm(7, eps), torch.randn(4, 3, 7) * 1e-3
    fast = tautomer.optimize(model, (x,), passes=[LeanRmsNorm()])
    assert fast.report.fired("lean-rms-norm") == 1 and fast.report.evidence.gradient <= 1e-10
    assert tautomer.saved_tensors(fast).bytes == 4 * 12 * (7 + 7 + 1) < tautomer.saved_tensors(model, (x,)).bytes


def test_without_a_gain_nothing_would_be_freed():
    model, x = Norm(7, 1e-2, affine=False), torch.randn(12, 7)
    fast = tautomer.optimize(model, (x,), passes=[LeanRmsNorm()])
    assert [r.reason for r in fast.report.refusals] == ["without a gain it keeps no more than that"]
    assert tautomer.saved_tensors(model, (x,)).bytes == 4 * 12 * (7 + 7 + 1)


def test_two_axes_are_refused():
    fast = tautomer.optimize(Norm([3, 7], None), (torch.randn(4, 3, 7),), passes=[LeanRmsNorm()])
    assert [r.reason for r in fast.report.refusals] == ["it norms over 2 axes, the lean one over the last alone"]


def test_another_device_has_a_kernel():
    program, context = capture(Norm(7, None).to("meta"), (torch.randn(4, 7, device="meta"),)), Context(check=False)
    LeanRmsNorm().run(program, context)
    assert [r.reason for r in context.log.refusals] == ["the kernel of meta keeps no more than that"]
