"""Adapters go into the weights they stand beside, exactly, and come out again; what is not theirs alone stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.lowrank.merge_lora import MergeLora
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.trial import try_rule
from tautomer.rewrite.verification import check_program

LINEAR = torch.ops.aten.linear.default
NAMING = ["drop-unused-weights", "name-weights"]
X = torch.randn(2, 5, 6)


class Lora(nn.Module):
    def __init__(self, rank=2, scale=0.5, bias=True, dropout=0.0, adapters=1, adapter_bias=False):
        super().__init__()
        self.base, self.scale, self.dropout = nn.Linear(6, 8, bias=bias), scale, nn.Dropout(dropout)
        self.down = nn.ModuleList(nn.Linear(6, rank, bias=False) for _ in range(adapters))
        self.up = nn.ModuleList(nn.Linear(rank, 8, bias=adapter_bias) for _ in range(adapters))

    def forward(self, x):
        y = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            low = up(down(self.dropout(x)))
            y = y + (low if self.scale == 1 else low * self.scale)
        return y


def run(model, mode="eval"):
    program, context = capture(model, (X,), mode=mode), Context()
    original = program.copy()
    MergeLora().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


def test_the_rule():
    trial = try_rule(MergeLora())
    assert trial.fired


@pytest.mark.parametrize(
    "options", [{}, {"scale": 1}, {"bias": False}, {"adapter_bias": True}, {"bias": False, "adapter_bias": True}]
)
def test_an_adapter_becomes_part_of_the_weight(options):
    program, log = run(Lora(**options))
    assert program.count(LINEAR) == 1 and len(log.applications) == 1
    assert log.applications[0].error <= 1e-12


def test_several_adapters():
    program, log = run(Lora(adapters=3))
    assert program.count(LINEAR) == 1 and len(log.applications) == 3


def test_gradients_reach_the_adapters_and_the_way_back_takes_them_out():
    model = Lora().double().eval()
    fast = tautomer.optimize(model, (X.double(),), passes=[MergeLora(), *NAMING])
    assert fast.report.evidence.gradient <= 1e-10
    assert set(fast.state_dict()) == {"base.weight", "base.bias"}
    expected = model.base.weight + 0.5 * model.up[0].weight @ model.down[0].weight
    assert torch.allclose(fast.state_dict()["base.weight"], expected, atol=1e-14)
    back = fast.weights.to_original(fast.state_dict())
    for name, value in model.state_dict().items():
        assert torch.allclose(back[name], value, atol=1e-14), name
    other = Lora().double()
    assert torch.allclose(
        fast.weights.from_original(other.state_dict())["base.weight"],
        other.base.weight + 0.5 * other.up[0].weight @ other.down[0].weight,
        atol=1e-14,
    )


def test_half_precision_is_rounded_once():
    model = Lora().bfloat16().eval()
    fast = tautomer.optimize(model, (X.bfloat16(),), passes=[MergeLora(), *NAMING])
    W, A, B = (w.detach().double() for w in (model.base.weight, model.down[0].weight, model.up[0].weight))
    assert torch.equal(fast.state_dict()["base.weight"], (W + 0.5 * (B @ A)).bfloat16())


def test_it_is_part_of_inference_and_of_no_training():
    fast = tautomer.optimize(Lora().eval(), (X,))
    assert fast.report.fired("merge-lora") == 1
    assert not tautomer.optimize(Lora(), (X,), recipe="training").report.fired("merge-lora")


def test_a_dropout_keeps_the_adapter_while_it_trains():
    program, log = run(Lora(dropout=0.1).eval(), mode="both")
    assert program.count(LINEAR) == 3
    assert [refusal.reason for refusal in log.refusals] == [
        "a dropout drops what the adapter reads while the model trains: capture it in eval mode"
    ]
    assert run(Lora(dropout=0.1).eval())[0].count(LINEAR) == 1


def test_an_adapter_that_reads_the_same_value_reshaped_in_another_spelling():
    def body(m, x):
        heads = x.view(*x.shape[:2], 2, 3).tanh()
        a, b = heads.reshape(*x.shape[:2], 6), heads.reshape(*x.shape[:2], -1)
        return m.base(a) + m.up[0](m.down[0](b)) * 2.0

    program, log = run(Function(body))
    assert program.count(LINEAR) == 1 and log.applications[0].error <= 1e-12


class Function(Lora):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda m, x: m.base(x) + m.up[0](m.down[0](x)) + F.linear(x.tanh(), m.base.weight),
            "'base.weight' would be stored twice",
        ),
        (lambda m, x: m.base(x) + m.up[0](m.down[0](x.tanh())), None),  # another input
        (lambda m, x: m.base(x) + m.up[0](m.down[0](x)) * x.mean(), None),  # scaled by what is computed
        (lambda m, x: m.base(x) - m.up[0](m.down[0](x)), None),
        (lambda m, x: m.base(x) + m.up[0](m.down[0](x).relu()), None),
    ],
)
def test_it_stays(body, reason):
    _, log = run(Function(body))
    assert not log.applications
    assert (reason is None and not log.refusals) or reason in log.refusals[0].reason


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
def test_peft_on_the_shipped_model(byte_lm):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        byte_lm, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], lora_dropout=0.1, fan_in_fan_out=True)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(256, (2, 7))
    fast = tautomer.optimize(model, (), {"input_ids": ids, "use_cache": False}, passes=[MergeLora(), *NAMING])
    assert fast.report.fired("merge-lora") == 16 and not any("lora" in name for name in fast.state_dict())
    merged = model.merge_and_unload()
    assert torch.allclose(fast(input_ids=ids, use_cache=False).logits, merged(ids).logits, atol=1e-4)
