"""Gain and shift go into every reader that can take them, or into none; a wrong place for them changes numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.cleanup.drop_unused_weights import DropUnusedWeights
from tautomer.passes.norm import fold_norm_gain
from tautomer.passes.norm.fold_norm_gain import FoldNormGain
from tautomer.passes.recipes import CLEANUP, RAISE
from tautomer.rewrite import readers as paths
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.layers import Layer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
D = 8


class Rms(nn.Module):
    """RMSNorm with a gain; ``plus`` is what Gemma adds to it."""

    def __init__(self, plus: float = 0.0) -> None:
        super().__init__()
        self.w, self.plus = nn.Parameter(torch.randn(D)), plus

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.plus + self.w if self.plus else self.w)


def layer_norm(**options: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(D, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


NORMS = {
    "layer norm": layer_norm,
    "layer norm without shift": lambda: layer_norm(bias=False),
    "rms norm": lambda: nn.RMSNorm(D, eps=1e-6),
    "rms norm by hand": Rms,
    "gain is 1 + w": lambda: Rms(1.0),
}


class Model(nn.Module):
    def __init__(self, forward, norm) -> None:
        super().__init__()
        self.norm, self.body = norm, forward
        for parameter in norm.parameters():
            with torch.no_grad():
                parameter[1], parameter[2] = 0.0, -parameter[2].abs()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, 4, bias=False), nn.Linear(D, 3 * D)
        self.E, self.transposed = nn.Parameter(torch.randn(3, D, 5)), nn.Parameter(torch.randn(D, 7))
        self.plain, self.grouped, self.depthwise = nn.Conv1d(D, 6, 3), nn.Conv1d(D, 6, 3, groups=2), nn.Conv1d(D, 16, 2, groups=D)
        self.padded, self.same = nn.Conv1d(D, 6, 3, padding=1), nn.Conv1d(D, 6, 3, padding="same", bias=False)
        self.valid, self.circular = nn.Conv1d(D, 6, 3, padding="valid"), nn.Conv1d(D, 6, 3, padding=1, padding_mode="circular")
        self.patch, self.up = nn.Conv2d(D, 6, 2, stride=2), nn.ConvTranspose1d(D, 6, 3)
        self.table = nn.Embedding(9, D)
        self.frozen = nn.Parameter(torch.randn(D, D), requires_grad=False)

    def forward(self, x):
        return self.body(self, self.norm(x), x)


def first(y):
    return y.transpose(1, 2)


LINEAR = {
    "linear": lambda m, y, x: m.q(y),
    "without a bias": lambda m, y, x: m.k(y),
    "q, k and v": lambda m, y, x: (m.q(y), m.k(y), m.v(y)),
    "twice": lambda m, y, x: m.q(y) + m.q(y[:, :1]),
    "a product, as Conv1D": lambda m, y, x: y @ m.transposed,
    "addmm": lambda m, y, x: torch.addmm(m.q.bias, y.reshape(-1, D), m.frozen),
    "experts": lambda m, y, x: y.unsqueeze(1) @ m.E,
    "experts, transposed": lambda m, y, x: m.E.transpose(1, 2) @ first(y).unsqueeze(1),
    "router and gated experts": lambda m, y, x: m.v(y) * m.k(y).softmax(-1)[..., :1],
    "the last token": lambda m, y, x: m.q(y[:, -1]),
    "tokens moved about": lambda m, y, x: m.q(y.roll(1, 1).flip(1)[:, torch.tensor([2, 0])].reshape(-1, D)),
    "heads split off the tokens": lambda m, y, x: m.q(y.permute(1, 0, 2).unsqueeze(0).expand(2, -1, -1, -1)),
    "mean of the tokens": lambda m, y, x: m.q(y.mean(1)),
    "pieces": lambda m, y, x: sum(map(m.q, y.split([2, 3], 1)[1].unbind(1))),
    "conv": lambda m, y, x: m.plain(first(y)),
    "grouped conv": lambda m, y, x: m.grouped(first(y)),
    "depthwise conv": lambda m, y, x: m.depthwise(first(y)),
    "conv, valid": lambda m, y, x: m.valid(first(y)),
    "conv, circular": lambda m, y, x: m.circular(first(y)),
    "conv over patches": lambda m, y, x: m.patch(y.unsqueeze(1).expand(-1, 4, -1, -1).permute(0, 3, 1, 2)),
}
GAIN_ALONE = {
    "sum of the tokens": lambda m, y, x: m.q(y.sum(1)),
    "scaled": lambda m, y, x: m.q(y * 0.5),
    "gated per token": lambda m, y, x: m.q(y * x[..., :1].sigmoid()),
    "masked": lambda m, y, x: m.q(y.masked_fill(x[..., :1] > 0, 0.0)),
    "pooled by attention": lambda m, y, x: m.q(x[:, :2, :5].sigmoid() @ y),
    "padded with zeros before": lambda m, y, x: m.q(F.pad(y, (0, 0, 1, 1))),
    "padded conv": lambda m, y, x: m.padded(first(y)),
    "same conv": lambda m, y, x: m.same(first(y)),
    "transposed conv": lambda m, y, x: m.up(first(y)),
}


def run(forward, norm) -> tuple[Program, Program, Any]:
    torch.manual_seed(0)
    model = Model(forward, norm()).eval()
    program = capture(model, (torch.randn(2, 5, D),))
    original = program.copy()
    outcome = run_passes([kind() for kind in (*RAISE, FoldNormGain, *CLEANUP)], program)
    assert not outcome.withdrawn
    return original, program, outcome


def norms(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target in fold_norm_gain.NORMS]


def bare(program: Program) -> bool:
    return all(fold_norm_gain.affine(norm) == (None, None) for norm in norms(program))


@pytest.mark.parametrize(
    ("reader", "norm"),
    [
        *((reader, "layer norm") for reader in LINEAR),
        *((reader, "gain is 1 + w") for reader in GAIN_ALONE),
        *(("q, k and v", norm) for norm in NORMS),
    ],
)
def test_every_reader_takes_what_it_can(reader, norm):
    _, program, outcome = run((LINEAR | GAIN_ALONE)[reader], NORMS[norm])
    assert outcome.evidence.forward <= 1e-12 and outcome.evidence.gradient <= 1e-10
    assert len(norms(program)) == 1 and bare(program)
    assert not [name for name in program.weights if name.startswith("norm")], "no trace of the gain is left"


@pytest.mark.parametrize("reader", GAIN_ALONE)
def test_a_shift_that_would_be_missing_somewhere_is_refused_and_must_be(reader, monkeypatch):
    _, program, outcome = run(GAIN_ALONE[reader], NORMS["layer norm"])
    (refusal,) = [r for r in outcome.log.refusals if r.rewrite == "fold-norm-gain"]
    sentences = ("pads with zeros, to which the shift", "overlaps unequally", "changes the shift on its way")
    assert any(sentence in refusal.reason for sentence in sentences)
    assert not bare(program)
    monkeypatch.setattr(Layer, "_require_even", lambda self: None)
    monkeypatch.setattr(paths, "keeps_a_shift", lambda move: True)
    original = capture(Model(GAIN_ALONE[reader], layer_norm()).eval(), (torch.randn(2, 5, D),))
    forced, context = original.copy(), Context(check=False)
    FoldNormGain().run(forced, context)
    if context.log.applications:  # the emission of a transposed convolution fails by itself
        with pytest.raises(ClaimBroken):
            check_program(original, forced, ALGEBRAIC)


REFUSED = {
    "tanh": (lambda m, y, x: m.q(y) + y.tanh(), "aten.tanh at tanh reads it, and is no layer"),
    "residual": (lambda m, y, x: x + m.q(y) + y, "aten.add at "),
    "returned": (lambda m, y, x: (m.q(y), y), "output at output reads it, and is no layer"),
    "itself": (lambda m, y, x: m.q(y) @ first(y), "aten.matmul at matmul reads it, and is no layer"),
    "as a weight": (lambda m, y, x: F.linear(m.q(y), y[0]), "reads it, and is no layer"),
    "features cut in two": (lambda m, y, x: m.q(torch.cat([y[..., 4:], y[..., :4]], -1)), "reads it, and is no layer"),
    "another value beside it": (lambda m, y, x: m.q(torch.cat([x, y], 1)), "aten.cat at cat reads it, and is no layer"),
    "weight computed at run time": (
        lambda m, y, x: F.linear(y, m.q.weight * x.mean()), "aten.linear at linear reads it, and is no layer"
    ),
    "tied head": (
        lambda m, y, x: y @ m.table.weight.t() + m.table(x[..., 0].argsort(1)).sum(),
        "'table.weight' would be stored twice: aten.embedding 'embedding' also reads it",
    ),
    "layer shared with another input": (lambda m, y, x: m.q(y) + m.q(x), "'q.weight' would be stored twice"),
    "one weight in two roles": (
        lambda m, y, x: (y.unsqueeze(1) @ m.frozen).sum(1) + F.linear(y, m.frozen) + y @ m.frozen,
        "'frozen' would be stored twice, edited in two ways",
    ),
}  # fmt: skip


@pytest.mark.parametrize("norm", ["layer norm", "gain is 1 + w"])
@pytest.mark.parametrize("reader", REFUSED)
def test_one_reader_that_cannot_keeps_it_for_all(reader, norm):
    forward, sentence = REFUSED[reader]
    _, program, outcome = run(forward, NORMS[norm])
    (refusal,) = [r for r in outcome.log.refusals if r.rewrite == "fold-norm-gain"]
    assert sentence in refusal.reason
    assert not bare(program)


def test_a_norm_over_two_axes_and_a_gain_of_the_input_are_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q = nn.LayerNorm((5, D)), nn.Linear(D, D)

        def forward(self, x):
            return self.q(self.norm(x)), self.q(F.layer_norm(x, (D,), x[0, 0]))

    program, context = capture(Two(), (torch.randn(2, 5, D),)), Context()
    FoldNormGain().run(program, context)
    assert [r.reason for r in context.log.refusals] == [
        "the norm is over 2 axes, its readers sum over one", "the gain or the shift is computed at run time",
    ]  # fmt: skip


def test_the_bias_takes_the_shift_through_the_weight_from_before():
    _, program, _ = run(LINEAR["linear"], layer_norm)
    weight = program.weights
    W, b, g, c = (weight.leaves[name].detach().double() for name in ("q.weight", "q.bias", "norm.weight", "norm.bias"))
    torch.testing.assert_close(weight.value("q.bias", torch.float64), b + W @ c, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weight.value("q.weight", torch.float64), W * g, rtol=1e-14, atol=1e-14)


def test_the_weight_after_the_fold_would_be_wrong_for_the_shift(monkeypatch):
    right = Layer.preceded

    def scaled_first(self, op, x, g, c, pad):
        return right(self, op, x, g, c if g is None else op.mul(c, g), pad)

    monkeypatch.setattr(Layer, "preceded", scaled_first)
    original = capture(Model(LINEAR["linear"], layer_norm()), (torch.randn(2, 5, D),))
    context = Context()
    FoldNormGain().run(original, context)
    assert not context.log.applications
    assert "does not hold here" in context.log.refusals[0].reason


def test_a_gain_that_something_else_reads_stays_in_the_table():
    _, program, _ = run(lambda m, y, x: m.q(y) * m.norm.weight, layer_norm)
    assert bare(program) and "norm.weight" in program.weights and "norm.bias" not in program.weights


def test_one_norm_applied_twice_is_folded_into_each():
    _, program, _ = run(lambda m, y, x: m.q(y) + m.v(m.norm(x.flip(1)))[..., :D], layer_norm)
    assert len(norms(program)) == 2 and bare(program)
    assert not [name for name in program.weights if name.startswith("norm")]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_folds_in_float64_and_rounds_once(half):
    class Gemma(Rms):
        def forward(self, x):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (wide * (1.0 + self.w.float())).type_as(x)

    model = Model(LINEAR["q, k and v"], Gemma()).to(half)
    program = capture(model, (torch.randn(2, 5, D, dtype=half),))
    outcome = run_passes([kind() for kind in (*RAISE, FoldNormGain, *CLEANUP)], program)
    assert outcome.evidence.forward <= 1e-12 and bare(program) and not outcome.withdrawn
    exact = model.q.weight.double() * (1 + model.norm.w.double())
    assert torch.equal(program.weights.value("q.weight"), exact.to(half))


def test_a_second_run_and_no_gain_do_nothing():
    _, program, _ = run(LINEAR["q, k and v"], layer_norm)
    context = Context()
    FoldNormGain().run(program, context)
    DropUnusedWeights().run(program, Context())
    assert context == Context()


def test_only_skip_and_fuel():
    model = Model(lambda m, y, x: m.q(y) + m.v(F.layer_norm(x, (D,), m.q.bias))[..., :D], layer_norm())
    old = capture(model, (torch.randn(2, 5, D),))
    for context in (Context(fuel=1), Context(skip=("norm",)), Context(only=("norm",))):
        new = old.copy()
        FoldNormGain().run(new, context)
        assert len(context.log.applications) == 1
        assert sum(fold_norm_gain.affine(norm) == (None, None) for norm in norms(new)) == 1
        assert arguments(norms(new)[0])["eps"] == 1e-5
