"""Let another function stand for softmax attention that has nothing to learn beforehand: the model must be trained with it.

    y = softmax(scale q kᵀ + mask) v   →   emit(op, site)          with ``architecture=True`` alone

Without that word every attention is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import fx

from tautomer.rewrite.attentions import AttentionSite
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program

from .substitute_attention import SubstituteAttention

UNTRAINED = "it gives another function, and has nothing to learn beforehand: architecture=True, for a model that will be trained"


@dataclass(frozen=True, eq=False)
class UntrainedAttention(SubstituteAttention):
    """Attention → another function; see the module.

    Attributes:
        architecture: the model will be trained; otherwise every attention is refused.
    """

    _: KW_ONLY
    architecture: bool = False

    def measure(self, program: Program, sites: Sequence[AttentionSite], context: Context) -> Mapping[fx.Node, Any]:
        if self.architecture:
            return super().measure(program, sites, context)
        for site in sites:
            context.refused(self, site.node, UNTRAINED)
        return {}
