"""One program for both modes: the flags of the modules decide, as in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tautomer.rewrite.capture as capturing
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import CaptureError, UsageError
from tautomer.rewrite.interpret import interpret

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.more = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AlphaDropout(0.2))
        self.attend = Attend()

    def forward(self, x):
        return self.attend(self.more(self.conv(x)).flatten(2).transpose(1, 2))


class Attend(nn.Module):
    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.25 if self.training else 0.0)
        return nn.functional.dropout(y, 0.5, self.training)


def both(program, x, model):
    flags = {path: model.get_submodule(path).training for path in program.training}
    program.training = flags
    torch.manual_seed(7)
    return interpret(program, [x])[0]


@pytest.mark.parametrize("start", [True, False])
def test_train_and_eval(start):
    torch.manual_seed(0)
    model = Net().train(start)
    program = capture(model, (torch.randn(2, 3, 8, 8),), mode="both")
    assert program.mode == "both" and program.notes == []
    assert program.training == dict.fromkeys(["conv.1", "conv.3", "more.1", "more.2", "attend"], start)
    x = torch.randn(3, 3, 8, 8)
    for training in (True, False):
        model.train(training)
        mine = both(program, x, model)
        torch.manual_seed(7)
        torch.testing.assert_close(mine, _run_on_a_copy(model, x), rtol=1e-6, atol=1e-6)


def test_a_frozen_batch_norm_stays_frozen():
    torch.manual_seed(0)
    model = Net()
    model.conv[1].eval()
    program = capture(model, (torch.randn(2, 3, 8, 8),), mode="both")
    assert program.training["conv.1"] is False and program.training["more.1"] is True
    x = torch.randn(3, 3, 8, 8)
    mine = both(program, x, model)
    torch.manual_seed(7)
    torch.testing.assert_close(mine, _run_on_a_copy(model, x), rtol=1e-6, atol=1e-6)
    assert not model.conv[1].training and model.more[1].training


def test_the_statistics_move_as_in_the_model():
    torch.manual_seed(0)
    model = Net()
    program = capture(model, (torch.randn(2, 3, 8, 8),), mode="both")
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    seen = {}

    def observe(node, value):
        if node.op == "get_attr" and node.target in buffers:
            seen[str(node.target)] = value

    x = torch.randn(3, 3, 8, 8)
    for training in (True, False, True):
        model.train(training)
        program.training = dict.fromkeys(program.training, training)
        seen.clear()
        interpret(program, [x], weight=lambda name: {**dict(model.named_parameters()), **buffers}[name], observe=observe)
        assert all(torch.equal(value, buffers[name]) for name, value in seen.items()) != training


def test_reversed_flag():
    class Inverse(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, not self.training)

    model = Inverse()
    program = capture(model, (torch.ones(4, 4),), mode="both")
    program.training = {"": True}
    assert torch.equal(interpret(program, [torch.ones(4, 4)])[0], torch.ones(4, 4))
    program.training = {"": False}
    assert not torch.equal(interpret(program, [torch.ones(4, 4)])[0], torch.ones(4, 4))


def test_what_does_not_merge_keeps_the_current_mode_and_says_so():
    class Differs(nn.Module):
        def forward(self, x):
            return x + torch.rand(x.shape[0], 1) if self.training else x

    program = capture(Differs().eval(), (torch.ones(4, 4),), mode="both")
    assert program.mode == "eval" and "captured for eval mode only: train mode computes aten.rand" in program.notes[0]


def test_a_single_mode_that_the_model_is_not_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    program = capture(model, (torch.randn(4, 4),), mode="train")
    assert program.mode == "train" and program.count(aten.dropout.default) == 1 and not model.training
    assert capture(model.train(), (torch.randn(4, 4),), mode="eval").count(aten.dropout.default) == 0 and model.training


def _run_on_a_copy(model, x):
    state = torch.get_rng_state()
    twin = copy.deepcopy(model)
    torch.set_rng_state(state)
    return twin(x)


def test_an_output_of_another_structure_in_the_other_mode():
    class Auxiliary(nn.Module):
        def forward(self, x):
            return (x, x * 2) if self.training else x

    program = capture(Auxiliary().eval(), (torch.ones(2, 3),), mode="train")
    first, second = program.signature.unflatten(interpret(program, [torch.ones(2, 3)]))
    assert torch.equal(second, 2 * first)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("model", "mode", "flags"),
    [(plain().eval(), "both", 0), (dropping().eval(), "eval", 0), (dropping().train(), "both", 1), (plain().train(), "both", 0)],
)
def test_the_widest_mode_takes_two_exports_whatever_it_is(model, mode, flags, monkeypatch) -> None:
    made, x = list[bool](), (torch.randn(3, 4),)
    wanted, export = capture(model, x, mode=mode), capturing.export
    monkeypatch.setattr(capturing, "export", lambda m, *args, **kwargs: made.append(m.training) or export(m, *args, **kwargs))
    program = capture(model, x, mode="widest")
    assert made == [True, False] and (program.mode, len(program.training)) == (mode, flags)
    assert str(program.graph) == str(wanted.graph) and program.notes == wanted.notes


def test_the_widest_mode_of_what_cannot_be_captured_in_both() -> None:
    class Decides(nn.Module):
        def forward(self, x):
            return x + 1 if not self.training or x.sum() > 0 else x

    assert capture(Decides().eval(), (torch.ones(2, 3),), mode="widest").mode == "eval"
    with pytest.raises(CaptureError):
        capture(Decides().train(), (torch.ones(2, 3),), mode="widest")
    with pytest.raises(UsageError, match="in training mode and has batch normalisation"):
        capture(nn.Sequential(Decides(), nn.BatchNorm1d(3)).train(), (torch.ones(2, 3),), mode="widest")
