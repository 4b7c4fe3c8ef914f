"""The kernels of flash-linear-attention for sums with decay, where it is installed: on CUDA, in sixteen bits, outside of a trace.

    y_i = Σ_{j≤i} exp(g_{j+1} + … + g_i) (q_i·k_j) v_j        over [batch, n, heads, ·] there, [batch, heads, n, ·] here

Single precision stays with ours: theirs multiplies it in TF32. It is looked for when it is first asked for, and nowhere else.
The tests call a stand-in of the same signatures (of flash-linear-attention 0.5.2): the kernels themselves were never run here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


@cache
def kernels() -> tuple[Kernel, Kernel] | None:
    """One with a decay per head or none, and one with a decay per channel; None where they are not installed."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla, chunk_gla


def fused(x: Tensor) -> bool:
    """Whether the kernels take ``x``."""
    return x.is_cuda and type(x) is Tensor and x.dtype in (torch.float16, torch.bfloat16) and kernels() is not None


def fused_sum(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The sum, for ``fused`` tensors ``[batch, heads, n, ·]`` and g of as many channels as q, or of one, or None."""
    found = kernels()
    assert found is not None
    simple, gated = found
    leading = q.shape[:2]
    heads = [x.expand(*leading, *x.shape[2:]).transpose(1, 2).contiguous() for x in (q, k, v)]
    if g is None:
        y, _ = simple(*heads, scale=1.0)
    else:
        decay = g.expand(*leading, *g.shape[-2:]).transpose(1, 2).contiguous()
        y, _ = simple(*heads, g=decay.squeeze(-1), scale=1.0) if g.shape[-1] == 1 else gated(*heads, g=decay, scale=1.0)
    summed: Tensor = y.transpose(1, 2)
    return summed
