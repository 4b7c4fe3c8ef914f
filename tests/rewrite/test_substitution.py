"""New nodes stand for old ones: strides are followed downstream, what cannot run is refused, what is dead goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.metadata import Metadata
from tautomer.rewrite.substitution import compare, erase_dead, follow

aten = torch.ops.aten


class Model(nn.Module):
    def forward(self, x):
        return (x + 1).tanh().exp()


def program_of():
    program = capture(Model(), (torch.ones(4, 3, 2),))
    return program, Metadata(program.fake_mode), [node for node in program.graph.nodes if node.op == "call_function"]


def transposed(program, node):
    """The metadata of ``node`` in another order of memory."""
    with program.fake_mode:
        return torch.empty_permuted(tuple(node.meta["val"].shape), [0, 2, 1])


def test_it_stops_where_nothing_changes():
    program, metadata, (add, tanh, exp) = program_of()
    assert follow({}, [tanh], metadata) == {}
    changed = follow({add: transposed(program, add)}, [tanh], metadata)
    assert list(changed) == [add, tanh, exp]
    assert changed[exp].stride()[1:] == (1, 3)


def test_another_shape_is_refused_at_once_and_downstream():
    _, metadata, (add, tanh, exp) = program_of()
    tanh.target, tanh.args = aten.sum.dim_IntList, (add, [-1])
    with pytest.raises(Refused, match=r"aten\.sum' downstream would change: shape"):
        follow({}, [tanh], metadata)
    tanh.meta["val"] = metadata.call(tanh.target, tanh.args, {})
    with pytest.raises(Refused, match="the result would change: shape"):
        compare([exp], [tanh], metadata)


def test_erase_dead_keeps_inputs_and_effects():
    program = program_of()[0]
    output = program.output.args[0][0]
    program.output.args = ((program.placeholders[0],),)
    assert [node.name for node in erase_dead(program.graph, [output])] == ["exp", "tanh", "add"]
    assert program.placeholders
