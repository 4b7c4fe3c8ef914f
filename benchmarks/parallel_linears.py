"""What merging linear layers that read one tensor is worth: k layers against one and a split, outputs handed on as they are.

    python benchmarks/parallel_linears.py         one CPU thread, alternating, the fastest of the rounds

"alone" is the layers and nothing else; "read" adds what usually reads them, attention for three layers and silu(a) * b for
two: the parts of a split are strided views in PyTorch and copies in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import tautomer
from tautomer.rewrite.measure import measure, rounds_within

HEAD = 64
SHAPES = (
    ((1, 1, 768), (768, 768, 768)),
    ((1, 16, 768), (768, 768, 768)),
    ((1, 128, 768), (768, 768, 768)),
    ((8, 197, 768), (768, 768, 768)),
    ((1, 1, 1024), (1024, 256, 256)),
    ((1, 128, 1024), (1024, 256, 256)),
    ((1, 1, 1024), (2816, 2816)),
    ((1, 128, 1024), (2816, 2816)),
    ((2, 8, 64), (64, 64, 64)),
)


class Layers(nn.Module):
    """``merged``: one layer and a split. ``read``: followed by what usually reads the parts."""

    def __init__(self, width: int, sizes: Sequence[int], merged: bool, read: bool) -> None:
        super().__init__()
        self.sizes, self.merged, self.read = list(sizes), merged, read
        self.layers = nn.ModuleList(nn.Linear(width, size) for size in ([sum(sizes)] if merged else sizes))

    def forward(self, x: Tensor) -> Any:
        parts = self.layers[0](x).split(self.sizes, -1) if self.merged else [layer(x) for layer in self.layers]
        if not self.read:
            return tuple(parts)
        if len(parts) == 2:
            return silu(parts[0]) * parts[1]
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in parts)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def eager(model: nn.Module, x: Tensor) -> Callable[[Sequence[Any]], Any]:
    return lambda xs: model(*xs)


def onnx_runtime(model: nn.Module, x: Tensor) -> Callable[[Sequence[Any]], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        tautomer.export_onnx(model, path, (x,), dynamic_shapes="static")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda xs: session.run(None, {name: xs[0].numpy()})


def main() -> None:
    torch.set_num_threads(1)
    print("| x | widths | runtime | alone: layers µs | merged µs | ratio | read: layers µs | merged µs | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape, sizes in SHAPES:
        x = torch.randn(shape)
        for name, ready in (("eager", eager), ("onnxruntime", onnx_runtime)):
            row = [f"{list(shape)}", f"{list(sizes)}", name]
            for read in (False, True):
                a, b = (ready(Layers(shape[-1], sizes, merged, read).eval(), x) for merged in (False, True))
                before, after = measure(a, b, [x], rounds_within(3000.0, a, b, [x], least=10, most=2000), statistic=min)
                row += [f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
