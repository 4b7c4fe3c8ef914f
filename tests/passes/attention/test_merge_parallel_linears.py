"""q, k and v become one product and a split, weights stored either way; a shared or tied weight stays where it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

import tautomer
from tautomer.passes.attention.merge_parallel_linears import MergeParallelLinears
from tautomer.passes.recipes import Inference, Recipe
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
X = torch.randn(2, 5, 8)


class Attention(nn.Module):
    """Grouped heads: two of q, one of k and v."""

    def __init__(self, biases=(True, True, True)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size, bias=bias) for size, bias in zip((8, 4, 4), biases, strict=True))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def run(model, context=None):
    program, context = capture(model.eval(), (X,)), context or Context()
    original = program.copy()
    MergeParallelLinears().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize("bias", [True, False])
def test_three_become_one(bias):
    program, log = run(Attention((bias, bias, bias)))
    assert program.count(aten.linear.default) == 2
    (split,) = program.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    assert split.args[1:] == ([8, 4, 4], -1)
    assert log.applications[0].note == "with k, v" and log.applications[0].error <= 1e-12


def test_gate_and_up_become_one():
    program, _ = run(Function(lambda m, x: silu(linear(x, m.a)) * linear(x, m.b)))
    assert program.count(aten.linear.default) == 1


def test_weights_stored_transposed_are_merged_too():
    program, _ = run(Function(lambda m, x: x @ m.a + (x @ m.b).tanh()))
    assert program.count(aten.linear.default) == 1


def test_the_one_without_a_bias_stays():
    program, log = run(Attention((True, False, True)))
    assert program.count(aten.linear.default) == 3
    assert log.applications[0].note == "with v"


def test_a_weight_with_another_reader_is_not_stored_twice():
    program, log = run(Function(lambda m, x: linear(linear(x, m.a) + linear(x, m.b).tanh(), m.a)))
    assert not log.applications and program.count(aten.linear.default) == 3
    assert "'a' would be stored twice" in log.refusals[0].reason


def test_one_weight_for_two_layers_is_refused():
    _, log = run(Function(lambda m, x: linear(x, m.a).tanh() + linear(x, m.a)))
    assert log.refusals[0].reason == "the layers share a weight, which would be stored twice"


def test_a_layer_that_reads_another_tensor_stays():
    _, log = run(Function(lambda m, x: linear(x, m.a) + linear(x.tanh(), m.b)))
    assert not log.applications and not log.refusals


def test_it_can_be_skipped_and_runs_out_of_fuel():
    for context in (Context(skip=("q",)), Context(fuel=0)):
        assert not run(Attention(), context)[1].applications


def test_a_reader_downstream_reads_a_part_with_its_strides():
    program, _ = run(Function(lambda m, x: linear(x, m.a).view(2, 40) + linear(x, m.b).view(2, 40)))
    (reshape, _) = program.graph.find_nodes(op="call_function", target=aten.reshape.default)
    assert reshape.args[0].meta["val"].stride() == (80, 16, 1)


def test_gradients_reach_the_weights_that_were_merged_and_a_second_run_changes_nothing():
    fast = tautomer.optimize(Attention().eval(), (X,), passes=["merge-parallel-linears", "drop-unused-weights"])
    assert fast.report.evidence.gradient <= 1e-10
    assert not any(name.startswith(("k.", "v.")) for name in fast.state_dict())
    assert not tautomer.optimize(fast, (X,), passes=["merge-parallel-linears"]).report.applications


def test_a_target_that_measured_no_gain_leaves_the_layers_alone():
    class Merging(Recipe):
        name = "merging"

        def passes(self):
            return (MergeParallelLinears(),)

    fast = tautomer.optimize(Attention().eval(), (X,), recipe=Merging(), target="onnxruntime")
    assert not fast.report.applications
    assert "does not pay on onnxruntime: 3 linear layers take" in fast.report.refusals[0].reason
    assert not any(isinstance(rewrite, MergeParallelLinears) for rewrite in Inference().passes())
