"""A vector over its length is one op, and QKNorm keeps two of them in front of its attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.raise_.raise_attention import RaiseAttention
from tautomer.passes.raise_.raise_normalize import RaiseNormalize
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(3.0))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def run(forward, *rules, dtype=torch.float32):
    program, context = capture(Function(forward).to(dtype).eval(), (torch.randn(3, 5, 8, dtype=dtype),)), Context()
    original = program.copy()
    apply_rules((RaiseNormalize(), *rules), program, context)
    check_program(original, program, ALGEBRAIC)
    return program.graph.find_nodes(op="call_function", target=tautomer.normalize.v1), program, context.log


SPELLINGS = {
    "F.normalize": (lambda m, x: F.normalize(x, dim=-1), 1e-12),
    "clamp": (lambda m, x: x / x.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-6), 1e-6),
    "clamp_min": (lambda m, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6), 1e-6),
    "CLIP": (lambda m, x: x / x.norm(p=2, dim=-1, keepdim=True), 0.0),
    "root": (lambda m, x: x / x.square().sum(-1, keepdim=True).sqrt(), 0.0),
}


@pytest.mark.parametrize(("forward", "eps"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_spelling_becomes_one_op(forward, eps, dtype):
    (node,), program, _ = run(forward, dtype=dtype)
    assert node.args[1] == eps
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1


NEAR_MISSES = {
    "another axis": lambda m, x: F.normalize(x, dim=1),
    "another norm": lambda m, x: F.normalize(x, p=1, dim=-1),
    "eps added": lambda m, x: x / (x.norm(dim=-1, keepdim=True) + 1e-6),
    "capped": lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6, max=2.0),
    "another tensor": lambda m, x: x.tanh() / x.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    nodes, _, log = run(forward)
    assert not nodes and not log.applications


def test_qknorm_is_two_norms_and_an_attention():
    """arXiv:2010.04245: one learned scalar in the place of 1/sqrt(d)."""

    def forward(m, x):
        q, k = (F.normalize(y, dim=-1) for y in x.unflatten(-1, (2, 4)).transpose(1, 2).split([2, 2], dim=-1))
        return (m.g * (q @ k.transpose(-2, -1))).softmax(-1) @ k

    nodes, program, _ = run(forward, RaiseAttention())
    assert len(nodes) == 2 and program.count(aten.scaled_dot_product_attention.default) == 1
