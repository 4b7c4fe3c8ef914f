"""A norm by stored statistics goes into every layer that reads it or into none; zeros that a layer pads keep a shift out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.norm.fold_into_readers import FoldIntoReaders
from tautomer.rewrite.axes import Axes
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.layers import Layer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 7, 6)
READERS = {
    "linear": (nn.BatchNorm1d(4), nn.Linear(4, 6), torch.randn(3, 4)),
    "linear without bias": (nn.BatchNorm1d(4), nn.Linear(4, 9, bias=False), torch.randn(3, 4)),
    "conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv2d strided": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False), IMAGE),
    "conv2d in groups": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "conv2d depthwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    "conv2d pointwise same": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding="same"), IMAGE),
    "conv2d valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    "conv2d reflecting": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), IMAGE),
    "conv2d replicating": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), IMAGE),
    "conv3d": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2, groups=2), torch.randn(2, 4, 3, 5, 4)),
    "conv_transpose1d pointwise": (nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 1), torch.randn(2, 4, 5)),
    "conv_transpose2d pointwise in groups": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2), IMAGE),
}  # fmt: skip
SHIFTED_ZEROS = {
    "conv2d": nn.Conv2d(4, 6, 3, padding=1),
    "conv2d same": nn.Conv2d(4, 6, 3, padding="same"),
    "conv2d padded on one side": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3)),
    "conv2d pointwise padded": nn.Conv2d(4, 6, 1, padding=1),
    "conv_transpose2d": nn.ConvTranspose2d(4, 6, 3),
    "conv_transpose2d strided": nn.ConvTranspose2d(4, 6, 1, stride=2),
}


@pytest.mark.parametrize("kind", READERS)
def test_batch_norm_goes_into_its_reader_and_leaves_no_trace(fold, kind):
    norm, layer, x = READERS[kind]
    program, log = fold(FoldIntoReaders(), lambda m, x: m.layer(m.norm(x)), x, layer=layer, norm=norm)
    assert len(log.applications) == 1
    assert program.count(aten.batch_norm.default) == 0


@pytest.mark.parametrize("kind", SHIFTED_ZEROS)
def test_a_shift_stays_before_padded_zeros(fold, kind):
    program, log = fold(
        FoldIntoReaders(), lambda m, x: m.layer(m.norm(x)), IMAGE, layer=SHIFTED_ZEROS[kind], norm=nn.BatchNorm2d(4)
    )
    assert not log.applications and program.count(aten.batch_norm.default) == 1
    reason = log.refusals[0].reason
    assert any(
        s in reason for s in ("pads with zeros, to which the shift has not been added", "overlaps unequally", "aten.pad at")
    )


@pytest.mark.parametrize("kind", SHIFTED_ZEROS)
def test_a_scale_alone_passes_them(fold, kind):
    program, log = fold(
        FoldIntoReaders(), lambda m, x: m.layer(x * m.s), IMAGE, layer=SHIFTED_ZEROS[kind], s=nn.Parameter(torch.randn(4, 1, 1))
    )
    assert len(log.applications) == 1 and program.count(aten.mul.Tensor) == 0


@pytest.mark.parametrize(
    "kind", ["conv2d", "conv2d same", "conv2d pointwise padded", "conv_transpose2d", "conv_transpose2d strided"]
)
def test_forced_past_padded_zeros_the_border_is_wrong(randomized, monkeypatch, kind):
    monkeypatch.setattr(Layer, "_require_even", lambda self: None)
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), SHIFTED_ZEROS[kind]))
    program = capture(model, (IMAGE,))
    original, context = program.copy(), Context(check=False)
    FoldIntoReaders().run(program, context)
    assert context.log.applications
    with pytest.raises(ClaimBroken):
        check_program(original, program, FoldIntoReaders.claim)


def parts():
    return {
        "norm": nn.BatchNorm2d(4), "q": nn.Conv2d(4, 6, 1), "k": nn.Conv2d(4, 6, 3), "v": nn.ConvTranspose2d(4, 2, 1),
        "one": nn.BatchNorm1d(4), "linear": nn.Linear(4, 6), "wide": nn.Linear(4, 9, bias=False), "other": nn.Linear(4, 3),
        "s": nn.Parameter(torch.randn(4)), "t": nn.Parameter(torch.randn(4)), "var": nn.Parameter(torch.rand(4) + 0.2, False),
        "act": nn.Tanh(), "tied": nn.Linear(4, 6), "scale": nn.Parameter(torch.randn(4, 1, 1)),
    }  # fmt: skip


TOKENS = torch.randn(2, 5, 4)


def grouped(x):
    """PowerNorm's GroupScaling: per token and group of channels."""
    groups = x.reshape(2, 5, 2, 2)
    return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)).reshape(2, 5, 4)


