"""The loss of edited weights: KL where there are logits, relative error elsewhere, nothing where nothing changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.divergence import Divergence, divergence, sensitivities


@dataclass
class Output(ModelOutput):
    hidden: Tensor | None = None
    logits: Tensor | None = None


class Net(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named, self.first, self.head = named, nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Output | Tensor:
        hidden = self.first(x).tanh()
        return Output(hidden, self.head(hidden)) if self.named else self.head(hidden) * attention_mask.unsqueeze(-1)


def calls() -> list[list[Tensor]]:
    mask = torch.ones(2, 3, dtype=torch.long)
    mask[0, 2] = 0
    return [[torch.randn(2, 3, 4), mask] for _ in range(2)]


@pytest.mark.parametrize("named", [True, False])
def test_it_is_what_it_says(named: bool) -> None:
    model, given = Net(named).eval(), calls()
    loss, original = Divergence(capture(model, tuple(given[0])), given), capture(copy.deepcopy(model), tuple(given[0]))
    W = torch.randn(5, 6)
    assert loss({}) == 0.0 and loss.reading.what.startswith("KL" if named else "relative error")
    was = [model(*x) for x in given]
    model.head.weight.data = W
    now = [model(*x) for x in given]
    wanted = 0.0
    for a, b, (_, mask) in zip(was, now, given, strict=True):
        if named:
            p, q = (out.logits[mask != 0].log_softmax(-1) for out in (a, b))
            wanted += F.kl_div(q, p, log_target=True, reduction="batchmean").item() / 2
        else:
            wanted += ((b - a).norm() / a.norm()).item() / 2
    edited, data = capture(copy.deepcopy(model), tuple(given[0])), Data([tuple(call) for call in given])
    model.head.weight.data = torch.zeros(5, 6)  # the program was captured with a weight of its own
    assert loss({"head.weight": W}) == pytest.approx(wanted, rel=1e-4)
    moved = divergence(original, edited, data)
    assert moved.mean == pytest.approx(wanted, rel=1e-4) and moved.worst >= moved.mean and moved.calls == 2
    if named:
        same = [
            (a.logits[mask != 0].argmax(-1) == b.logits[mask != 0].argmax(-1))
            for a, b, (_, mask) in zip(was, now, given, strict=True)
        ]
        assert moved.agree == pytest.approx(torch.cat(same).double().mean().item()) and moved.agree < 1
    else:
        assert moved.agree is None
    assert loss({"head.weight": W}, [1]) != loss({"head.weight": W}, [0])


def fisher(model: nn.Module, given: list[Tensor]) -> Tensor:
    program = capture(model, tuple(given))
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return sensitivities(program, Data([tuple(given)]), {linears[-1]: 2})[linears[-1]]


def test_sensitivities_of_logits_are_their_fisher_information() -> None:
    """diag(p) - p p^T at the logits themselves, whose labels are drawn; padding draws none."""
    x, mask = torch.randn(1, 1, 4).expand(400, 50, 4).clone(), torch.ones(400, 50, dtype=torch.long)
    x[:, 40:], mask[:, 40:] = 100.0, 0
    model = Net(named=True).eval()
    p = model(x[:1, :1], mask).logits.softmax(-1).detach().flatten().double()
    wanted = torch.diag(p) - p[:, None] * p
    found = fisher(model, [x, mask]) * 50 / 40  # the mean counts every row, and padding has no gradient
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


def test_sensitivities_of_values_are_the_square_of_their_jacobian() -> None:
    x, mask = torch.randn(400, 50, 4), torch.ones(400, 50, dtype=torch.long)
    torch.testing.assert_close(fisher(Net(named=False).eval(), [x, mask]), torch.eye(5, dtype=torch.float64), rtol=0, atol=0.05)


def test_sensitivities_leave_parameters_and_their_gradients_alone() -> None:
    model, given = Net(named=True).eval(), calls()[0]
    model.requires_grad_(False)
    assert fisher(model, given).any() and all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_how_far_values_move_inside() -> None:
    """Over the tokens that count, in the edited program as a whole."""
    model, given = Net(False).eval(), calls()
    program = capture(model, tuple(given[0]))
    first, head = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    edits = {"first.weight": torch.randn(6, 4), "head.weight": torch.randn(5, 6)}
    found = Divergence(program, given).at({first: 2, head: 2}, edits)
    x = torch.cat([x[mask != 0] for x, mask in given])
    before, now = model.first(x), F.linear(x, edits["first.weight"], model.first.bias)
    wanted = {
        first: (before, now),
        head: (model.head(before.tanh()), F.linear(now.tanh(), edits["head.weight"], model.head.bias)),
    }
    for node, (y, other) in wanted.items():
        assert found[node] == pytest.approx(((other - y).norm() / y.norm()).item(), rel=1e-5)
