"""The ranks of a plan are the best within the budget, and what it measures is the model with the weights it will have."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tautomer.passes.lowrank.matrices import matrix_of
from tautomer.passes.lowrank.prices import Prices
from tautomer.passes.lowrank.rank_plan import Choosing, RankPlan
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.divergence import sensitivities
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.factors import cost, factor
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.moments import moments
from tautomer.rewrite.pass_base import Context

D = 12
RANKS = (1, 2, 3, 4, 5)


class Two(nn.Module):
    """A layer that is nearly of rank 2, and one of full rank."""

    def __init__(self) -> None:
        super().__init__()
        self.thin, self.full = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        with torch.no_grad():
            self.thin.weight.copy_(torch.randn(D, 2) @ torch.randn(2, D) + 0.01 * torch.randn(D, D))
            self.full.weight.copy_(torch.linalg.qr(torch.randn(D, D))[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.full(self.thin(x).tanh())


def planned(ratio: float, data: list[Tensor] | None, **how) -> tuple[RankPlan, Context]:
    program = capture(Two().double().eval(), (torch.randn(3, 4, D).double(),))
    editor, prices = Editor(program), Prices("parameters", program, None, {})
    found = [layer_of(node) for node in program.graph.nodes if node.op == "call_function"]
    layers = [matrix_of(layer, editor) for layer in found if layer is not None]
    context, seen, weighed = Context(data=Data(data) if data else None), {}, {}
    if data:
        seen = moments(program, context.data, {c.x: c.layer.axis for c in layers}, "attention_mask")
        weighed = sensitivities(program, context.data, {c.layer.node: c.layer.axis for c in layers}, "attention_mask", 0)
    factors = [
        factor(c.value(program), seen[c.x].covariance(c.bias is not None) if seen else None, weighed.get(c.layer.node))
        for c in layers
    ]
    means = [seen[c.x].mean if seen else None for c in layers]
    choosing = Choosing(
        **{"ratio": ratio, "allocation": "predicted", "generations": 0, "calls": 2, "tokens": "", "seed": 0} | how
    )
    return RankPlan(choosing, program, layers, [prices.sizes(c.layer, RANKS) for c in layers], prices, factors, means), context


def batches() -> list[Tensor]:
    return [torch.randn(4, 9, D).double() for _ in range(3)]


@pytest.mark.parametrize("data", [None, batches()], ids=["without data", "uniform"])
def test_one_ratio_for_all(data) -> None:
    plan, context = planned(0.5, data, allocation="uniform")
    assert plan.ranks(context) == [3, 3] and plan.budget == D * D  # half of what both have: rank 3 of 6


def test_predicted_ranks_are_the_best_within_the_budget() -> None:
    plan, context = planned(0.6, batches())
    ranks, sizes = plan.ranks(context), (*RANKS, None)
    loss = lambda choice: sum(row[sizes.index(rank)] for row, rank in zip(plan.losses, choice, strict=True))  # noqa: E731
    price = lambda choice: sum(cost(D, D, rank) for rank in choice)  # noqa: E731
    within = [choice for choice in product(sizes, repeat=2) if price(choice) <= plan.budget]
    assert tuple(ranks) in within and loss(ranks) == pytest.approx(min(map(loss, within)), rel=1e-12)
    assert ranks[0] == 2 and ranks[1] > 2  # the first has no third direction to lose


def test_edits_are_the_weights_of_a_lower_rank() -> None:
    plan, _ = planned(0.5, batches())
    edits = plan.edits({0: 2, 1: None})
    W = plan.layers[0].value(plan.program)
    assert edits.keys() == {"thin.weight", "thin.bias"} and torch.linalg.matrix_rank(edits["thin.weight"], rtol=1e-9) == 2
    shift = edits["thin.bias"] - plan.program.weights.value("thin.bias")
    torch.testing.assert_close(shift, (W - edits["thin.weight"]) @ plan.means[0], rtol=1e-9, atol=1e-12)


def test_a_budget_below_the_floor() -> None:
    plan, context = planned(0.1, None)
    with pytest.raises(UsageError, match="the smallest factors have 48 parameters"):
        plan.ranks(context)
