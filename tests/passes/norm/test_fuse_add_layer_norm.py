"""What ``fuse-add-layer-norm`` has of its own; the rest is tested with both norms in test_fuse_add_rms_norm.py."""

from __future__ import annotations

import torch
from torch import nn

import tautomer


def test_gain_and_shift_go_with_the_norm() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8, eps=1e-3)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return self.norm(x + r) - (x + r)

    inputs = tuple(torch.randn(2, 3, 8))
    fast = tautomer.optimize(Model().eval(), inputs, passes=["merge-equal-expressions", "fuse-add-layer-norm"])
    (node,) = fast.graph.find_nodes(op="call_function", target=torch.ops.tautomer.add_layer_norm.v1)
    assert [x.target for x in node.args[3:5]] == ["norm.weight", "norm.bias"] and node.args[5] == 1e-3
