"""A norm by stored statistics goes into every layer that reads it or into none; zeros that a layer pads keep a shift out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.norm.fold_into_readers import FoldIntoReaders
from tautomer.passes.norm.fold_into_writer import FoldIntoWriter
from tautomer.rewrite import layers
from tautomer.rewrite.axes import Axes
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.layers import Layer, layer_of
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


PADDED = {
    "conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding=2, dilation=2), torch.randn(2, 4, 9)),
    "conv1d same": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 5, padding="same", bias=False), torch.randn(2, 4, 9)),
    "conv2d strided": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=(2, 1), stride=2), IMAGE),
    "conv2d in groups": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), IMAGE),
    "conv2d depthwise dilated": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, (3, 2), padding="same", dilation=(1, 3), groups=4), IMAGE),
    "conv2d pointwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding=1), IMAGE),
    "conv3d": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3, padding=(1, 0, 2), groups=2), torch.randn(2, 4, 3, 5, 4)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of an even kernel, torch pads once more
@pytest.mark.parametrize("kind", PADDED)
def test_on_request_it_pads_with_what_the_map_takes_to_zero(fold, kind):
    norm, layer, x = PADDED[kind]

    def no_zero(model):
        nn.init.constant_(model.norm.weight[-1:], -0.7)

    program, log = fold(FoldIntoReaders(pad=True), lambda m, x: m.layer(m.norm(x)), x, prepare=no_zero, layer=layer, norm=norm)
    assert len(log.applications) == 1 and program.count(aten.batch_norm.default) == 0
    (conv,) = (layer_of(node) for node in program.graph.nodes if layer_of(node))
    assert not any(map(any, conv.padding))


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.conv(x * 3 - 2), lambda m, x: m.conv(x * m.s + 2), lambda m, x: m.conv(x[0] + m.s)]
)
def test_one_number_for_all_and_an_image_without_a_batch_are_padded_too(fold, forward):
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "s": nn.Parameter(torch.randn(4, 1, 1))}
    _, log = fold(FoldIntoReaders(pad=True), forward, IMAGE, **parts)
    assert log.applications


def test_padding_with_zeros_is_what_keeps_the_border_right(randomized, monkeypatch):
    monkeypatch.setattr(layers, "_quotient", lambda op, t, s: 0.0)
    model = randomized(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 3, padding=1)))
    program, context = capture(model, (IMAGE,)), Context()
    FoldIntoReaders(pad=True).run(program, context)
    assert not context.log.applications and "does not hold here" in context.log.refusals[0].reason


def test_by_default_the_request_is_named(fold):
    _, log = fold(
        FoldIntoReaders(), lambda m, x: m.layer(m.norm(x)), IMAGE, layer=nn.Conv2d(4, 6, 3, padding=1), norm=nn.BatchNorm2d(4)
    )
    assert log.refusals[0].reason == (
        "aten.conv2d at layer pads with zeros, to which the shift has not been added "
        "(pad=True pads with what becomes zero, at the price of a copy)"
    )


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, padding=1)])
def test_a_zero_factor_and_a_transposed_convolution_have_no_such_border(randomized, layer):
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), layer))
    with torch.no_grad():
        model[0].weight[2] = 0.0
    program, context = capture(model, (IMAGE,)), Context()
    FoldIntoReaders(pad=True).run(program, context)
    sentence = (
        "overlaps unequally" if isinstance(layer, nn.ConvTranspose2d) else "no entry is mapped to zero where the factor is zero"
    )
    assert not context.log.applications and sentence in context.log.refusals[0].reason


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


class OnlineNorm(nn.Module):
    """y = clamp((x - mu) / sqrt(var + eps)) with the running statistics of arXiv:1905.05894, or its layer scaling."""

    def __init__(self, scaling=False):
        super().__init__()
        self.register_buffer("mu", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.2)
        self.scaling = scaling

    def forward(self, x):
        y = (x - self.mu) / torch.sqrt(self.var + 1e-5)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) if self.scaling else y.clamp(-0.5, 0.5)


def test_online_normalization_folds_up_to_its_clamp(fold):
    parts = {"up": nn.Linear(4, 6), "norm": OnlineNorm(), "down": nn.Linear(6, 3)}
    program, log = fold(FoldIntoWriter(), lambda m, x: m.down(m.norm(m.up(x))), TOKENS, **parts)
    assert len(log.applications) == 2 and not log.refusals
    (y,) = program.output.all_input_nodes
    assert [y.target, (y := y.args[0]).target, y.args[0].target] == [aten.linear.default, aten.clamp.default, aten.linear.default]


def test_the_layer_scaling_of_online_normalization_stays(fold):
    parts = {"up": nn.Linear(4, 6), "norm": OnlineNorm(scaling=True), "down": nn.Linear(6, 3)}
    program, log = fold(FoldIntoWriter(), lambda m, x: m.down(m.norm(m.up(x))), TOKENS, **parts)
    assert len(log.applications) == 2
    assert program.count(aten.rsqrt.default) == 1 and program.count(aten.div.Tensor) == program.count(aten.sub.Tensor) == 0


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
