"""P f(x1, .., xk) = f(P x1, .., P xk) for every op that claims to carry an axis, checked by running both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.axes import Axes, Value, blind, rank
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.program import Program

B, S, D = 2, 3, 8


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*xs)


def program(function: Callable[..., Tensor], *xs: Tensor) -> Program:
    return capture(Lambda(function).eval(), xs, dynamic_shapes="static")


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, S, D)), dtype=torch.float64)


def centre(value: Tensor, axis: int) -> Tensor:
    return value - value.mean(axis, keepdim=True)


mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)

CARRIES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int, set[int]]] = {
    # name: function, inputs, axis of the result, the inputs that must carry it
    "add": (lambda a, b: a + b, (x(), x()), 2, {0, 1}),
    "add with alpha": (lambda a, b: torch.add(a, b, alpha=0.3), (x(), x(S, D)), 2, {0, 1}),
    "sub": (lambda a, b: a - b, (x(), x()), 2, {0, 1}),
    "add zero": (lambda a: a + torch.zeros(1, dtype=a.dtype), (x(),), 2, {0}),
    "scale": (lambda a: a * 3.0 / 2.0, (x(),), 2, {0}),
    "mask per token": (lambda a, m: a * m.unsqueeze(-1), (x(), mask), 2, {0}),
    "mask expanded": (lambda a, m: a * m.unsqueeze(-1).expand(B, S, D), (x(), mask), 2, {0}),
    "divide per token": (lambda a, m: a / (m.unsqueeze(-1) + 1), (x(), mask), 2, {0}),
    "where": (lambda a, b, m: torch.where(m.unsqueeze(-1) > 0, a, b), (x(), x(), mask), 2, {0, 1}),
    "masked fill": (lambda a, m: a.masked_fill(m.unsqueeze(-1) > 0, 0.0), (x(), mask), 2, {0}),
    "reshape heads away": (lambda a: a.reshape(B * S, D), (x(),), 1, {0}),
    "flatten image": (lambda a: a.flatten(2).transpose(1, 2), (x(B, D, 2, 2),), 2, {0}),
    "permute": (lambda a: a.permute(2, 0, 1), (x(),), 0, {0}),
    "unsqueeze": (lambda a: a.unsqueeze(1), (x(),), 3, {0}),
    "squeeze": (lambda a: a.squeeze(1), (x(B, 1, D),), 1, {0}),
    "expand": (lambda a: a.expand(B, S, D), (x(1, 1, D),), 2, {0}),
    "repeat": (lambda a: a.repeat(B, 1, 1), (x(1, S, D),), 2, {0}),
    "slice": (lambda a: a[:, 1:], (x(),), 2, {0}),
    "select": (lambda a: a[:, 0], (x(),), 1, {0}),
    "index": (lambda a: a[torch.arange(B), torch.tensor([0, 2])], (x(),), 1, {0}),
    "index select": (lambda a: a.index_select(1, torch.tensor([2, 0])), (x(),), 2, {0}),
    "cat tokens": (lambda a, b: torch.cat([a, b], 1), (x(), x()), 2, {0, 1}),
    "stack": (lambda a, b: torch.stack([a, b], 1), (x(), x()), 3, {0, 1}),
    "split": (lambda a: a.split([1, 2], 1)[1], (x(),), 2, {0}),
    "unbind": (lambda a: a.unbind(1)[1], (x(),), 1, {0}),
    "roll": (lambda a: a.roll(1, 1), (x(),), 2, {0}),
    "flip": (lambda a: a.flip(1), (x(),), 2, {0}),
    "cumsum": (lambda a: a.cumsum(1), (x(),), 2, {0}),
    "pool tokens": (lambda a: a.mean(1), (x(),), 1, {0}),
    "sum tokens, kept": (lambda a: a.sum(1, keepdim=True), (x(),), 2, {0}),
    "average pool": (lambda a: F.avg_pool2d(a, 2), (x(B, D, 4, 4),), 1, {0}),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2.0, mode="bilinear"), (x(B, D, 4, 4),), 1, {0}),
    "pad tokens": (lambda a: F.pad(a, (0, 0, 1, 1)), (x(),), 2, {0}),
    "cast": (lambda a: a.to(torch.float32).to(torch.float64), (x(),), 2, {0}),
    "linear": (lambda a, w, b: F.linear(a, w, b), (x(), x(5, D), x(5)), 2, {1, 2}),
    "linear over tokens": (lambda a, w: F.linear(a.transpose(1, 2), w), (x(), x(S, S)), 1, {0}),
    "addmm": (lambda a, w, b: torch.addmm(b, a, w), (x(S, D), x(D, 5), x(5)), 1, {1, 2}),
    "matmul": (lambda a, w: a @ w, (x(), x(D, 5)), 2, {1}),
    "matmul over tokens": (lambda p, a: p @ a, (x(B, S, S), x()), 2, {1}),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2]]), w), (x(4, D),), 2, {0}),
    "conv": (lambda a, w, b: F.conv2d(a, w, b), (x(B, 3, 4, 4), x(D, 3, 2, 2), x(D)), 1, {1, 2}),
    "conv1d": (lambda a, w: F.conv1d(a, w, padding=1), (x(B, 3, 4), x(D, 3, 3)), 1, {1}),
    "transposed conv": (lambda a, w: F.conv_transpose2d(a, w), (x(B, 3, 4, 4), x(3, D, 2, 2)), 1, {1}),
    "layer norm, no gain": (lambda a: F.layer_norm(a, [D]), (x(),), 2, set()),
    "rotary over heads": (lambda a, c, s: tautomer.rotary.v1(a, c, s), (x(B, 4, S, D), x(S, D), x(S, D)), 1, {0}),
    "layer norm, shift": (lambda a, b: F.layer_norm(a, [D], None, b), (x(), x(D)), 2, {1}),
}  # fmt: skip


def closure(facts: Axes, value: Value) -> set[Value] | None:
    """The inputs that must be centred for ``value`` to be, through every op between; None if no choice will do."""
    if value.node.op == "placeholder":
        return {value}
    carriers = facts.carriers(value)
    if carriers is None:
        return None
    found = [closure(facts, carrier) for carrier in carriers]
    return None if any(f is None for f in found) else {v for f in found for v in f or ()}


@pytest.mark.parametrize("name", CARRIES)
def test_carried_axes_commute_with_centring(name: str) -> None:
    function, inputs, axis, expected = CARRIES[name]
    captured = program(function, *inputs)
    result = captured.output.args[0][0]
    carriers = closure(Axes(captured), Value(result, axis))
    assert carriers is not None
    assert {captured.placeholders.index(v.node) for v in carriers} == expected
    moved = list(inputs)
    for value in carriers:
        index = captured.placeholders.index(value.node)
        moved[index] = centre(inputs[index], value.axis)
    (plain,), (centred,) = interpret(captured, inputs), interpret(captured, moved)
    exact = 1e-6 if "cast" in name else 1e-12
    torch.testing.assert_close(centred, centre(plain, axis), rtol=0, atol=exact)


BARRIERS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "gelu": (F.gelu, (x(),), 2),
    "gain per channel": (lambda a, g: a * g, (x(), x(D)), 2),
    "gate": (lambda a, b: a * b, (x(), x()), 2),
    "add a constant along the axis": (lambda a, m: a + m.unsqueeze(-1), (x(), mask), 2),
    "add one": (lambda a: a + 1.0, (x(),), 2),
    "divide by": (lambda a: 1.0 / a, (x(),), 2),
    "merge heads": (lambda a: a.reshape(B, S * D), (x(),), 1),
    "split heads": (lambda a: a.reshape(B, S, 2, D // 2), (x(),), 3),
    "cat features": (lambda a, b: torch.cat([a, b], -1), (x(), x()), 2),
    "slice features": (lambda a: a[..., 1:], (x(),), 2),
    "fill with one": (lambda a, m: a.masked_fill(m.unsqueeze(-1) > 0, 1.0), (x(), mask), 2),
    "pad with one": (lambda a: F.pad(a, (0, 0, 1, 1), value=1.0), (x(),), 2),
    "mask per feature": (lambda a, m: torch.where(m > 0, a, torch.zeros((), dtype=a.dtype)), (x(), x(D)), 2),
    "max pool": (lambda a: F.max_pool2d(a, 2), (x(B, D, 4, 4),), 1),
    "token max": (lambda a: a.amax(1), (x(),), 1),
    "depthwise conv": (lambda a, w: F.conv2d(a, w, groups=D), (x(B, D, 4, 4), x(D, 1, 2, 2)), 1),
    "layer norm with a gain": (lambda a, g: F.layer_norm(a, [D], g), (x(), x(D)), 2),
    "rms norm with a gain": (lambda a, g: F.rms_norm(a, [D], g), (x(), x(D)), 2),
    "rms norm, constant gain": (lambda a: F.rms_norm(a, [D], torch.full((D,), 2.0, dtype=a.dtype)), (x(),), 2),
    "dropout": (lambda a: F.dropout(a, 0.5, True), (x(),), 2),
    "softmax": (lambda a: a.softmax(-1), (x(),), 2),
    "rotary over channels": (lambda a, c, s: tautomer.rotary.v1(a, c, s), (x(), x(S, D), x(S, D)), 2),
    "rotary over positions": (lambda a, c, s: tautomer.rotary.v1(a, c, s), (x(), x(S, D), x(S, D)), 1),
    "gated unit": (lambda a, b: tautomer.glu.v1(a, b, "silu"), (x(), x()), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BARRIERS)
def test_barriers_carry_nothing(name: str) -> None:
    function, inputs, axis = BARRIERS[name]
    captured = program(function, *inputs)
    assert closure(Axes(captured), Value(captured.output.args[0][0], axis)) is None


def reader(captured: Program) -> tuple[Any, Value]:
    node = captured.placeholders[0]
    return next(iter(node.users)), Value(node, rank(node) - 1)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a: F.layer_norm(a, [D]), True),
        (lambda a: a.softmax(-1), True),
        (lambda a: torch.zeros_like(a), True),
        (lambda a: F.layer_norm(a, [S, D]), False),
        (lambda a: F.rms_norm(a, [D]), False),
        (lambda a: a.softmax(1), False),
        (lambda a: F.group_norm(a, 1), False),
        (lambda a: F.layer_norm(a, [D], a[0, 0]), False),
    ],
)
def test_blindness_is_for_one_free_constant_per_token(function: Callable[..., Tensor], expected: bool) -> None:
    value = x()
    captured = program(function, value)
    users = list(captured.placeholders[0].users)
    assert all(blind(user, Value(captured.placeholders[0], 2)) for user in users) is expected
    shifted = value + torch.randn(B, S, 1, dtype=torch.float64)
    (plain,), (moved,) = interpret(captured, [value]), interpret(captured, [shifted])
    assert torch.allclose(plain, moved, rtol=0, atol=1e-12) is expected
