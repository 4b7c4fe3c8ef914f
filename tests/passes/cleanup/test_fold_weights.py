"""What is computed from weights alone becomes one weight, whatever the parametrisation; what would grow or change stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tautomer
from tautomer.passes.cleanup.fold_weights import FoldWeights
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
X, IMAGE = torch.randn(3, 6), torch.randn(2, 6, 5, 5)


class Computed(nn.Module):
    """Every way to make a weight of weights that a test names."""

    def __init__(self, forward, layer=None):
        super().__init__()
        self.layer = layer or nn.Linear(6, 6)
        self.A, self.B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.raw, self.conv = nn.Parameter(torch.randn(6)), nn.Conv2d(6, 4, 3)
        self.register_buffer("mask", (torch.rand(6, 6) > 0.5).float())
        self.register_buffer("angles", torch.randn(3, 6))
        self.forward_of = forward

    def forward(self, x):
        return self.forward_of(self, x)


def fold(forward, x=X, layer=None, rewrite=None, training=False):
    model = Computed(forward, layer).train(training)
    program = capture(model, (x,), mode="train" if training else "eval")
    original, context, again = program.copy(), Context(), Context()
    rewrite = rewrite or FoldWeights()
    rewrite.run(program, context)
    program.graph.lint()
    evidence = check_program(original, program, ALGEBRAIC)
    assert evidence.forward <= 1e-12 and not evidence.notes
    rewrite.run(program, again)
    assert not again.log.applications
    return program, context.log


def standardized(m, x):
    """Scaled weight standardisation as in timm: a batch norm over the weight."""
    W = m.conv.weight.reshape(1, 4, -1)
    W = F.batch_norm(W, None, None, weight=m.raw[:4] * 0.3, training=True, momentum=0.0, eps=1e-6)
    return F.conv2d(x, W.reshape_as(m.conv.weight), m.conv.bias)


def standardized_by_hand(m, x):
    var, mean = torch.var_mean(m.conv.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
    return F.conv2d(x, (m.conv.weight - mean) * torch.rsqrt(torch.clamp(var * 54, min=1e-4)) * m.raw[:4, None, None, None])


FOLDED = {
    "weight norm": (lambda m, x: m.layer(x), X, lambda: parametrizations.weight_norm(nn.Linear(6, 4))),
    "weight norm of a convolution": (lambda m, x: m.layer(x), IMAGE, lambda: parametrizations.weight_norm(nn.Conv2d(6, 4, 3))),
    "weight norm over all axes": (lambda m, x: m.layer(x), X, lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None)),
    "spectral norm": (lambda m, x: m.layer(x), X, lambda: parametrizations.spectral_norm(nn.Linear(6, 4))),
    "spectral norm, convolution": (lambda m, x: m.layer(x), IMAGE, lambda: parametrizations.spectral_norm(nn.Conv2d(6, 4, 3))),
    "scaled standardisation": (standardized, IMAGE, None),
    "scaled standardisation by hand": (standardized_by_hand, IMAGE, None),
    "a mask": (lambda m, x: F.linear(x, m.layer.weight * m.mask), X, None),
    "softplus": (lambda m, x: x * F.softplus(m.raw), X, None),
    "low rank onto a weight": (lambda m, x: F.linear(x, m.layer.weight + 0.5 * (m.B @ m.A), m.layer.bias), X, None),
    "transposed": (lambda m, x: x @ (m.layer.weight.T * m.mask), X, None),
    "a table": (lambda m, x: x * m.angles.cos() + x * m.angles.sin(), X, None),
    "in two readers": (lambda m, x: F.linear(F.linear(x, w := m.layer.weight * m.mask), w), X, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_it_becomes_one_weight(name):
    forward, x, layer = FOLDED[name]
    program, log = fold(forward, x, layer and layer())
    assert log.applications and not log.refusals
    assert not [node for node in program.graph.nodes if _computes_on_weights(node)]


def _computes_on_weights(node):
    read = node.all_input_nodes if node.op == "call_function" else []
    return bool(read) and all(x.op == "get_attr" for x in read) and node.target not in (aten.t.default, aten.reshape.default)


STAYS = {
    "a low-rank product": (lambda m, x: F.linear(x, m.B @ m.A), "it has 144 bytes, what it is computed from has 96"),
    "a broadcast": (lambda m, x: x @ (m.raw[:, None] * m.raw[None, :]), "it has 144 bytes, what it is computed from has 24"),
    "another reader": (
        lambda m, x: F.linear(m.layer(x), m.layer.weight * m.mask), "'layer.weight' would be stored twice: aten.linear"
    ),
    "returned": (lambda m, x: (x, m.layer.weight * m.mask), "the caller gets it, and may write into it"),
    "a view of it returned": (lambda m, x: (x, (m.layer.weight * m.mask)[0]), "the caller gets it, and may write into it"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_it_stays_with_a_sentence(name):
    forward, sentence = STAYS[name]
    _, log = fold(forward)
    assert not log.applications
    assert sentence in log.refusals[0].reason


def test_asked_for_it_grows():
    _, log = fold(STAYS["a low-rank product"][0], rewrite=FoldWeights(grow=True))
    assert len(log.applications) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.linear(x, F.dropout(m.layer.weight, 0.5, True)),
        lambda m, x: F.linear(x, m.layer.weight) * x.sum(),
        lambda m, x: x @ m.layer.weight.T[:, :4],
    ],
    ids=["random", "nothing to compute", "views alone"],
)
def test_it_finds_nothing(forward):
    program = capture(Computed(forward).eval(), (X,))
    context = Context()
    FoldWeights().run(program, context)
    assert not context.log.applications and not context.log.refusals


def test_a_weight_that_the_graph_writes_is_left_alone():
    """The power iteration of a spectral norm in training writes u and v."""
    _, log = fold(lambda m, x: m.layer(x), layer=parametrizations.spectral_norm(nn.Linear(6, 4)), training=True)
    assert not log.applications


def test_a_computed_tensor_that_is_written_later_is_left_alone():
    def forward(m, x):
        scale = m.raw * 2
        y, rows = x * scale, scale.view(2, 3)
        scale.add_(x[0])
        return y + rows.sum()

    program = capture(Computed(forward).eval(), (X,))
    context = Context()
    FoldWeights().run(program, context)
    assert not context.log.applications


def test_the_state_dict_of_the_original_is_mapped():
    model = Computed(lambda m, x: m.layer(x), parametrizations.weight_norm(nn.Linear(6, 4))).eval()
    other = Computed(lambda m, x: m.layer(x), parametrizations.weight_norm(nn.Linear(6, 4))).eval()
    fast = tautomer.optimize(model, (X,))
    assert "aten._weight_norm" not in fast.report.after.ops
    fast.load_state_dict(fast.weights.from_original(other.state_dict()))
    torch.testing.assert_close(fast(X), other(X))
