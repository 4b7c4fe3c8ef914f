"""A backward of the user's own: a graph that would lose it is refused for training, and said of one that is only run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import tautomer
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import CaptureError


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Square(Function):
    """Its backward is the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.function = function

    def inner(self, x):
        return self.after(self.norm(x)).relu()

    def forward(self, x):
        x = self.before(x)
        return x + self.function(self, x)


def reentrant(model, x):
    return checkpoint(model.inner, x, use_reentrant=True)


def halved(model, x):
    y = model.inner(x)
    if y.requires_grad:
        y.register_hook(lambda g: g / 2)
    return y


def watched(model, x):
    y = model.inner(x)
    if y.requires_grad:
        y.register_hook(lambda g: None)
    return y


X = torch.randn(3, 8)


def gradients(model):
    model.zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the eager run without gradients
@pytest.mark.parametrize(
    "function", [reentrant, watched, lambda model, x: Square.apply(model.inner(x))], ids=["reentrant", "watched", "derivative"]
)
def test_what_is_the_derivative_is_captured_with_it(function):
    model = Model(function)
    rewritten = tautomer.optimize(model, (X,), recipe="training")
    for name, gradient in gradients(rewritten).items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, gradients(model)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_without_the_plain_call_a_reentrant_checkpoint_loses_its_gradients():
    exported = torch.export.export(Model(reentrant), (X,), strict=False).module()
    assert not exported(X).requires_grad


def test_another_gradient_is_refused_for_training():
    bound = StraightThrough.apply
    with pytest.raises(CaptureError, match="drops the backward of 'StraightThrough'") as caught:
        tautomer.optimize(Model(lambda model, x: bound(model.inner(x))), (X,), recipe="training")
    assert "test_functions.py" in str(caught.value) and "def backward" in str(caught.value)


@pytest.mark.parametrize("mode", ["train", "both"])
def test_a_hook_that_changes_the_gradient_is_refused(mode):
    with pytest.raises(CaptureError, match="drops hooks on gradients"):
        capture(Model(halved), (X,), mode=mode)


def test_a_module_hook_that_changes_the_gradient_is_refused():
    model = Model(Model.inner)
    model.norm.register_full_backward_hook(lambda module, received, given: (received[0] * 2,))
    with pytest.raises(CaptureError, match="drops hooks on gradients"):
        capture(model, (X,), mode="train")
    assert model(X).requires_grad


def test_a_model_that_is_only_run_is_told():
    program = capture(Model(lambda model, x: StraightThrough.apply(x)).eval(), (X,))
    assert program.notes == [
        "the backward of 'StraightThrough' is not part of the program: its gradients are those of its forward"
    ]
    same = Model(lambda model, x: Square.apply(x))
    assert capture(same.eval(), (X,)).notes == capture(Model(Model.inner).eval(), (X,)).notes == []


class Clamped(nn.Linear):
    """Keeps its weight small, as a constraint on norms does."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


def test_a_weight_written_under_no_grad_would_lose_its_gradient():
    model = Clamped(8, 8)
    with pytest.raises(CaptureError, match="written under no_grad"):
        capture(model, (X,), mode="train")
    assert model.weight.abs().max() > 0.2
    assert capture(model.requires_grad_(False), (X,), mode="train").mode == "train"


class Accumulates(nn.Module):
    """A buffer takes in what has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x):
        self.total.add_(self.linear(x).sum(0))
        return x * self.total


def test_a_buffer_that_took_in_a_gradient_is_what_it_was():
    model = Accumulates()
    capture(model, (X,), mode="train")
    assert model.total.is_leaf and not model.total.any()


class Transposed(nn.Module):
    """In canonical form its output has other strides."""

    def forward(self, x):
        return torch.cat([torch.empty(0), x.transpose(1, 2)], -1) + 1.5


def test_gradients_are_compared_along_the_same_direction_whatever_the_strides():
    model, x = Transposed(), torch.randn(2, 3, 4)
    program = capture(model, (x,), mode="train")
    assert program.output.args[0][0].meta["val"].stride() != model(x).stride()


def test_the_comparison_leaves_no_gradients_behind():
    model = Model(Model.inner)
    model.after.weight.requires_grad_(False)
    capture(model, (X,), mode="both")
    assert all(p.grad is None for p in model.parameters())
    assert not model.after.weight.requires_grad
