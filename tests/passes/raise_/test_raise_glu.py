"""An activation of one projection times the other is a gated unit, however they are parted; nothing else is."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.phi3 import modeling_phi3
from transformers.models.t5 import modeling_t5

from tautomer.passes.raise_.raise_glu import RaiseGlu
from tautomer.passes.raise_.raise_quick_gelu import RaiseQuickGelu
from tautomer.passes.raise_.raise_silu import RaiseSilu
from tautomer.passes.raise_.raise_tanh_gelu import RaiseTanhGelu
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, BITWISE
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

D = 8


class Gated(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body = forward
        self.gate, self.up, self.both, self.down = (nn.Linear(D, n) for n in (D, D, 2 * D, D))
        self.conv = nn.Conv1d(D, 2 * D, 3)

    def forward(self, x):
        return self.body(self, x)


def run(module, dtype=torch.float32):
    program = capture(module.to(dtype).eval(), (torch.randn(3, 5, D, dtype=dtype),))
    original, context = program.copy(), Context()
    apply_rules((RaiseSilu(), RaiseQuickGelu(), RaiseGlu()), program, context)
    if context.log.applications:
        kinds = {application.rewrite for application in context.log.applications}
        check_program(original, program, BITWISE if kinds == {RaiseGlu.name} else ALGEBRAIC)
    return program, context.log


def parts(split):
    """SwiGLU whose gate is the first part of one linear, and one whose gate is the second."""

    def first(m, x):
        gate, up = split(m.both(x))
        return m.down(F.silu(gate) * up)

    def second(m, x):
        up, gate = split(m.both(x))
        return m.down(up * F.silu(gate))

    return first, second


SPLITS = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "split": lambda y: y.split(D, dim=-1),
    "split sizes": lambda y: y.split([D, D], dim=2),
    "slices": lambda y: (y[..., :D], y[..., D:]),
    "narrow": lambda y: (y.narrow(-1, 0, D), y.narrow(-1, D, D)),
    "unbind": lambda y: y.unflatten(-1, (2, D)).unbind(-2),
    "select": lambda y: (y.view(*y.shape[:-1], 2, D)[..., 0, :], y.view(*y.shape[:-1], 2, D)[..., 1, :]),
    "interleaved": lambda y: (y[..., ::2], y[..., 1::2]),
    "tensor_split": lambda y: torch.tensor_split(y, 2, dim=-1),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_one_linear(split, dtype):
    for forward in parts(split):
        program, _ = run(Gated(forward), dtype)
        (glu,) = program.graph.find_nodes(op="call_function", target=tautomer.glu.v1)
        assert glu.args[2] == "silu"


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS.items(), ids=ACTIVATIONS)
def test_two_linears(name, activation):
    for forward in (lambda m, x: activation(m.gate(x)) * m.up(x), lambda m, x: m.up(x) * activation(m.gate(x))):
        program, _ = run(Gated(forward))
        (glu,) = program.graph.find_nodes(op="call_function", target=tautomer.glu.v1)
        assert glu.args[2] == name
        gate, up = (program.expression(x.args[1]) for x in glu.args[:2])
        assert (str(gate), str(up)) == ("gate.weight", "up.weight")


def test_a_silu_by_hand_on_a_convolution():
    def forward(m, x):
        up, gate = m.conv(x.transpose(1, 2)).chunk(2, dim=1)
        return up * (gate * torch.sigmoid(gate))

    program, _ = run(Gated(forward))
    assert program.count(tautomer.glu.v1) == 1


def config(kind, **options):
    return kind(hidden_size=D, intermediate_size=12, num_attention_heads=2, **options)


LIBRARY = {
    "llama": (modeling_llama.LlamaMLP, config(transformers.LlamaConfig), "silu"),
    "phi3": (modeling_phi3.Phi3MLP, config(transformers.Phi3Config, pad_token_id=0), "silu"),
    "modernbert": (modeling_modernbert.ModernBertMLP, config(transformers.ModernBertConfig), "gelu"),
    "t5": (modeling_t5.T5LayerFF, transformers.T5Config(d_model=D, d_ff=12, feed_forward_proj="gated-gelu"), "gelu_tanh"),
}


@pytest.mark.parametrize(("kind", "settings", "activation"), LIBRARY.values(), ids=LIBRARY)
def test_feed_forwards_of_transformers(kind, settings, activation):
    program, context = capture(kind(settings).eval(), (torch.randn(3, 5, D),)), Context()
    original = program.copy()
    apply_rules((RaiseTanhGelu(), RaiseGlu()), program, context)
    check_program(original, program, RaiseTanhGelu.claim)
    (glu,) = program.graph.find_nodes(op="call_function", target=tautomer.glu.v1)
    assert glu.args[2] == activation


def test_experts_are_batched_products():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, D, 2 * D)), nn.Parameter(torch.randn(4, D, D))

        def forward(self, x):
            gate, up = torch.bmm(x, self.w).chunk(2, dim=-1)
            return torch.bmm(F.silu(gate) * up, self.v)

    program, context = capture(Experts().eval(), (torch.randn(4, 5, D),), dynamic_shapes=None), Context()
    apply_rules((RaiseGlu(),), program, context)
    assert program.count(tautomer.glu.v1) == 1


REFUSED = {
    "gates itself": (lambda m, x: m.up(x) * torch.relu(m.up(x)), "gates itself"),
    "squeeze and excite": (lambda m, x: m.up(x) * torch.sigmoid(m.gate(x).mean(1, keepdim=True)), "stretched"),
    "LSTM cell": (lambda m, x: (lambda i, g: torch.sigmoid(i) * torch.tanh(g))(*m.both(x).chunk(2, -1)), "neither projections"),
    "gated norm": (lambda m, x: F.silu(m.gate(x)) * F.rms_norm(m.up(x), [D]), "neither projections"),
    "two inputs": (lambda m, x: F.silu(m.gate(x)) * m.up(x.tanh()), "neither projections"),
    "another reader": (lambda m, x: (lambda h: h * m.up(x) + h)(F.silu(m.gate(x))), "is also read by"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_whatever_else_is_refused_with_a_sentence(forward, reason):
    program, log = run(Gated(forward))
    assert program.count(tautomer.glu.v1) == 0
    assert any(reason in refusal.reason for refusal in log.refusals), log.refusals


def test_the_shifted_gate_of_gpt_oss_is_a_quick_gelu_and_a_product():
    program, _ = run(Gated(lambda m, x: (m.up(x) + 1) * (m.gate(x) * torch.sigmoid(m.gate(x) * 1.702))))
    assert program.count(tautomer.quick_gelu.v1) == 1 and program.count(tautomer.glu.v1) == 0
