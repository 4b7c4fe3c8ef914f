"""DeepNorm's alpha goes into the branch, and eps with its square; where that is no equality it stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.norm.fold_residual_scale import FoldResidualScale
from tautomer.passes.recipes import CLEANUP, NORM, RAISE
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import arguments
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class DeepNorm(nn.Module):
    """norm(alpha x + f(x)), twice."""

    def __init__(self, alpha=2.0, norm=nn.LayerNorm, bias=True, eps=1e-3) -> None:
        super().__init__()
        self.alpha = alpha
        self.up, self.down = (nn.ModuleList(nn.Linear(*n, bias=bias) for _ in range(2)) for n in ((6, 9), (9, 6)))
        self.norms = nn.ModuleList(norm(6, eps=eps) for _ in range(2))
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = norm(self.alpha * x + down(F.gelu(up(x))))
        return x


class Lambda(DeepNorm):
    def __init__(self, forward) -> None:
        super().__init__()
        self.body, self.a, self.c = forward, nn.Parameter(torch.tensor(2.0)), nn.Buffer(torch.tensor(2.0))

    def forward(self, x):
        return self.body(self, x, self.norms[0], self.down[0](self.up[0](x)))


def run(model, check=True):
    program = capture(model, (0.01 * torch.randn(2, 3, 6),))
    original, context = program.copy(), Context(check=check)
    FoldResidualScale().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(("alpha", "bias"), [(2.0, True), (81**0.25, False), (3, True), (0.25, True)])
def test_the_residual_is_not_scaled_any_more(alpha, bias, norm):
    program, log = run(DeepNorm(alpha, norm, bias))
    assert len(log.applications) == 2 and program.count(aten.mul.Tensor) == 0
    norms = [node for node in program.graph.nodes if node.target in (aten.layer_norm.default, aten.rms_norm.default)]
    assert [arguments(node)["eps"] for node in norms] == [1e-3 / alpha**2] * 2


def test_the_eps_from_before_would_be_wrong(monkeypatch):
    monkeypatch.setattr("tautomer.passes.norm.fold_residual_scale._over_square", lambda eps, a: eps)
    _, log = run(DeepNorm())
    assert not log.applications and "does not hold here" in log.refusals[0].reason


@pytest.mark.parametrize("alpha", [0.0, -2.0])
def test_a_factor_that_is_not_positive_is_refused(alpha):
    _, log = run(Lambda(lambda m, x, norm, f: norm(x * alpha + f)))
    assert log.refusals[0].reason == f"the factor of the residual is {alpha}, not positive"


@pytest.mark.parametrize("factor", [lambda m, x: m.a, lambda m, x: m.c, lambda m, x: x.mean()])
def test_a_factor_that_may_change_is_refused(factor):
    _, log = run(Lambda(lambda m, x, norm, f: norm(x * factor(m, x) + f)))
    assert log.refusals[0].reason == "the factor of the residual is a tensor: eps, a number, could not follow it"


def test_a_sum_that_goes_on_is_refused():
    def forward(m, x, norm, f):
        y = 2 * x + f
        return y + norm(y)

    _, log = run(Lambda(forward))
    assert "is also read by aten.add" in log.refusals[0].reason


def test_a_shared_writer_is_refused():
    _, log = run(Lambda(lambda m, x, norm, f: norm(2 * x + f) + m.down[0](m.up[1](x))))
    assert "'down.0.weight' would be stored twice" in log.refusals[0].reason


def test_deepnorm_in_the_recipe():
    model = DeepNorm(81**0.25).eval()
    program = capture(model, (torch.randn(2, 3, 6),))
    outcome = run_passes([kind() for kind in (*RAISE, *NORM, *CLEANUP)], program)
    assert outcome.evidence.gradient <= 1e-10 and program.count(aten.mul.Tensor) == 0
    assert set(program.weights) >= {"down.0.weight", "down.1.bias"}
