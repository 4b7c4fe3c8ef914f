"""Let every query of an attention see the keys that score best in the few dimensions in which keys vary most.

    q kᵀ = (q P)(k P)ᵀ ≈ (q P)_{1:d'} (k P)_{1:d'}ᵀ        P: the principal axes of the keys, one rotation per head of keys

P is measured on ``data``: the covariance of the keys as attention reads them (after a rotary embedding), padding left out. What
is chosen is scored exactly. 2 n² d' operations and 4 n k d instead of 4 n² d, and of k and v only what is chosen is read: made
for decoding, where one query meets many keys. Where all queries are there at once, reading k keys for each is slower than
attention: ``gather=False`` masks instead, to measure what it costs in quality.

arXiv:2406.02542 (Loki).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tautomer.rewrite.attentions import AttentionSite, Masking, kept
from tautomer.rewrite.beside import Twins, beside
from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.factors import Moments
from tautomer.rewrite.moments import added
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import dtype, shape

from .substitute_attention import NO_DATA, SubstituteAttention, weight_name


@dataclass(frozen=True, eq=False)
class LokiAttention(SubstituteAttention):
    """Attention → attention to the best keys; see the module.

    Attributes:
        keys: how many keys a query sees, k; below 1 the share of all keys.
        rank: in how many dimensions they are compared, d'; below 1 as many as hold this share of the variance of every head.
        gather: whether only what is chosen is read; False masks the rest.
    """

    claim = APPROXIMATE("keys that are not among the best in few dimensions weigh nothing")
    paper = "arXiv:2406.02542"
    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING | Masking.NUMBERS
    crosses: ClassVar[bool] = True
    keys: float = 0.25
    rank: float = 0.25
    gather: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, number in (("keys", self.keys), ("rank", self.rank)):
            if number <= 0 or (number >= 1 and number != int(number)):
                raise UsageError(f"{name} is {number}", hint="a whole number, or a share below 1")

    def measure(self, program: Program, sites: Sequence[AttentionSite], context: Context) -> Mapping[fx.Node, Any]:
        if context.data is None:
            for site in sites:
                context.refused(self, site.node, f"the axes in which its keys vary are not known: {NO_DATA}")
            return {}
        at, moments = {site.node: site for site in sites}, dict[fx.Node, Moments]()

        def emit(op: GraphOps, place: fx.Node, twins: Twins) -> tuple[Any, Any]:
            site = at[place].on(twins)
            return op.clone(site.key), site.keys_kept(op)

        def see(place: fx.Node, values: list[Tensor | None]) -> None:
            key, keep, _ = values
            assert key is not None
            moments[place] = added(moments.get(place), rows_of(key, keep))

        beside(program, list(at), emit).watch(context.data, see)
        return {node: self.rotation(moment.covariance(centred=True)) for node, moment in moments.items()}

    def rotation(self, covariance: Tensor) -> Tensor:
        """``[heads, d, d']`` for covariances ``[heads, d, d]``."""
        variance, axes = torch.linalg.eigh(covariance)
        share = variance.flip(-1).clamp(min=0).cumsum(-1)
        share = share / share[:, -1:].clamp(min=torch.finfo(share.dtype).tiny)
        rank = int(self.rank) if self.rank >= 1 else int((share < self.rank).sum(-1).max()) + 1
        found: Tensor = axes.flip(-1)[..., :rank]
        return found

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        rotation = op.tensor(weight_name(site, "rotation"), fact.to(dtype(site.key)).contiguous(), site.key)
        share = Fraction(self.keys).limit_denominator(1000) if self.keys < 1 else Fraction(0)
        many = (share.numerator, share.denominator) if share else (int(self.keys), 0)
        sizes = (*many, site.causal, self.gather)
        return op.top_attention(site.query, site.key, site.value, rotation, site.keys_kept(op), site.scale, *sizes)

    def flops(self, site: AttentionSite, n: int) -> float:
        rank = self.rank if self.rank >= 1 else self.rank * site.width
        keys = min(n, self.keys) if self.keys >= 1 else math.ceil(self.keys * n)
        return 2.0 * n * n * rank + 2 * n * (keys if self.gather else n) * (site.width + int(shape(site.value)[-1]))


def rows_of(key: Tensor, keep: Tensor | None) -> Tensor:
    """Keys ``[batch, heads, n, d]`` as rows ``[heads, N, d]``, without those that the mask says are padding."""
    batch, _, n, _ = key.shape
    rows = key.transpose(0, 1).flatten(1, 2)
    return rows if keep is None else rows[:, kept(keep).expand(batch, 1, 1, n).flatten()]
