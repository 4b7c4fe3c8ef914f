"""Metadata is asked once per question, strides included, and never specialises a size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite._torch import no_new_guards
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.metadata import Metadata, difference

aten = torch.ops.aten


def fakes():
    program = capture(nn.Linear(4, 3), (torch.randn(5, 4),))
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    return Metadata(program.fake_mode), values["input"] if "input" in values else values[program.placeholders[0].name]


def test_a_question_is_asked_once():
    metadata, x = fakes()
    asked = []
    run = metadata._run
    metadata._run = lambda *question: asked.append(question) or run(*question)
    first = metadata.call(aten.mul.Tensor, (x, 2), {})
    assert metadata.call(aten.mul.Tensor, (x, 2), {}) is first
    assert len(asked) == 1
    metadata.call(aten.mul.Tensor, (x, 2.0), {})
    assert len(asked) == 2, "2 and 2.0 promote differently"


def test_strides_are_part_of_the_question():
    metadata, x = fakes()
    transposed = metadata.call(aten.t.default, (x,), {})
    square = metadata.call(aten.matmul.default, (transposed, x), {})
    other = metadata.call(aten.t.default, (square,), {})
    assert not metadata.agree(square, other)
    assert difference(square, other) is None, "a reader of values cannot tell"


def test_symbolic_sizes_are_propagated_without_guards():
    metadata, x = fakes()
    with no_new_guards(metadata.mode):
        assert str(metadata.call(aten.mean.dim, (x, [-1], True), {}).shape[0]) == str(x.shape[0])


def test_an_impossible_call_is_refused_in_one_sentence():
    metadata, x = Metadata(None), torch.empty(2, 3, device="meta")
    with pytest.raises(Refused, match=r"linear.default\(.*\) is impossible") as refusal:
        metadata.call(aten.linear.default, (x, x.t()), {})
    assert "\n" not in str(refusal.value)


def test_differences_are_phrases():
    a = torch.empty(2, 3, device="meta")
    assert difference(a, a.double()) == "torch.float32 became torch.float64"
    assert difference(a, a[:1]) == "shape [2, 3] became [1, 3]"
    assert difference(a, None) == "Tensor became NoneType"
    assert difference((a, a), (a, a)) is None
