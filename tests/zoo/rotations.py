"""Rotary embeddings as models write them, captured, raised and compared."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.passes.raise_.raise_interleaved_rotary import RaiseInterleavedRotary
from tautomer.passes.raise_.raise_rotary import RaiseRotary
from tautomer.passes.raise_.raise_split_rotary import RaiseSplitRotary
from tautomer.passes.raise_.widen_rotary import WidenRotary
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

ROTARY = (RaiseRotary(), RaiseSplitRotary(), RaiseInterleavedRotary(), WidenRotary())


class Rotates(nn.Module):
    """``function(q, k, cos, sin)`` of queries and keys [batch, heads, length, 8], or with positions before heads."""

    def __init__(self, function, width=8, heads_first=True):
        super().__init__()
        self.function, self.heads_first = function, heads_first
        self.register_buffer("angles", 0.3 ** torch.arange(width // 2))

    def forward(self, q, k):
        positions = torch.arange(q.shape[2 if self.heads_first else 1], device=q.device)
        turn = positions[:, None] * self.angles
        turn = torch.cat([turn, turn], -1)[None]
        return self.function(q, k, turn.cos().to(q.dtype), turn.sin().to(q.dtype))


def run(function, dtype=torch.float32, width=8, heads_first=True):
    """The rotary nodes of the raised program, the program and its log."""
    q, k = torch.randn(2, 4, 5, 8, dtype=dtype), torch.randn(2, 2, 5, 8, dtype=dtype)
    inputs = (q, k) if heads_first else (q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous())
    auto = torch.export.Dim.AUTO
    sizes = tuple({0: auto, 2 if heads_first else 1: auto} for _ in inputs)
    program, context = capture(Rotates(function, width, heads_first).eval(), inputs, dynamic_shapes=sizes), Context()
    original = program.copy()
    apply_rules(ROTARY, program, context)
    if context.log.applications:
        check_program(original, program, ALGEBRAIC)
    return program.graph.find_nodes(op="call_function", target=tautomer.rotary.v1), program, context.log


def turned(across):
    """q and k rotated by the formula of Llama, with ``across`` for ``rotate_half``."""

    def function(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + across(q) * sin, k * cos + across(k) * sin

    return function
