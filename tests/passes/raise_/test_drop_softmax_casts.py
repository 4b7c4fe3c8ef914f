"""A softmax in float32 between half-precision scores and weights is the kernel's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.drop_softmax_casts import DropSoftmaxCasts
from tautomer.rewrite.capture import capture
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten
HALF = torch.bfloat16


def run(function, dtype=HALF):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    program, context = capture(Model(), (torch.randn(3, 4, dtype=dtype),)), Context()
    DropSoftmaxCasts().run(program, context)
    return program, context.log


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float().softmax(-1).to(HALF),
        lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype),
        lambda x: torch.softmax(x.float(), -1).type_as(x),
    ],
)
def test_casts_go(function):
    program, log = run(function)
    assert len(log.applications) == 1
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.softmax.int]


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: x.float().softmax(-1), HALF),
        (lambda x: x.double().softmax(-1).to(HALF), HALF),
        (lambda x: x.float().softmax(-1).to(torch.float16), HALF),
        (lambda x: x.softmax(-1).to(HALF), torch.float32),
        (lambda x: (x.float() * 2).softmax(-1).to(HALF), HALF),
    ],
)
def test_other_casts_stay(function, dtype):
    _, log = run(function, dtype)
    assert not log.applications
