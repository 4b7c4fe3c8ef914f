"""A program written in the vocabulary computes what was written, from weights that are parameters."""

from __future__ import annotations

import pytest
import torch

from tautomer.rewrite.compose import compose
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.interpret import interpret

W, b, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)


def test_it_computes_what_is_written():
    program = compose("Twice", {"W": W, "b": b}, {"x": x}, lambda op, at: [op.linear(at["x"], at["W"], at["b"]), op.neg(at["x"])])
    y, z = interpret(program, program.example)
    assert torch.equal(y, torch.nn.functional.linear(x, W, b)) and torch.equal(z, -x)
    assert program.weights["W"].kind == "parameter" and program.name == "Twice"
    assert program.signature.unflatten(["y", "z"]) == ("y", "z")
    (flat,) = program.signature.bind((x,), {})
    assert flat is x


def test_what_reads_weights_alone_is_a_weight():
    program = compose("Scaled", {"W": W, "b": b}, {"x": x}, lambda op, at: [op.linear(at["x"], op.mul(at["W"], 2.0), None)])
    assert program.count(torch.ops.aten.mul.Tensor) == 0 and program.count(torch.ops.aten.linear.default) == 1
    torch.testing.assert_close(interpret(program, program.example)[0], 2 * x @ W.T)


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(Refused):
        compose("Wrong", {"W": W}, {"x": torch.randn(2, 5)}, lambda op, at: [op.linear(at["x"], at["W"], None)])
