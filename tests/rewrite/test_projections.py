"""Which rows of one layer q, k and v are, however they were fused, and what is a projection of the same tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.projections import origin, projected, rows

B, H, D = 2, 3, 4
N = H * D


class Fused(nn.Module):
    def __init__(self, split, outputs=3 * N):
        super().__init__()
        self.qkv, self.other, self.split = nn.Linear(N, outputs), nn.Linear(N, N), split

    def forward(self, x):
        return self.split(self, self.qkv(x))


def outputs(split, features=3 * N):
    program = capture(Fused(split, features).eval(), (torch.randn(B, 5, N),))
    return program.output.args[0]


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def interleaved(m, y):
    """GPT-NeoX: q, k and v of one head stand side by side."""
    return y.view(*y.shape[:-1], H, 3 * D).transpose(1, 2).chunk(3, dim=-1)


def grouped(m, y):
    """Falcon with one key head for all queries."""
    y = y.view(*y.shape[:-1], H + 2, D)
    return y[..., :-2, :], y[..., [-2], :], y[..., -1:, :]


ONE_BY_ONE = {
    "gpt2": lambda m, y: tuple(heads(x) for x in y.split(N, dim=2)),
    "chunk": lambda m, y: y.chunk(3, -1),
    "timm": lambda m, y: y.reshape(y.shape[0], y.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0),
    "slices": lambda m, y: (y[..., :N], y[..., N : 2 * N], y[..., 2 * N :]),
    "select": lambda m, y: tuple(y.unflatten(-1, (3, N)).select(2, i) for i in range(3)),
}


@pytest.mark.parametrize("split", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_one_after_the_other(split):
    parts = [rows(x) for x in outputs(split)]
    assert [part.rows for part in parts] == [tuple(range(i * N, (i + 1) * N)) for i in range(3)]
    assert len({part.layer for part in parts}) == 1


def test_head_by_head():
    q, k, v = (rows(x).rows for x in outputs(interleaved))
    assert q == (0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27)
    assert k == tuple(i + D for i in q) and v == tuple(i + 2 * D for i in q)


def test_one_key_head():
    """A list of heads is a gather, no view."""
    q, k, v = (rows(x) for x in outputs(grouped, (H + 2) * D))
    assert q.rows == tuple(range(N)) and k is None and v.rows == tuple(range(N + D, N + 2 * D))


def test_a_value_that_was_computed_is_no_view():
    q, *_ = outputs(lambda m, y: (y.chunk(3, -1)[0].tanh(), y))
    assert rows(q) is None and origin(q).target is torch.ops.aten.tanh.default


def test_projections_of_one_tensor_are_told_from_others():
    x, y, z = outputs(lambda m, y: (m.other(y[..., :N]), m.qkv(y[..., :N]).chunk(3, -1)[0], m.other(y[..., :N].tanh())))
    assert projected(x, y) and not projected(x, z)
