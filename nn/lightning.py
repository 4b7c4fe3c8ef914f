"""The block of TransNormerLLM: linear attention with decay, without softmax and without a denominator.

    x ← x + Mixer(srms(x));   x ← x + SGLU(srms(x))                srms(x) = x / sqrt(mean x² + 1e-6), no gain

    Mixer:  q, k = silu(Wq x), silu(Wk x);   v, u = Wv x, Wu x;    y = Wo (u ⊙ srms(Σ_{j≤i} λ^{i-j} (q_i·k_j) v_j))
    SGLU:   W3 (W1 x ⊙ W2 x)

With ``turned`` (the paper: in the first layer), q → (q cos θt, q sin θt), and k alike: their product depends on the distance.
λ = exp(-slope), a number per head. arXiv:2307.14995 (TransNormerLLM), arXiv:2401.04658 (Lightning Attention).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer


def lightning_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """-log λ of every head by the rule of the lightning-attention repository: ALiBi's slopes, 2^(-8 (h+1) / heads) for a power of
    two, times 1 - layer / (layers - 1) + 1e-5."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
    slopes += [2 ** (-8 * (h + 1) / (2 * whole)) for h in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float64) * (1 - layer / max(layers - 1, 1) + 1e-5)


def fla_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """-log λ of every head by the rule of flash-linear-attention, 8 h / heads · (1 - layer / layers): another one, in which
    the first head forgets nothing."""
    return torch.arange(heads, dtype=torch.float64) * 8 / heads * (1 - layer / layers)


def srms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class LightningAttention(nn.Module):
    """The mixer; see the module.

    Args:
        width: channels.
        heads: ``width`` divided by them is d.
        slopes: -log λ per head, ``[heads]``; ``lightning_slopes(heads)`` by default.
        turned: whether queries and keys are turned by their position.
        chunk: positions to a chunk.

    Raises:
        UsageError: an argument is out of range.
    """

    log_decay: Tensor

    def __init__(self, width: int, heads: int, slopes: Tensor | None = None, *, turned: bool = False, chunk: int = 64) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"{width} channels cannot be shared by {heads} heads")
        slopes = lightning_slopes(heads) if slopes is None else slopes
        if slopes.shape != (heads,):
            raise UsageError(f"slopes of the shape {list(slopes.shape)} for {heads} heads")
        self.heads, self.chunk, d = heads, chunk, width // heads
        self.mixed, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, width, bias=False)
        self.theta = nn.Parameter(10000 ** (-2 / d * torch.arange(d)).expand(heads, 1, d).clone()) if turned else None
        self.register_buffer("log_decay", -slopes.to(self.out.weight.dtype)[:, None, None])

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mix ``[batch, n, width]``; ``keep`` is ``[batch, n]``, True where a position counts."""
        q, k, v, u = self.mixed(x).chunk(4, -1)
        q, k, v = (torch.unflatten(y, -1, (self.heads, -1)).transpose(1, 2) for y in (F.silu(q), F.silu(k), v))
        if self.theta is not None:
            angle = torch.arange(x.shape[1], device=x.device, dtype=self.theta.dtype)[:, None] * self.theta
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            q, k = (torch.cat((y * cos, y * sin), -1) for y in (q, k))
        kept = None if keep is None else keep.unsqueeze(1)
        y = tautomer.kernel_attention.v1(q, k, v, self.log_decay, kept, True, False, self.chunk)
        out: Tensor = self.out(u * srms_norm(y.transpose(1, 2).flatten(2)))
        return out


class LightningBlock(nn.Module):
    """The block; see the module.

    Args: as of ``LightningAttention``, and ``inner``, the channels within SGLU.
    """

    def __init__(
        self, width: int, heads: int, inner: int, slopes: Tensor | None = None, *, turned: bool = False, chunk: int = 64
    ) -> None:
        super().__init__()
        self.mixer = LightningAttention(width, heads, slopes, turned=turned, chunk=chunk)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((width, inner), (width, inner), (inner, width)))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """As of ``LightningAttention``."""
        x = x + self.mixer(srms_norm(x), keep)
        y = srms_norm(x)
        out: Tensor = x + self.down(self.gate(y) * self.up(y))
        return out
