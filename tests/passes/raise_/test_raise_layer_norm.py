"""Hand-written LayerNorm, as people write it in plain modules: every spelling is raised, every near miss is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.absorb_layer_norm_gain import AbsorbLayerNormGain
from tautomer.passes.raise_.absorb_layer_norm_shift import AbsorbLayerNormShift
from tautomer.passes.raise_.raise_layer_norm import RaiseLayerNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.rules import nearest_miss

aten = torch.ops.aten
D, EPS = 6, 1e-5


class Norm(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def run(forward, *rules):
    """The program after raising, held to the original in float64, and the log."""
    program = capture(Norm(forward), (torch.randn(3, 5, D),))
    before, context = interpret(program, program.example, dtype=torch.float64), Context()
    apply_rules(rules or (RaiseLayerNorm(), AbsorbLayerNormGain(), AbsorbLayerNormShift()), program, context)
    after = interpret(program, program.example, dtype=torch.float64)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12, equal_nan=True)
    return program, context.log


def annotated_transformer(m, x):
    """The Annotated Transformer's, but with eps under the root."""
    mean = x.mean(-1, keepdim=True)
    return m.g * (x - mean) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) + m.b


def openai_gpt(m, x):
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    x = (x - u) / torch.sqrt(s + EPS)
    return m.g * x + m.b


def rsqrt_first(m, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * (torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS) * m.g) + m.b


def moments(m, x):
    mean, square = x.mean(-1, keepdim=True), torch.square(x).mean(-1, keepdim=True)
    return m.b + (x - mean) * (square - mean**2 + EPS) ** -0.5 * m.g


def correction(m, x):
    return (x - x.mean(-1, True)) / (torch.var(x, -1, correction=0, keepdim=True) + EPS).pow(0.5) * (1 + m.g) + m.b


@pytest.mark.parametrize("forward", [annotated_transformer, openai_gpt, rsqrt_first, moments, correction])
def test_every_spelling_becomes_one_layer_norm(forward):
    program, _ = run(forward)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.layer_norm.default]
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert norm.args[1] == [D] and norm.args[4] == EPS
    assert [w.op for w in norm.args[2:4]] == ["get_attr", "get_attr"]


def test_a_computed_gain_becomes_a_weight():
    program, _ = run(correction)
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    torch.testing.assert_close(program.weights.value(norm.args[2].target), 1 + program.weights.leaves["g"])


NEAR_MISSES = {
    "eps outside the root": lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True).sqrt() + EPS),
    "sample variance": lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + EPS).sqrt(),
    "standard deviation": lambda m, x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + EPS),
    "another axis": lambda m, x: (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + EPS).sqrt(),
    "two axes": lambda m, x: (x - x.mean((-2, -1), True)) / (x.var((-2, -1), unbiased=False, keepdim=True) + EPS).sqrt(),
    "mean of another tensor": lambda m, x: (x - m.g.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt(),
    "not centred": lambda m, x: x / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt(),
    "cubed": lambda m, x: (x - x.mean(-1, True)) / ((x - x.mean(-1, True)).pow(3).mean(-1, keepdim=True) + EPS).sqrt(),
    "a cube root": lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS) ** (1 / 3),
    "twice the variance": lambda m, x: (x - x.mean(-1, True)) / (2 * x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt(),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(forward)
    assert not log.applications
    miss = nearest_miss(RaiseLayerNorm(), program)
    assert miss is None or miss.sentence


def test_a_mean_without_keepdim_that_broadcasts_by_accident_stays():
    program = capture(Norm(lambda m, x: (x - x.mean(-1)) / (x.var(-1, unbiased=False) + EPS).sqrt()), (torch.randn(D, D),))
    context = Context()
    RaiseLayerNorm().run(program, context)
    assert not context.log.applications


def test_a_negative_eps_is_refused_in_words():
    _, log = run(lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) - EPS).abs().sqrt())
    assert not log.applications
    _, log = run(lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + -EPS).sqrt())
    assert log.refusals[0].reason == "eps is -1e-05, not positive"


def test_a_gain_per_token_is_no_gain():
    def forward(m, x):
        normed = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        return normed * m.g[:5, None]

    program, log = run(forward)
    assert program.count(aten.mul.Tensor) == 1
    assert "not a vector over the norm's axis" in log.refusals[0].reason


def test_a_shared_mean_survives_for_its_other_reader():
    program, log = run(lambda m, x: (openai_gpt(m, x), x.mean(-1, keepdim=True)))
    assert len(log.applications) == 3
    assert program.count(aten.mean.dim) == 1
