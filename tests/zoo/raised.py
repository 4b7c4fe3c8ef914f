"""Attention written by hand, captured, raised and compared; modules whose forward is a function."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.passes.cleanup.drop_dead_code import DropDeadCode
from tautomer.passes.recipes import ATTENTION
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pipeline import run_passes


class Raised:
    """A module after the attention passes: its program, its log, and how many of each op are left."""

    def __init__(self, model: nn.Module, *inputs: torch.Tensor, passes: tuple[type, ...] = ATTENTION) -> None:
        torch.manual_seed(0)
        self.model = model.eval()
        auto = torch.export.Dim.AUTO
        program = capture(self.model, inputs, dynamic_shapes=tuple({0: auto, 1: auto} for _ in inputs))
        self.before = program.copy()
        self.outcome = run_passes([kind() for kind in (*passes, DropDeadCode)], program)
        assert not self.outcome.withdrawn
        self.program, self.log = program, self.outcome.log
        for size in ((1, 1), (1, 5), (3, 2)):
            self.agrees(*(_sized(x, size) for x in inputs))

    def agrees(self, *inputs: torch.Tensor) -> None:
        """Both programs, in float64, on other inputs."""
        pair = [interpret(p, [x.clone() for x in inputs], dtype=torch.float64) for p in (self.before, self.program)]
        torch.testing.assert_close(pair[1], pair[0], rtol=1e-12, atol=1e-12)

    def count(self, name: str) -> int:
        names = (getattr(n.target, "_schema", None) for n in self.program.graph.nodes if n.op == "call_function")
        return sum(schema is not None and schema.name == f"aten::{name}" for schema in names)

    @property
    def attentions(self) -> list[tuple[object, bool, object]]:
        """Mask, is_causal and scale of every attention."""
        nodes = self.program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
        padded = [(*node.args, *(None, 0.0, False)[len(node.args) - 3 :]) for node in nodes]
        return [(args[3], bool(args[5]), node.kwargs.get("scale")) for args, node in zip(padded, nodes, strict=True)]

    @property
    def shared_heads(self) -> list[int]:
        """How many key heads there are in each attention whose query heads share them."""
        nodes = self.program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
        return [node.args[1].meta["val"].shape[1] for node in nodes if node.kwargs.get("enable_gqa")]

    @property
    def reasons(self) -> list[str]:
        return [refusal.reason for refusal in self.log.refusals]

    def fired(self, name: str) -> int:
        return sum(application.rewrite == name for application in self.log.applications)


def _sized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``x`` at another batch and length, its leading axes."""
    for axis, n in enumerate(size[: x.dim() - (x.dim() == 1)]):
        x = x.index_select(axis, torch.arange(n) % x.shape[axis])
    return x


class Body(nn.Module):
    """``function(module, *inputs)`` over four heads of width 8."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("tril", torch.ones(16, 16).tril().view(1, 1, 16, 16))

    def heads(self, x):
        """q, k and v, [batch, heads, length, width]."""
        return (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x, y)
