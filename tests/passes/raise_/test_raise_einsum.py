"""An einsum that is a batched product becomes one; any other stays."""

from __future__ import annotations

import pytest
import torch

from tautomer.passes.raise_.raise_einsum import RaiseEinsum
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

X = torch.randn(2, 6, 32)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bqhd,bkhd->bhqk", (2, 6, 4, 8), (2, 6, 4, 8)),
        ("b h q d, b h k d -> b h q k", (2, 4, 6, 8), (2, 4, 6, 8)),
        ("bhqk,bkhd->bqhd", (2, 4, 6, 6), (2, 6, 4, 8)),
        ("nij,njk->nki", (2, 6, 3), (2, 3, 5)),
        ("ij,jk->ik", (6, 3), (3, 5)),
    ],
)
def test_products(body, equation, left, right):
    def forward(m, x):
        x = x[0] if len(left) == 2 else x
        n = x.reshape(-1)[: torch.Size(left).numel()].view(left), x.reshape(-1)[: torch.Size(right).numel()].view(right)
        return torch.einsum(equation, *n)

    program, context = capture(body(forward).eval(), (torch.randn(2, 16, 32),)), Context()
    before = interpret(program, program.example, dtype=torch.float64)
    RaiseEinsum().run(program, context)
    assert len(context.log.applications) == 1
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bhqd,bhkd->bhk", "sums one operand alone|no batched product"),
        ("bhqd,bhqd->bhqd", "no batched product"),
        ("...qd,...kd->...qk", "no batched product"),
        ("bhqd,bhkd", "no batched product"),
        ("bhqd,bhkd->bhq", "no batched product|sums one"),
    ],
)
def test_others_stay(raised, body, equation, reason):
    done = raised(body(lambda m, x: (lambda q, k, v: torch.einsum(equation, q, k))(*m.heads(x))), X)
    assert done.count("einsum") == 1
    assert any(part in r for r in done.reasons for part in reason.split("|")), done.reasons


def test_token_first_attention(raised, body):
    def forward(m, x):
        q, k, v = (y.transpose(1, 2) for y in m.heads(x))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(8**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    done = raised(body(forward), X)
    assert len(done.attentions) == 1 and done.count("einsum") == 0
    assert done.count("permute") + done.count("transpose") <= 4, done.program
