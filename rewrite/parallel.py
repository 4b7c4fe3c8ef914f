"""Linear layers that read one tensor: q, k and v, or gate and up.

    linear(x, W_1, b_1), …, linear(x, W_k, b_k)

Only siblings count, layers of one parent module by the names of their weights: every decoder layer of an encoder-decoder
reads the encoder's output, and nobody wants those as one. All have a bias or none has.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import fx

from .metadata import value_of
from .program import Program
from .weights import leaves

_LINEAR = torch.ops.aten.linear.default


def parallel_linears(program: Program) -> list[tuple[fx.Node, ...]]:
    """The groups of two and more, each in the order of the graph."""
    groups: dict[Hashable, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="call_function", target=_LINEAR):
        x, weight, bias = (*node.args, None)[:3]
        expression, matrix = program.expression(weight), value_of(weight)
        if expression is None or matrix.ndim != 2 or (bias is not None and program.expression(bias) is None):
            continue
        parent = _parent(_parent(next(leaves(expression))))
        groups.setdefault((x, parent, bias is None, matrix.dtype), []).append(node)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
