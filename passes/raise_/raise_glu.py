"""Recognise a gated linear unit.

    silu(gate) · up = glu(gate, up, "silu")                 and gelu, relu, sigmoid, quick_gelu likewise

Gate and up are two products of one tensor, or two parts of one product, in either order, however they were parted
(chunk, split, slices, a view). Whatever else is multiplied by an activation (the gate of an LSTM, a squeeze-and-excite
factor) is no such unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.patterns import congruent
from tautomer.rewrite.projections import projected
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, dtype, require, shape
from tautomer.rewrite.shapes import same_shape

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "relu")


class RaiseGlu(Rule):
    """An activation of one projection times another → ``glu``; see the module."""

    claim = BITWISE("none: the same two kernels run")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, up: Tensor, silu: Tensor, gelu: Tensor, gelu_tanh: Tensor, quick_gelu: Tensor,
               sigmoid: Tensor, relu: Tensor) -> Operand:  # fmt: skip
        tanh = op.gelu(gelu_tanh, approximate="tanh")
        gates = (op.silu(silu), op.gelu(gelu), tanh, op.quick_gelu(quick_gelu), op.sigmoid(sigmoid), op.relu(relu))
        return op.any_of(*(op.mul(gate, up) for gate in gates))

    def where(self, m: Match) -> None:
        gate = next(m.values[name] for name in ACTIVATIONS if m.values[name] is not None)
        require(same_shape(shape(gate), shape(m.up)), "one factor is stretched along the other")
        require(dtype(gate) == dtype(m.up), f"the gate is {dtype(gate)}, what it gates {dtype(m.up)}")
        require(not congruent(gate, m.up), "a tensor that gates itself is no gated unit")
        require(projected(gate, m.up), "the factors are neither projections of one tensor nor parts of one")

    def after(self, op: Ops, up: Tensor, silu: Tensor, gelu: Tensor, gelu_tanh: Tensor, quick_gelu: Tensor,
              sigmoid: Tensor, relu: Tensor) -> Operand:  # fmt: skip
        gates = zip((silu, gelu, gelu_tanh, quick_gelu, sigmoid, relu), ACTIVATIONS, strict=True)
        gate, activation = next((gate, name) for gate, name in gates if gate is not None)
        return op.glu(gate, up, activation)

    def samples(self) -> Iterator[dict[str, Any]]:
        gate, up = torch.randn(2, 3, 4, 6, dtype=torch.float64)
        yield {"up": up, **dict.fromkeys(ACTIVATIONS, gate)}
