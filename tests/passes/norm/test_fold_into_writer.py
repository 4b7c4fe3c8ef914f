"""A norm by stored statistics goes into the layer before it, whatever layer, whatever stands between; anything else stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.norm.fold_into_writer import FoldIntoWriter
from tautomer.rewrite.capture import capture
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 7, 6)
WRITERS = {
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(3, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), torch.randn(3, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), torch.randn(2, 4, 9)),
    "conv2d padded": (nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6), IMAGE),
    "conv2d reflecting": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(6), IMAGE),
    "conv2d in groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), IMAGE),
    "conv3d": (nn.Conv3d(4, 6, 2, padding=1, groups=2), nn.BatchNorm3d(6), torch.randn(2, 4, 3, 5, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), torch.randn(2, 4, 5)),
    "conv_transpose2d in groups": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6), IMAGE),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False), nn.BatchNorm3d(6), torch.randn(2, 4, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_batch_norm_goes_into_its_writer_and_leaves_no_trace(fold, kind):
    layer, norm, x = WRITERS[kind]
    program, log = fold(FoldIntoWriter(), lambda m, x: m.norm(m.layer(x)), x, layer=layer, norm=norm)
    assert len(log.applications) == 1
    assert program.count(aten.batch_norm.default) == 0
    assert {node.target for node in program.graph.find_nodes(op="get_attr")} <= {
        "layer.weight_1", "layer.bias_1", "layer.bias", *_unread(program)
    }  # fmt: skip


def _unread(program):
    return {node.target for node in program.graph.find_nodes(op="get_attr") if not node.users}


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.5}], ids=str)
def test_norms_without_gain_and_with_another_eps(fold, options):
    program, _ = fold(
        FoldIntoWriter(), lambda m, x: m.norm(m.layer(x)), IMAGE, layer=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6, **options)
    )
    assert program.count(aten.batch_norm.default) == 0


def test_instance_norm_by_stored_statistics(fold):
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    program, _ = fold(FoldIntoWriter(), lambda m, x: m.norm(m.layer(x)), IMAGE, layer=nn.Conv2d(4, 6, 3), norm=norm)
    assert program.count(aten.instance_norm.default) == 0


def parameters():
    return {name: nn.Parameter(torch.randn(6)) for name in ("g", "b")} | {"v": nn.Parameter(torch.rand(6) + 0.2, False)}


SPELLINGS = {
    "one factor": lambda m, y: y * (m.g / (m.v + 1e-5).sqrt()) + m.b,
    "normalise, then gain": lambda m, y: y / torch.sqrt(m.v + 1e-5) * m.g + m.b,
    "rsqrt from the left": lambda m, y: m.b + m.g * (torch.rsqrt(m.v + 1e-5) * y),
    "centred": lambda m, y: (y - m.b) * m.g,
    "negated": lambda m, y: m.b - y * m.g,
    "from a number": lambda m, y: (1 - y) * m.g,
    "a number": lambda m, y: y * 0.2,
    "a quotient": lambda m, y: y / 8 - 1,
    "one for all": lambda m, y: y * m.g[0] + m.b[:1],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_diagonal_map(fold, name, bias):
    body = SPELLINGS[name]
    program, log = fold(
        FoldIntoWriter(), lambda m, x: body(m, m.layer(x)), torch.randn(3, 5, 4), layer=nn.Linear(4, 6, bias=bias), **parameters()
    )
    assert log.applications and not log.refusals
    assert [node.target for node in program.output.all_input_nodes] == [aten.linear.default]


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
def test_a_scale_per_channel_of_a_convolution(fold, shape):
    program, _ = fold(
        FoldIntoWriter(), lambda m, x: m.layer(x) * m.s, IMAGE, layer=nn.Conv2d(4, 6, 3), s=nn.Parameter(torch.randn(shape))
    )
    assert program.count(aten.mul.Tensor) == 0
    assert program.weights["layer.weight_1"].meta.shape == (6, 4, 3, 3)


def test_without_a_bias_none_is_made_for_a_scale(fold):
    program, _ = fold(
        FoldIntoWriter(), lambda m, x: m.layer(x) * m.s, torch.randn(3, 4), layer=nn.Linear(4, 6, bias=False),
        s=nn.Parameter(torch.randn(6)),
    )  # fmt: skip
    assert not any("bias" in name for name in program.weights)


def test_a_weight_stored_transposed_stays_so(fold):
    program, _ = fold(
        FoldIntoWriter(), lambda m, x: x @ m.layer.weight * m.s, torch.randn(3, 6), layer=nn.Linear(4, 6, bias=False),
        s=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    assert program.count(aten.mul.Tensor) == 0
    assert program.weights["layer.weight_1"].meta.shape == (6, 4)


PARTS = {"a": nn.Conv2d(4, 6, 3, padding=1), "b": nn.Conv2d(4, 6, 1), "norm": nn.BatchNorm2d(6), "wide": nn.BatchNorm2d(12)}
BETWEEN = {
    "tokens last": (lambda m, x: m.one(m.linear(x).transpose(1, 2)).transpose(1, 2), torch.randn(2, 5, 4)),
    "flattened": (lambda m, x: m.one(m.a(x).flatten(2)), IMAGE),
    "pooled": (lambda m, x: m.one(m.a(x).mean((2, 3))), IMAGE),
    "two branches added": (lambda m, x: m.norm(m.a(x) + m.b(x)), IMAGE),
    "two branches joined": (lambda m, x: m.wide(torch.cat([m.a(x), m.b(x)], 1)), IMAGE),
    "joined along another axis": (lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 2)), IMAGE),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_only_moves_channels_about_may_stand_between(fold, name):
    forward, x = BETWEEN[name]
    parts = {**PARTS, "linear": nn.Linear(4, 6), "one": nn.BatchNorm1d(6)}
    program, log = fold(FoldIntoWriter(), forward, x, **parts)
    assert len(log.applications) == 1
    assert program.count(aten.batch_norm.default) == 0


# -- refused --------------------------------------------------------------------------------------------------


REFUSED = {
    "another reader": (lambda m, x: (y := m.a(x), m.norm(y))[1] + y, "aten.conv2d at a is also read by aten.add at add"),
    "an activation": (lambda m, x: m.norm(m.a(x).relu()), "what it scales is written by aten.relu at relu, which is no layer"),
    "the input": (lambda m, x: m.small(x), "what it scales is x, which no layer writes"),
    "a residual": (lambda m, x: m.small(m.c(x) + x), "what it scales is x, which no layer writes"),
    "one weight, two layers": (lambda m, x: m.norm(m.a(x)) + m.a(x + 1), "'a.weight' would be stored twice"),
    "pixels": (lambda m, x: m.a(x) * m.pixels, "the channels of aten.conv2d at a are on another axis"),
    "two axes": (lambda m, x: m.a(x) * m.plane, "has the shape [7, 6], not one number per channel"),
    "max pool": (lambda m, x: m.norm(F.max_pool2d(m.a(x), 2)), "aten.max_pool2d at max_pool2d, which is no layer"),
    "a weight from the input": (
        lambda m, x: m.norm(F.conv2d(x, m.a.weight * x.mean())), "the weight of aten.conv2d at conv2d is computed at run time"
    ),
    "no stored statistics": (lambda m, x: m.batch(m.a(x)), "the norm at batch uses the statistics of its batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_a_sentence(fold, name):
    forward, sentence = REFUSED[name]
    parts = {
        **PARTS, "small": nn.BatchNorm2d(4), "c": nn.Conv2d(4, 4, 1), "pixels": nn.Parameter(torch.randn(6)),
        "plane": nn.Parameter(torch.randn(7, 6)), "batch": nn.BatchNorm2d(6, track_running_stats=False),
    }  # fmt: skip
    _, log = fold(FoldIntoWriter(), forward, IMAGE, **parts)
    assert not log.applications
    assert sentence in log.refusals[0].reason


def test_in_both_modes_it_waits_for_eval(fold):
    _, log = fold(
        FoldIntoWriter(), lambda m, x: m.norm(m.layer(x)), IMAGE, mode="both", layer=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)
    )
    assert not log.applications
    assert "the norm at norm follows norm_training: in training it uses the statistics of its batch" in log.refusals[0].reason


def test_in_training_it_stays(fold):
    _, log = fold(
        FoldIntoWriter(), lambda m, x: m.norm(m.layer(x)), IMAGE, mode="train", layer=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)
    )
    assert not log.applications and "the statistics of its batch" in log.refusals[0].reason


def test_statistics_that_the_model_writes_are_no_weights(fold):
    def forward(m, x):
        y = m.norm(m.layer(x))
        m.norm.running_mean.mul_(0.9)
        return y

    _, log = fold(FoldIntoWriter(), forward, IMAGE, layer=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6))
    assert not log.applications and "is written or computed while the model runs" in log.refusals[0].reason


def test_shared_statistics_are_read_twice(fold):
    first, second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    second.running_var, second.running_mean = first.running_var, first.running_mean
    _, log = fold(
        FoldIntoWriter(), lambda m, x: m.n(m.a(x)) + m.o(m.b(x)).relu(), IMAGE, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(4, 6, 1),
        n=first, o=second,
    )  # fmt: skip
    assert len(log.applications) == 2


def test_half_precision_keeps_its_dtype(randomized):
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(torch.bfloat16)
    model[1].float()
    program, context = capture(model, (IMAGE.bfloat16(),)), Context()
    FoldIntoWriter().run(program, context)
    assert len(context.log.applications) == 1
    assert {program.weights[f"0.{name}_1"].meta.dtype for name in ("weight", "bias")} == {torch.bfloat16}
