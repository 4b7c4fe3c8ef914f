"""Merge a low-rank adapter into the linear layer that it stands beside.

    linear(x, W, b) + s · linear(linear(x, A), B, c) = linear(x, W + s B A, b + s c)          s = alpha / r, or alpha / sqrt(r)

Several adapters of one layer merge one after the other. A dropout before the adapter is part of the function while it is active,
so a program that trains keeps it. ``module.weights.to_original`` takes the adapters out again, as they were.

arXiv:2106.09685 (LoRA: Low-Rank Adaptation of Large Language Models), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, Weight

_LINEAR, _MUL = torch.ops.aten.linear.default, torch.ops.aten.mul.Tensor


class MergeLora(Rule):
    """A linear layer and a low-rank adapter → one linear layer; see the module."""

    claim = ALGEBRAIC("the adapter is added to the weight in float64 and rounded once")
    paper = "arXiv:2106.09685"

    def before(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, A: Weight, B: Weight, c: OptionalWeight,
               s: Scalar) -> Operand:  # fmt: skip
        adapter = op.linear(op.linear(x, A, None), B, c)
        return op.add(op.linear(x, W, b), op.any_of(op.mul(adapter, s), adapter))

    def after(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, A: Weight, B: Weight, c: OptionalWeight,
              s: Scalar) -> Operand:  # fmt: skip
        def scaled(y: Operand) -> Operand:
            return y if s is None else op.mul(y, s)

        bias = b if c is None else scaled(c) if b is None else op.add(b, scaled(c))
        return op.linear(x, op.add(W, scaled(op.matmul(B, A))), bias)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, W, b, A, B, c = (torch.randn(n, dtype=torch.float64) for n in ((3, 6), (5, 6), (5,), (2, 6), (5, 2), (5,)))
        sample = {"x": x, "W": W, "A": A, "B": B, "s": 0.5}
        yield {**sample, "b": b, "c": None}
        yield {**sample, "b": None, "c": c}

    def misses(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        dropouts = program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
        for dropout in dropouts:
            for layer in dropout.users:
                adapter = _behind(layer, _LINEAR)
                total = adapter and _behind(_behind(adapter, _MUL) or adapter, torch.ops.aten.add.Tensor)
                if total and any(
                    operand.target is _LINEAR and operand.args[0] is dropout.args[0] for operand in total.all_input_nodes
                ):
                    yield total, "a dropout drops what the adapter reads while the model trains: capture it in eval mode"


def _behind(node: fx.Node, target: Any) -> fx.Node | None:
    """The only reader of ``node``, if it is a call of ``target``."""
    reader = next(iter(node.users), None)
    return reader if reader is not None and len(node.users) == 1 and reader.target is target else None
