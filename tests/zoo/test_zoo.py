"""Every family: captured, rewritten, checked, exported, run. What converts is counted; what does not says why.

The families that the README speaks of run with every test; all of them, with static and dynamic shapes, behind ``zoo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from zoo.models import ZOO

import tautomer
from tautomer.backends.onnx_check import PROVIDERS
from tautomer.rewrite.errors import CaptureError
from tautomer.rewrite.program import target_name

aten = torch.ops.aten

# name: LayerNorms converted, LayerNorms present, run-time centrings, a word of each reason there must be
EXPECTED: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "gpt2": (5, 5, 1, ()),
    "opt": (5, 5, 1, ()),
    "neox": (5, 5, 0, ()),
    "neox-sequential": (5, 5, 0, ()),
    "gptj": (3, 3, 0, ()),
    "bloom": (5, 6, 1, ("tied",)),  # the norm right behind the tied table would need a centring of its own
    "mpt": (5, 5, 1, ()),
    "falcon": (3, 3, 1, ()),
    "phi": (3, 3, 0, ()),
    "starcoder2": (5, 5, 1, ()),
    "llama": (0, 0, 0, ()),
    "gemma": (0, 0, 0, ()),
    "bert": (1, 5, 0, ("post-norm",)),  # the norm of the embeddings alone reads a stream that only weights write
    "distilbert": (1, 5, 0, ("post-norm",)),
    "esm": (5, 5, 0, ()),
    "modernbert": (5, 5, 1, ()),
    "t5": (0, 0, 0, ()),
    "bart": (2, 12, 0, ("post-norm",)),
    "whisper": (12, 12, 2, ()),
    "wav2vec2": (7, 8, 1, ("gelu",)),
    "vit": (5, 5, 0, ()),
    "deit": (5, 5, 0, ()),
    "beit": (0, 5, 0, ("output of the model",)),
    "dinov2": (5, 5, 0, ()),
    "clip-vision": (1, 6, 0, ("output of the model", "post-norm")),
    "siglip-vision": (5, 6, 0, ("output of the model",)),
    "swin": (6, 9, 0, ("joins the features", "post-norm")),
    "convnext": (1, 5, 0, ("output of the model", "conv2d")),
}
NAMED = ("gpt2", "opt", "neox", "gptj", "bloom", "whisper", "vit", "dinov2", "clip-vision", "starcoder2", "bert", "swin", "llama")


def names(*, all_of_them: bool) -> list[Any]:
    marked = [pytest.param(name, marks=pytest.mark.zoo) for name in ZOO if name not in NAMED]
    return [*NAMED, *marked] if all_of_them else list(NAMED)


def first(output: Any) -> Tensor:
    return output[0] if not isinstance(output, Tensor) else output


@pytest.fixture(scope="module")
def optimized() -> dict[str, tuple[nn.Module, dict[str, Any], Any]]:
    return {}


def prepare(cache: dict[str, Any], name: str) -> tuple[nn.Module, dict[str, Any], Any]:
    if name not in cache:
        model, inputs = ZOO[name]()
        cache[name] = model, inputs, tautomer.optimize(model, (), inputs, target="onnxruntime")
    return cache[name]  # type: ignore[no-any-return]


def test_the_table_covers_the_zoo() -> None:
    assert set(EXPECTED) == set(ZOO)


@pytest.mark.parametrize("name", names(all_of_them=True), scope="module")
def test_what_can_be_converted_is(name: str, optimized: dict[str, Any]) -> None:
    _, _, fast = prepare(optimized, name)
    converted, present, centrings, reasons = EXPECTED[name]
    report = fast.report
    assert report.before.ops.get("aten.layer_norm", 0) == present
    assert sum(report.after.ops.get(op, 0) for op in ("aten.layer_norm", "tautomer.add_layer_norm")) == present - converted
    assert report.fired("layer-norm-to-rms-norm") == converted
    assert sum(note.rewrite == "layer-norm-to-rms-norm" for note in report.notes) == centrings
    refused = [r.reason for r in report.refusals if r.rewrite == "layer-norm-to-rms-norm"]
    assert len(refused) == present - converted
    assert all(any(word in reason for reason in refused) for word in reasons), refused
    assert report.evidence.forward <= 1e-12
    assert report.evidence.gradient <= 1e-10
    assert not any("rolled back" in r.reason for r in report.refusals)


@pytest.mark.parametrize("name", names(all_of_them=True), scope="module")
def test_answers_stay_at_other_batch_sizes(name: str, optimized: dict[str, Any]) -> None:
    model, inputs, fast = prepare(optimized, name)
    for batch in (1, 3):
        sized = {key: value[:1].repeat(batch, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        with torch.no_grad():
            torch.testing.assert_close(first(fast(**sized)), first(model(**sized)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", names(all_of_them=True), scope="module")
def test_the_onnx_file_runs_and_agrees(name: str, optimized: dict[str, Any], tmp_path: Path) -> None:
    _, inputs, fast = prepare(optimized, name)
    for shapes in ("auto", "static"):
        report = tautomer.export_onnx(fast, tmp_path / f"{shapes}.onnx", (), inputs, dynamic_shapes=shapes)
        assert report.error is not None and report.error <= 1e-4
        graph = onnx.load(tmp_path / f"{shapes}.onnx", load_external_data=False).graph
        ops = [node.op_type for node in graph.node]
        converted, present, _, _ = EXPECTED[name]
        assert ops.count("LayerNormalization") == present - converted
        assert ops.count("RMSNormalization") >= converted
        assert {x.name for x in graph.input} == set(inputs)
        fixed = all(d.HasField("dim_value") for x in graph.input for d in x.type.tensor_type.shape.dim)
        assert fixed is (shapes == "static")


@pytest.mark.parametrize("name", names(all_of_them=True), scope="module")
def test_a_second_run_changes_nothing(name: str, optimized: dict[str, Any]) -> None:
    _, inputs, fast = prepare(optimized, name)
    again = tautomer.optimize(fast, (), inputs, target="onnxruntime")
    assert not again.report.applications


FUSED = {
    "LayerNormalization": ("aten.layer_norm",),
    "RMSNormalization": ("aten.rms_norm",),
    "Gelu": ("aten.gelu", "tautomer.glu gelu", "tautomer.glu gelu_tanh"),
    "Attention": ("aten.scaled_dot_product_attention", "tautomer.packed_attention", "tautomer.cached_attention"),
    "SkipLayerNormalization": ("tautomer.add_layer_norm",),
    "SkipSimplifiedLayerNormalization": ("tautomer.add_rms_norm",),
}
"""Operators of a file for CUDA, and what stands for one of them in a rewritten graph."""
ON_CPU = FUSED | {
    "LayerNormalization": (*FUSED["LayerNormalization"], *FUSED["SkipLayerNormalization"]),
    "SkipLayerNormalization": (),
}


BOUNDS = {"float16": 5e-3, "float32": 1e-4}
FORMS = (("cpu", "float16"), ("cuda", "float16"), ("cuda", "bfloat16"), ("cuda", "float32"))
SHORT = (("bert", "cuda", "float16"),)
FILES = [(name, *form) for name in ZOO for form in FORMS if (name, form[1]) != ("bart", "float16")]


@pytest.mark.parametrize(
    ("name", "provider", "dtype"), [pytest.param(*file, marks=() if file in SHORT else pytest.mark.zoo) for file in FILES]
)
def test_the_file_in_another_form_holds_what_the_graph_has(
    name: str, provider: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CUDA by its structure, and by the CPU's kernels of the same operators, of which there are none for bfloat16."""
    monkeypatch.setitem(PROVIDERS, "cuda", PROVIDERS["cpu"])
    model, inputs = ZOO[name]()
    kind = getattr(torch, dtype)
    model, inputs = model.to(kind), {key: x.to(kind) if x.is_floating_point() else x for key, x in inputs.items()}
    fast = tautomer.optimize(model, (), inputs, target="onnxruntime" if provider == "cpu" else "onnxruntime-cuda")
    for shapes in ("auto", "static") if dtype == "float16" else ("auto",):
        options = {"provider": provider, "dynamic_shapes": shapes, "check": dtype in BOUNDS}
        report = tautomer.export_onnx(fast, tmp_path / "m.onnx", (), inputs, **options)
        assert dtype not in BOUNDS or (report.error is not None and report.error <= BOUNDS[dtype])
        table = ON_CPU if provider == "cpu" else FUSED
        held = {kind: report.nodes.get(kind, 0) for kind in table}
        assert held == {kind: sum(_is_one_of(names, node) for node in fast.graph.nodes) for kind, names in table.items()}


@pytest.mark.zoo
def test_a_forward_that_looks_for_infinities_in_half_precision_is_refused() -> None:
    """BART's encoder asks at every layer whether a value overflowed, and clamps all of them if one did."""
    model, inputs = ZOO["bart"]()
    with pytest.raises(CaptureError, match=r"(?s)decides by the values of a tensor.*isfinite\(hidden_states\)"):
        tautomer.optimize(model.half(), (), inputs, target="onnxruntime")


def _is_one_of(names: tuple[str, ...], node: fx.Node) -> bool:
    name, given = target_name(node), (*node.args, *node.kwargs.values())
    return name in names or (name == "tautomer.glu" and any(f"{name} {x}" in names for x in given))
