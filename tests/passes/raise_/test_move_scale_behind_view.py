"""A number before a view stands behind it, where the reader of the view finds it."""

from __future__ import annotations

import pytest
import torch

from tautomer.passes.raise_.move_scale_behind_view import MoveScaleBehindView

X = torch.randn(2, 6, 32)


@pytest.mark.parametrize(
    "view",
    [
        lambda y, b, n: y.view(b, n, 4, 8),
        lambda y, b, n: y.transpose(1, 2),
        lambda y, b, n: y.permute(2, 0, 1),
        lambda y, b, n: y.unsqueeze(1),
        lambda y, b, n: y.view(b, n, 4, 8).permute(0, 2, 3, 1),
        lambda y, b, n: y.unflatten(-1, (4, 8)),
        lambda y, b, n: y.unflatten(-1, (4, 8)).transpose(1, 2),
    ],
)
def test_the_number_is_last(raised, body, view):
    for scaled in (lambda y: y * 0.25, lambda y: y / 3):
        done = raised(body(lambda m, x, s=scaled: view(s(m.q(x)), *x.shape[:2])), X, passes=(MoveScaleBehindView,))
        *_, last, _ = done.program.graph.nodes
        assert last.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)
        assert done.outcome.evidence.forward == 0


def test_a_tensor_stays(raised, body):
    done = raised(body(lambda m, x: (m.q(x) * m.k.bias).transpose(1, 2)), X, passes=(MoveScaleBehindView,))
    assert not done.log.applications


def test_a_scaled_value_with_another_reader_stays(raised, body):
    def forward(m, x):
        y = m.q(x) * 0.25
        return y.transpose(1, 2), y.relu()

    assert not raised(body(forward), X, passes=(MoveScaleBehindView,)).log.applications


def test_the_fourth_root_on_both(raised, body):
    """Queries and keys are scaled before their heads are split."""

    def forward(m, x):
        q, k, v = (y.view(*x.shape[:2], 4, 8).transpose(1, 2) for y in (m.q(x) * 8**-0.25, m.k(x) * 8**-0.25, m.v(x)))
        return (q @ k.transpose(2, 3)).softmax(-1) @ v

    done = raised(body(forward), X)
    ((_, _, scale),) = done.attentions
    assert scale == pytest.approx(8**-0.5, rel=1e-15)
