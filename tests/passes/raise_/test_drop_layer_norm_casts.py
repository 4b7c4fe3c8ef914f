"""In half precision the casts of OLMo's and Cohere's LayerNorm are the kernel's own; a float32 gain keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from tautomer.passes.raise_.absorb_layer_norm_gain import AbsorbLayerNormGain
from tautomer.passes.raise_.absorb_layer_norm_shift import AbsorbLayerNormShift
from tautomer.passes.raise_.drop_layer_norm_casts import DropLayerNormCasts
from tautomer.passes.raise_.raise_layer_norm import RaiseLayerNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
RULES = (RaiseLayerNorm(), AbsorbLayerNormGain(), AbsorbLayerNormShift(), DropLayerNormCasts())


class Casts(nn.Module):
    """F.layer_norm in float32 with the parameters cast, as in ESMFold."""

    def __init__(self, plus=0.0):
        super().__init__()
        self.plus = plus
        self.g, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        gain = self.g.float() + self.plus if self.plus else self.g.float()
        return F.layer_norm(x.float(), (6,), gain, self.b.float(), 1e-5).to(x.dtype)


def run(module):
    program, context = capture(module.bfloat16().eval(), (torch.randn(3, 5, 6).bfloat16(),)), Context()
    original = program.copy()
    apply_rules(RULES, program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize(
    "module", [OlmoLayerNorm(6), CohereLayerNorm(6), DebertaLayerNorm(6), Casts()], ids=lambda m: type(m).__name__
)
def test_the_casts_become_the_kernels_own(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    program, _ = run(module)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.layer_norm.default]
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert all(x.meta["val"].dtype is torch.bfloat16 for x in norm.all_input_nodes)


def test_a_gain_that_would_be_rounded_keeps_them():
    program, log = run(Casts(plus=1.0))
    assert program.count(aten.to.dtype) >= 2
    assert "the gain or shift is torch.float32, which torch.bfloat16 would round" in [r.reason for r in log.refusals]
