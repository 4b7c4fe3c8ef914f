"""Attention in every family, from its eager spelling and as its library fuses it: one op each, its mask recognised.

How many there are is counted by hand from the configurations: one per layer, two in a decoder that reads an encoder.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from zoo.models import ZOO

import tautomer
from tautomer.passes.cleanup.drop_dead_code import DropDeadCode
from tautomer.passes.recipes import ATTENTION
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes

aten = torch.ops.aten

# name: attentions present, what remains of their masks
EXPECTED: dict[str, tuple[int, dict[str, int]]] = {
    "gpt2": (2, {"causal": 2}),
    "opt": (2, {"causal": 2}),
    "neox": (2, {"causal": 2}),
    "neox-sequential": (2, {"causal": 2}),
    "gptj": (2, {"causal": 2}),
    "bloom": (2, {"mask": 2}),  # a bias by distance
    "mpt": (2, {}),  # its table of biases is cut by a rule of its own, whose size export cannot tell
    "falcon": (2, {"causal": 2}),
    "phi": (2, {"causal": 2}),
    "starcoder2": (2, {"causal": 2}),
    "llama": (2, {"causal": 2}),
    "gemma": (2, {"causal": 2}),
    "bert": (2, {"none": 2}),
    "distilbert": (2, {"none": 2}),
    "esm": (2, {"none": 2}),
    "modernbert": (2, {"none": 1, "mask": 1}),  # every other layer looks at its neighbours alone
    "t5": (6, {"none": 2, "mask": 4}),  # trained biases by distance, but not across
    "bart": (6, {"none": 4, "causal": 2}),
    "whisper": (6, {"none": 4, "causal": 2}),
    "wav2vec2": (2, {"none": 2}),
    "vit": (2, {"none": 2}),
    "deit": (2, {"none": 2}),
    "beit": (2, {"none": 2}),
    "dinov2": (2, {"none": 2}),
    "clip-vision": (2, {"none": 2}),
    "siglip-vision": (3, {"none": 3}),  # one pools
    "swin": (3, {"mask": 3}),  # trained biases by offset
    "convnext": (0, {}),
}
NAMED = ("gpt2", "bert", "llama", "t5", "bloom", "modernbert", "vit", "gptj")


def test_the_table_covers_the_zoo() -> None:
    assert set(EXPECTED) == set(ZOO)


def build(name: str, implementation: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = ZOO[name]()
    if implementation == "eager" and name != "mpt":
        model.set_attn_implementation("eager")
    return model, inputs


def form(node: fx.Node) -> str:
    mask, _, causal = (*node.args[3:6], None, 0.0, False)[:3] if len(node.args) < 6 else node.args[3:6]
    return "causal" if causal else "none" if mask is None else "mask"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*NAMED, *(pytest.param(n, marks=pytest.mark.zoo) for n in EXPECTED if n not in NAMED)])
def test_every_attention_is_one_op(name: str, implementation: str) -> None:
    model, inputs = build(name, implementation)
    program, context = tautomer.capture(model, (), inputs), Context()
    outcome = run_passes([kind() for kind in (*ATTENTION, DropDeadCode)], program, context)
    assert not outcome.withdrawn
    present, forms = EXPECTED[name]
    found = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert dict(Counter(map(form, found))) == forms
    assert len(found) + program.count(aten.softmax.int) == present
    if outcome.evidence is not None:
        assert outcome.evidence.forward <= 1e-12
        assert outcome.evidence.gradient is not None and outcome.evidence.gradient <= 1e-10
    again = Context()
    run_passes([kind() for kind in (*ATTENTION, DropDeadCode)], program, again)
    assert not again.log.applications


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_onnx_file_agrees_at_every_length(name: str, tmp_path: Path) -> None:
    model, inputs = build(name, "eager")
    fast = tautomer.optimize(model, (), inputs, target="onnxruntime")
    report = tautomer.export_onnx(fast, tmp_path / "model.onnx", (), inputs)
    assert report.error is not None and report.error <= 1e-4
    assert report.nodes["Attention"] == EXPECTED[name][0]
    assert "Softmax" not in report.nodes and "Trilu" not in report.nodes
    assert len(report.sizes) > 1
