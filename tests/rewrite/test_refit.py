"""Factors behind a changed prefix: the best of their rank for what the layer gave, as the textbook has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.refit import Pairs, error_of, fitted, pairs

N, M, ROWS = 6, 5, 4000


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, M, bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * attention_mask.unsqueeze(-1)


def measured(bias: bool, folder: Path | None = None) -> tuple[Net, Pairs, Tensor, Tensor]:
    """A model, the sums for its second layer behind an edited first one, and what that reads before and now."""
    torch.manual_seed(0)
    model = Net(bias).double().eval()
    edits = {"first.weight": model.first.weight.detach() + 0.3 * torch.randn(N, N, dtype=torch.float64)}
    calls = [(torch.randn(10, 40, N, dtype=torch.float64) + 1, torch.randint(2, (10, 40))) for _ in range(10)]
    program = capture(model, calls[0])
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    seen = pairs(program, Data(calls, folder=folder), edits, node, 2)
    x = torch.cat([given[mask != 0] for given, mask in calls])
    before, now = ((x @ W.T + model.first.bias.detach()).relu() for W in (model.first.weight.detach(), edits["first.weight"]))
    return model, seen, before, now


def test_the_sums_are_over_the_tokens_that_count(tmp_path: Path) -> None:
    _, seen, before, now = measured(True, tmp_path)
    _, again, _, _ = measured(True, tmp_path)  # from the folder
    for found in (seen, again):
        torch.testing.assert_close(found.cross, before.T @ now)
        torch.testing.assert_close(found.before.second, before.T @ before)
        torch.testing.assert_close(found.now.mean, now.mean(0))
        assert found.now.count == len(now)


@pytest.mark.parametrize("bias", [True, False])
def test_no_factors_of_the_rank_are_better(bias: bool) -> None:
    """Against reduced-rank regression, solved by a QR of the inputs and an SVD of what it predicts."""
    model, seen, before, now = measured(bias)
    W, b = model.second.weight.detach(), model.second.bias.detach() if bias else None
    y = before @ W.T + (0 if b is None else b)
    centre = now.mean(0) if bias else torch.zeros(N, dtype=torch.float64)
    target = y - (y.mean(0) if bias else 0)
    Q, _ = torch.linalg.qr(now - centre)
    u, s, vt = torch.linalg.svd(Q.T @ target, full_matrices=False)
    for rank in (2, M):
        best = Q @ (u[:, :rank] * s[:rank]) @ vt[:rank]
        fit = fitted(W, b, seen, rank)
        found = now @ (fit.U @ fit.V).T + (0 if b is None else b) + (0 if fit.shift is None else fit.shift)
        wanted = float((target - best).norm() / y.norm())
        assert (fit.shift is not None) == bias and fit.U.shape == (M, rank) and fit.V.shape == (rank, N)
        assert float((y - found).norm() / y.norm()) == pytest.approx(fit.error, rel=1e-9)
        assert wanted <= fit.error <= 1.02 * wanted  # the ridge costs a little
    stale = error_of(W, b, seen, W, None if b is None else torch.zeros_like(b))
    assert fit.error < 0.8 * stale


def test_where_nothing_changed_the_layer_is_its_own_fit() -> None:
    model, seen, _, _ = measured(True)
    same = Pairs(seen.before.second, seen.before, seen.before)
    fit = fitted(model.second.weight, model.second.bias, same, M)
    torch.testing.assert_close(fit.U @ fit.V, model.second.weight.detach())
    assert fit.error < 1e-6


def test_the_outputs_that_matter_are_kept() -> None:
    model, seen, before, now = measured(False)
    W, matters = model.second.weight.detach(), torch.diag(torch.tensor([100.0, 100.0, 1e-3, 1e-3, 1e-3], dtype=torch.float64))
    lost = [
        (now @ (f.U @ f.V).T - before @ W.T).square().mean(0)
        for f in (fitted(W, None, seen, 2), fitted(W, None, seen, 2, matters))
    ]
    assert lost[1][:2].sum() < lost[0][:2].sum()
