"""A section has one way in and one way out, is the smallest, and computes what the program computes there."""

from __future__ import annotations

import networkx
import torch
from torch import Tensor, fx, nn

from tautomer.rewrite.blocks import repeated
from tautomer.rewrite.capture import capture
from tautomer.rewrite.dominators import carries_data, smallest_section
from tautomer.rewrite.interpret import Interpretation, interpret
from tautomer.rewrite.program import Program

aten = torch.ops.aten
D = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(D), nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        y = (y @ y.mT).masked_fill(~mask, -1e9).softmax(-1) @ y
        return x + self.outer(self.inner(y).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layers, self.head = nn.Embedding(20, D), nn.ModuleList(Layer() for _ in range(3)), nn.Linear(D, 20)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (ids != 0)[:, None]
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


IDS = torch.randint(20, (2, 7))


def program() -> Program:
    return capture(Model().eval(), (IDS,))


def find(found: Program, target: object) -> list[fx.Node]:
    return found.graph.find_nodes(op="call_function", target=target)


def test_masks_carry_no_data() -> None:
    found = program()
    data = carries_data(found)
    assert not {n for n in data if n.meta["val"].dtype is torch.bool}
    assert set(find(found, aten.linear.default)) <= data and found.placeholders[0] not in data


def test_a_block_is_a_section_and_the_mask_its_context() -> None:
    found = program()
    for block in repeated(found)[0]:
        section = smallest_section(found, block.nodes)
        assert section is not None
        assert (section.entry, section.exit) == (block.inputs[0], block.outputs[0])
        assert set(section.context) == set(block.inputs[1:]) != set()


def test_it_is_the_smallest() -> None:
    """Against the definition, tried on every pair of values."""
    found = program()
    data = carries_data(found)
    flow = networkx.DiGraph((x, n) for n in data for x in n.all_input_nodes if x in data)
    order = [node for node in found.graph.nodes if node in data]

    def section_of(entry: fx.Node, exit: fx.Node) -> set[fx.Node] | None:
        if not networkx.has_path(flow, entry, exit) or entry is exit:
            return None
        nodes = (networkx.descendants(flow, entry) & networkx.ancestors(flow, exit)) | {exit}
        closed = all(x is entry or x in nodes for n in nodes for x in flow.predecessors(n))
        leaves = all(n is exit or set(n.users) <= nodes for n in nodes)
        return nodes if closed and leaves else None

    all_sections = [s for a in order for b in order if (s := section_of(a, b)) is not None]
    for wanted in ([order[i], order[i + 2]] for i in range(len(order) - 2)):
        holding = [s for s in all_sections if set(wanted) <= s]
        section = smallest_section(found, wanted)
        assert (section is None) == (not holding)
        if section is not None:
            assert set(section.block.nodes) & data == min(holding, key=len)


def test_a_section_computes_its_exit_from_its_entry_and_context() -> None:
    found, values = program(), dict[str, Tensor]()
    section = smallest_section(found, find(found, aten.softmax.int)[1:2])
    assert section is not None
    interpret(found, found.example, observe=lambda node, value: values.update({node.name: value}))
    run = Interpretation(found, None, found.weights.value, noise=False)
    run.values |= {node: values[node.name] for node in (section.entry, *section.context)}
    for node in section.block.nodes:
        run.values[node] = run.step(node)
    assert torch.equal(run.values[section.exit], values[section.exit.name])


def test_the_whole_program_is_no_section_of_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.sin() * y.cos()).exp()

    found = capture(Two().eval(), (torch.randn(3), torch.randn(3)))
    assert smallest_section(found, find(found, aten.mul.Tensor)) is None
    section = smallest_section(found, find(found, aten.exp.default))
    assert section is not None and section.entry.target is aten.mul.Tensor
    assert smallest_section(found, []) is None