def power_norm(m, x):
    return x / torch.sqrt(m.var + 1e-5) * m.s + m.t


FOLDED = {
    "three readers": (lambda m, x: (y := m.norm(x), (m.q(y), m.k(y), m.v(y)))[1], IMAGE),
    "tokens last": (lambda m, x: (y := m.one(x.transpose(1, 2)).transpose(1, 2), (m.linear(y), m.other(y)))[1], TOKENS),
    "pooled": (lambda m, x: m.linear(m.norm(x).mean((2, 3))), IMAGE),
    "pooled to one": (lambda m, x: m.linear(F.adaptive_avg_pool2d(m.norm(x), 1).flatten(1)), IMAGE),
    "the last token": (lambda m, x: m.linear(power_norm(m, x)[:, -1]), TOKENS),
    "unified norm": (lambda m, x: m.linear(x * (m.s / torch.sqrt(m.var + 1e-5)) + m.t), TOKENS),
    "power norm": (lambda m, x: m.linear(power_norm(m, x)), TOKENS),
    "power norm with group scaling": (lambda m, x: m.linear(power_norm(m, grouped(x))), TOKENS),
    "a factor before a head without bias": (lambda m, x: m.wide(x * m.s), TOKENS),
    "a number": (lambda m, x: m.k(x.relu() * 1.7139588594), IMAGE),
}


@pytest.mark.parametrize("name", FOLDED)
def test_every_reader_takes_it(fold, name):
    forward, x = FOLDED[name]
    program, log = fold(FoldIntoReaders(), forward, x, **parts())
    assert log.applications and program.count(aten.batch_norm.default) == 0
    kept = 1 if "group scaling" in name else 0
    assert program.count(aten.mul.Tensor) == kept and program.count(aten.div.Tensor) == program.count(aten.add.Tensor) - kept == 0


def test_the_clamp_of_online_normalization_stops_it(fold):
    """clamp(x s + t) → linear: the diagonal stands before the clamp, where only a writer could take it."""
    program, log = fold(FoldIntoReaders(), lambda m, x: m.linear(power_norm(m, x).clamp(-5, 5)), TOKENS, **parts())
    assert not log.applications and program.count(aten.clamp.default) == 1


REFUSED = {
    "a second consumer": (lambda m, x: (y := m.norm(x), (m.q(y), y.tanh()))[1], IMAGE, "aten.tanh at tanh reads it, and"),
    "the output": (lambda m, x: (y := m.norm(x), (m.q(y), y))[1], IMAGE, "output at output reads it"),
    "a residual": (lambda m, x: (y := m.one(x.mean(1)), m.linear(y)[:, :4] + y)[1], TOKENS, "aten.add at add reads it"),
    "tied": (
        lambda m, x: m.tied(m.one(x.mean(1))) @ m.tied.weight, TOKENS, "'tied.weight' would be stored twice"
    ),
    "a wide head without bias": (
        lambda m, x: m.wide(x + m.t), TOKENS, "wide has no bias: adding one over 9 channels costs more than a shift over 4"
    ),
    "as a weight": (lambda m, x: F.linear(m.t, m.one(x.mean(1))), TOKENS, "aten.linear at linear reads it, and is no layer"),
    "another axis": (lambda m, x: m.linear(m.norm(x)[..., :4]), IMAGE, "are on another axis"),
    "channels split": (lambda m, x: m.one(x.mean(1)).reshape(-1, 2, 2).sum(2), TOKENS, "aten.reshape at reshape reads it"),
    "batch statistics": (
        lambda m, x: m.linear(F.batch_norm(x.mean(1), None, None, training=True)), TOKENS, "uses the statistics of its batch"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_a_sentence(fold, name):
    forward, x, sentence = REFUSED[name]
    _, log = fold(FoldIntoReaders(), forward, x, **parts())
    assert not log.applications
    assert sentence in log.refusals[0].reason


def test_one_reader_that_cannot_keeps_all_weights(fold):
    """k pads, q does not: nothing is folded half."""
    parts = {"norm": nn.BatchNorm2d(4), "q": nn.Conv2d(4, 6, 1), "k": nn.Conv2d(4, 6, 3, padding=1)}
    program, log = fold(FoldIntoReaders(), lambda m, x: (y := m.norm(x), (m.q(y), m.k(y)))[1], IMAGE, **parts)
    assert not log.applications and not any(program.weights[name].edited for name in program.weights)


def test_axes_of_moved_channels_are_those_of_the_axis_facts():
    """What stands between may move channels, not mix them: the facts answer None there."""
    program = capture(nn.Flatten().eval(), (IMAGE,))
    (flat,) = program.output.all_input_nodes
    assert Axes(program).carried((program.placeholders[0], 1), flat) == []
