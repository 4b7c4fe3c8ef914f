"""Replace attention by the mean of gated linear attention and of softmax attention within a window, without a new weight.

    S_t = diag(exp g_t) S_{t-1} + k'_tᵀ v_t,   y_t = ½ q'_t S_t + ½ softmax_w(s q kᵀ) v

    q' = softmax(q), k' = softmax(k) over channels        g_t = log sigmoid(k_t) / 16, a number per channel

For causal attention, and for models that will be fine-tuned with it: as it stands it is far from the model (``architecture=True``
says so; there is nothing to transfer to). Where rotary embeddings turn q and k, the recurrent half takes them unturned.

arXiv:2503.01496 (Liger).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.ops import OPS
from tautomer.rewrite.options import least
from tautomer.rewrite.rules import shape

from .learned_attention import kept
from .untrained_attention import UntrainedAttention

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class GatedAttention(UntrainedAttention):
    """Attention → gated linear attention and a window, half and half; see the module.

    Attributes:
        window: w.
        chunk: positions to a chunk of the recurrence.
    """

    claim = ARCHITECTURE("a gated recurrence and a window stand for attention")
    paper = "arXiv:2503.01496"
    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING
    window: int = 64
    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, window=1, chunk=1)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        require(site.causal, "it is not causal, and a recurrence runs one way")

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        q, k = unturned(site.query), unturned(site.key)
        gates = op.mul(op(aten.log_sigmoid.default)(k), 1 / 16)
        heads = (op.softmax(q, -1), op.softmax(k, -1), site.value)
        recurrent = op.kernel_attention(*heads, gates, kept(op, site), True, False, self.chunk)
        heads = (site.query, site.key, site.value)
        near = op.window_attention(*heads, site.keys_kept(op), site.scale, self.window, 0, True)
        return op.mul(op.add(recurrent, near), 0.5)

    def flops(self, site: AttentionSite, n: int) -> float:
        d, e = site.width, int(shape(site.value)[-1])
        return n * (2.0 * self.chunk * (d + e) + 4.0 * d * e + 4.0 * self.window * (d + e))


def unturned(x: fx.Node) -> fx.Node:
    """Queries or keys before the rotary embedding turned them, if nothing else stands between."""
    before = x.args[0] if x.target is OPS["rotary"].target else x
    assert isinstance(before, fx.Node)
    return before
