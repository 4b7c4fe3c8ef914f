"""What ``prescale-rms-norm`` has of its own; the errors in float16 are in test_prescale_layer_norm.py."""

from __future__ import annotations

import torch
from torch import nn

import tautomer

aten = torch.ops.aten


def test_an_rms_norm_with_the_default_eps_of_its_dtype_is_refused() -> None:
    """eps=None means another number in another dtype: what the scale needs is not written in the graph."""
    fast = tautomer.optimize(nn.RMSNorm(12).eval(), (torch.randn(3, 12),), passes=["prescale-rms-norm"])
    assert not fast.report.applications
    assert "eps is None" in fast.report.refusals[0].reason


def test_no_mean_is_taken_of_the_input() -> None:
    fast = tautomer.optimize(nn.RMSNorm(12, eps=1e-6).eval(), (torch.randn(3, 12),), passes=["prescale-rms-norm"])
    (mean,) = fast.graph.find_nodes(op="call_function", target=aten.mean.dim)
    assert mean.args[0].target is aten.mul.Tensor  # of the squares
