"""A program: an fx graph, its weights, and how it is called.

The fx graph is the only structure. Its inputs are the flat leaves of the call and its output is a flat tuple; the
signature binds and rebuilds. Weights are ``get_attr`` nodes whose target is a name of the weight table, not an
attribute of a module, so that an edit costs nothing until the program is emitted.

Ownership: the original's weights are never written. Weights that no rewrite touched are shared with the user's model;
an edited weight is a new tensor; a buffer that the graph writes is copied when the program is emitted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import networkx
import torch
from torch import Tensor, fx

from ._torch import FakeTensorMode, fake_mode_of
from .shapes import show
from .signature import Signature
from .weights import Expression, Weights, expression_of

Mode = Literal["eval", "train", "both"]
CHECKPOINT = "tautomer_checkpoint"
"""Metadata of a node: the name of the part that the backward runs again with it (checkpoints.py)."""
PLAN = "tautomer_plan"
"""Metadata of a node: a ``Site``; without it, every rewrite for memory may fire there."""


@dataclass(frozen=True)
class Site:
    """What a plan says of a node: the call that it stands for, by name, and the rewrites for memory that may fire there."""

    call: str
    rewrites: frozenset[str]


@dataclass
class Program:
    """A captured model.

    Attributes:
        graph: placeholders (one per flat input leaf), ``get_attr`` weights, calls, one flat output tuple.
        weights: the table behind the ``get_attr`` nodes.
        signature: binds a call to the placeholders and rebuilds the output.
        example: the flat example inputs the program was captured with.
        mode: "eval" or "train" if it computes only that mode, "both" if it reads ``<module>.training`` flags.
        training: the current value of every ``<module>.training`` flag the graph reads, by module path.
        regions: bodies of higher-order ops, by the name their ``get_attr`` node reads.
        name: the user's class.
        notes: what the capture had to do, one sentence each; they head the report.
        facts: what was found of a graph, by all that it depends on (``spelled``); copies share it.
    """

    graph: fx.Graph
    weights: Weights
    signature: Signature
    example: tuple[Any, ...]
    mode: Mode = "eval"
    training: dict[str, bool] = field(default_factory=dict)
    regions: dict[str, fx.GraphModule] = field(default_factory=dict)
    name: str = "model"
    notes: list[str] = field(default_factory=list)
    facts: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def copy(self) -> Program:
        """An independent graph and table over the same leaves; node names are kept."""
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
            mapped[node].meta = dict(node.meta)
        return Program(
            graph,
            self.weights.copy(),
            self.signature,
            self.example,
            self.mode,
            dict(self.training),
            dict(self.regions),
            self.name,
            list(self.notes),
            self.facts,
        )

    def restore(self, snapshot: Program) -> None:
        """Become ``snapshot`` (which must not be used afterwards): how a pass is rolled back."""
        self.graph, self.weights = snapshot.graph, snapshot.weights
        self.training, self.regions, self.notes = snapshot.training, snapshot.regions, snapshot.notes

    def forget(self) -> None:
        """Drop what earlier rewrites said of the nodes: what comes next is held to the program as it is now."""
        for node in self.graph.nodes:
            node.meta.pop("origin", None)
            node.meta.pop("relation", None)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` stand for ``old``: readers, provenance and relations pass to it, and ``old`` is erased.

        ``new.meta["origin"]`` names the captured node it stands for, so that verification can pair the two.
        """
        new.meta["origin"] = old.meta.get("origin", old.name)
        if "relation" in old.meta:
            new.meta["relation"] = old.meta["relation"]
        inherit(new, old)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    # -- reading ----------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def fake_mode(self) -> FakeTensorMode | None:
        return fake_mode_of(self.graph)

    def expression(self, node: Any) -> Expression | None:
        """``node`` as an expression over the leaves, if it reads weights alone."""
        return expression_of(node, self.weights)

    def readers(self, name: str) -> list[fx.Node]:
        """The nodes that read the storage of a weight, under any of its names."""
        names = set(self.weights.aliases(name))
        return [user for node in self.graph.find_nodes(op="get_attr") if node.target in names for user in node.users]

    def count(self, target: Callable[..., Any]) -> int:
        """How many calls of ``target`` the graph has.

        Example: ``program.count(torch.ops.aten.layer_norm.default)``
        """
        return len(self.graph.find_nodes(op="call_function", target=target))

    def spelled(self) -> Hashable:
        """The calls by name, and what they read: equal for programs over the same leaves that compute and train the same."""
        calls = tuple((n.name, n.target, str(n.args), str(n.kwargs), n.meta.get(CHECKPOINT)) for n in self.graph.nodes)
        entries = self.weights.entries.items()
        weights = tuple((name, id(w.meta), w.expression if w.edited else None, w.requires_grad) for name, w in entries)
        leaves = tuple((id(leaf), leaf.dtype, leaf.requires_grad) for leaf in self.weights.leaves.values())
        return (calls, weights, leaves, tuple(self.regions.items()))

    def __str__(self) -> str:
        return "\n".join(line(node) for node in self.graph.nodes if node.op != "get_attr")

    def to_networkx(self) -> networkx.DiGraph:
        """The dataflow as a networkx graph: one vertex per node name, one edge per operand.

        Vertex attributes: ``op``, ``target`` (text), ``path`` (module path), ``shape`` (text or None). For questions
        of graph theory that need no speed; the engine itself never copies the graph. More in docs/graphs.md.

        Example:
            >>> program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.randn(3, 4),))
            >>> graph = program.to_networkx()
            >>> [graph.nodes[name]["target"] for name in networkx.dag_longest_path(graph)]
            ['input_1', 'aten.linear', 'aten.relu', 'aten.linear', 'output']
            >>> graph.nodes["relu"]["path"], sorted(networkx.ancestors(graph, "linear"))
            ('1', ['_0_bias', '_0_weight', 'input_1'])
        """
        digraph = networkx.DiGraph()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            shape = show(value.shape) if isinstance(value, Tensor) else None
            digraph.add_node(node.name, op=node.op, target=target_name(node), path=path_of(node), shape=shape)
            digraph.add_edges_from((operand.name, node.name) for operand in node.all_input_nodes)
        return digraph


