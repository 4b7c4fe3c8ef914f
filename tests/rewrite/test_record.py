"""The eager run sees everything and changes nothing."""

from __future__ import annotations

import collections
import random

import pytest
import torch
from torch import nn

from tautomer.rewrite.record import Snapshot, clone_leaves, eager, record, silence, undisturbed


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return {"y": self.inner(self.inner(x)), "n": 2}


def test_calls_inputs_and_outputs():
    model, x = Twice(), torch.randn(2, 3)
    recording = record(model, (x,), {}, keep_inputs=True)
    assert recording.calls == {"": 1, "inner": 2} and recording.effects == ()
    assert torch.equal(recording.inputs["inner"][0][0], x) and recording.inputs["inner"][0][0] is not x
    assert torch.equal(recording.outputs[0], model.inner(model.inner(x))) and recording.outputs[1] == 2
    assert record(model, (x,), {}).inputs == {}
    assert not model.inner._forward_pre_hooks


def test_two_runs_draw_the_same():
    model = nn.Dropout(0.5)
    x = torch.ones(64)
    assert torch.equal(eager(model, (x,), {})[0], record(model, (x,), {}).outputs[0])


def test_parameters_are_copied_only_when_written():
    model = nn.Linear(3, 3)
    snapshot = Snapshot(model)
    before = model.weight.detach().clone()
    with snapshot.guarding(), torch.no_grad():
        model(torch.ones(1, 3))
        assert not snapshot.copies
        model.weight.view(-1)[0:2].zero_()
        assert len(snapshot.copies) == 1
    snapshot.restore()
    assert torch.equal(model.weight, before)


def test_containers_and_plain_objects_are_put_back():
    class Plain:
        count = 0

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.names, self.plain, self.order = [], {"a"}, Plain(), collections.OrderedDict(a=1)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.seen.append(x)
            self.names.add("b")
            self.plain.count += 1
            self.order["b"] = 2
            self.steps = self.steps + 1
            return x

    model = Keeps()
    steps = model.steps
    recording = record(model, (torch.ones(1),), {})
    assert model.seen == [] and model.names == {"a"} and model.plain.count == 0 and list(model.order) == ["a"]
    assert model.steps is steps and float(steps) == 0
    assert set(recording.effects) == {"self.seen", "self.names", "self.plain", "self.order"}


def test_generators_are_restored_after_an_error():
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError, match="x"), undisturbed(nn.Module()):
        torch.rand(3)
        random.random()
        raise ValueError("x")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_clones_are_apart_and_keep_what_they_are():
    x = torch.ones(2, requires_grad=True)
    a, b, c = clone_leaves((x, x, 3))
    assert a is not b and a.requires_grad and a.is_leaf and c == 3


def test_silence(capsys):
    with silence():
        print("a dump")
    assert capsys.readouterr().out == ""