# -- provenance -----------------------------------------------------------------------------------------------


def path_of(node: fx.Node) -> str:
    """The module path that ran the node, ``transformer.h.3.mlp``; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


_TORCH, _OURS = os.path.dirname(torch.__file__), os.path.join(os.path.dirname(__file__), "")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def source_of(node: fx.Node) -> str | None:
    """The user's source line of a node as ``file:line: code``, if the capture recorded one."""
    return _source(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _source(stack_trace: str) -> str | None:
    frames = [frame for frame in _FRAME.findall(stack_trace) if not frame[0].startswith(_OURS)]
    if not frames:
        return None
    # A line of torch.nn is not the user's, unless there is no other.
    theirs = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    file, line_number, _, code = (theirs or frames)[-1]
    return f"{file}:{line_number}: {code.strip()}"


def place(node: fx.Node) -> str:
    """Where a node is, for a sentence: its module path or, at the root, its name."""
    return path_of(node) or node.name


def target_name(node: fx.Node) -> str:
    """``aten.layer_norm`` for a call, the dotted name for a weight, the name for an input."""
    if node.op != "call_function":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return str(getattr(target, "__name__", target))


def line(node: fx.Node) -> str:
    """One line of a graph for a person."""
    value = node.meta.get("val")
    shape = f"  {show(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name} = {node.op} {node.target}{shape}"
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target_name(node)}({', '.join(arguments)}){shape}"


def inherit(node: fx.Node, origin: fx.Node) -> None:
    """Give a new node the provenance of the node it stands for, and what was decided about that."""
    for entry in ("nn_module_stack", "stack_trace", CHECKPOINT, PLAN):
        if entry in origin.meta:
            node.meta[entry] = origin.meta[entry]


def tensors(node: fx.Node) -> Iterator[Tensor]:
    """The fake tensors a node produces."""
    value = node.meta.get("val")
    for leaf in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(leaf, Tensor):
            yield leaf


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by their schema names, defaults filled in.

    Example: ``arguments(norm)["eps"]``
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    given: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        positional = index < len(node.args) and not argument.kwarg_only
        given[argument.name] = node.args[index] if positional else node.kwargs.get(argument.name, argument.default_value)
    return given
