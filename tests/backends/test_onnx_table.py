"""Every row of the lowering table: one node, the same numbers, and only where the opset has the op."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import pytest
import torch
from torch import nn
from torch.nn import functional

from tautomer.backends.onnx_table import of_others, table
from tautomer.rewrite.library import tautomer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter, of torch's own


def run(function, *inputs, opset=23, provider="cpu"):
    class Call(nn.Module):
        def forward(self, *xs):
            return function(*xs)

    exported = torch.export.export(Call(), inputs)
    rows = table(opset, provider) | of_others()
    program = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, custom_translation_table=rows,
                                optimize=False, verbose=False)  # fmt: skip
    onnxscript.optimizer.optimize(program.model)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
    return program.model, *map(torch.from_numpy, session.run(None, feed))


def scales(model):
    """The shape of every RMSNormalization's scale."""
    return [list(node.inputs[1].shape) for node in model.graph.all_nodes() if node.op_type == "RMSNormalization"]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("dims", [1, 2])
def test_rms_norm(scaled, eps, dims):
    x = torch.randn(2, 5, 8) * 1e-3
    shape = list(x.shape[-dims:])
    inputs = (x, torch.randn(shape)) if scaled else (x,)
    model, found = run(lambda x, g=None: functional.rms_norm(x, shape, g, eps), *inputs)
    assert scales(model) == [shape]
    torch.testing.assert_close(found, functional.rms_norm(x, shape, *inputs[1:], eps=eps), rtol=1e-5, atol=1e-6)


def test_rms_norm_keeps_half_precision_sums_wide():
    x = torch.randn(2, 4096, dtype=torch.float16) * 30
    model, found = run(lambda x: functional.rms_norm(x, [4096], None, 1e-5), x)
    assert scales(model) == [[4096]]
    torch.testing.assert_close(found, functional.rms_norm(x, [4096], None, 1e-5), rtol=2e-3, atol=2e-3)


def test_below_its_opset_there_is_no_rms_normalization():
    assert torch.ops.aten.rms_norm.default in table(23).keys() - table(22).keys()
    x = torch.randn(2, 8)
    model, found = run(lambda x: functional.rms_norm(x, [8], None, 1e-5), x, opset=18)
    assert scales(model) == []
    torch.testing.assert_close(found, functional.rms_norm(x, [8], None, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "shared", "grouped"), [(4, 4, False), (4, 1, False), (4, 2, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(heads, shared, grouped, causal):
    q, k, v = torch.randn(2, heads, 5, 8), torch.randn(2, shared, 5, 8), torch.randn(2, shared, 5, 8)
    attend = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=grouped)  # noqa: E731
    model, found = run(attend, q, k, v)
    assert sum(node.op_type == "Attention" for node in model.graph.all_nodes()) == 1
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_masked_attention(boolean):
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    allowed = torch.ones(5, 5).tril().bool()
    mask = allowed if boolean else torch.zeros(5, 5).masked_fill(~allowed, -torch.inf)
    _, found = run(functional.scaled_dot_product_attention, q, k, v, mask)
    torch.testing.assert_close(found, functional.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert not numpy.isnan(found.numpy()).any()


def close(found, wanted, bound=1e-5):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_attention_of_other_ranks():
    mask = torch.rand(4, 5, 7) > 0.2
    groups = [[torch.randn(*leading, 4, *n) for n in ((5, 8), (7, 8), (7, 6))] for leading in ((), (2,), (2, 3))]

    def attend(mask, *xs):
        calls = [(*xs[i : i + 3], *more) for i in (0, 3, 6) for more in ((), (mask,))]
        return [functional.scaled_dot_product_attention(*call) for call in calls]

    inputs = mask, *(x for group in groups for x in group)
    model, *found = run(attend, *inputs)
    assert kinds(model)["Attention"] == 6
    close(found, attend(*inputs))


MASKS = [(5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (4, 1, 7), (2, 1, 5, 7), (2, 1, 1, 7), (1, 4, 5, 1), (2, 4, 5, 7)]


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_broadcast(boolean):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    masks = [torch.rand(shape) > 0.2 if boolean else torch.randn(shape) for shape in MASKS]

    def attend(q, k, v, *masks):
        packed = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        now, past = [x[:, 3:] for x in packed[1:]], (k[:, :, :3], v[:, :, :3])
        for mask in masks:
            yield functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            yield tautomer.packed_attention.v1(*packed, mask, 4, 4)
            yield from tautomer.cached_attention.v1(packed[0], *now, *past, mask, 4, 4)  # a kernel without caches to return fails

    model, *found = run(lambda *xs: tuple(attend(*xs)), q, k, v, *masks)
    assert kinds(model)["Attention"] == 3 * len(masks)
    close(found, attend(q, k, v, *masks))


PACKED = [(4, 4, False, torch.float32), (4, 2, True, torch.float32), (4, 1, True, torch.float16), (4, 2, False, torch.float64)]


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize(("heads", "shared", "causal", "dtype"), PACKED)
def test_packed_heads(heads, shared, causal, dtype, opset):
    sizes = (5, heads * 8), (5, shared * 8), (5, shared * 6), (shared, 3, 8), (shared, 3, 6)
    inputs = [torch.randn(2, *n, dtype=dtype) for n in sizes]
    rest = None, heads, shared, causal, 0.3
    call = lambda *xs: (tautomer.packed_attention.v1(*xs[:3], *rest), *tautomer.cached_attention.v1(*xs, *rest))  # noqa: E731
    model, *found = run(call, *inputs, opset=opset)
    assert kinds(model) == {"Attention": 2}
    close(found, call(*inputs), 5e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize(("opset", "dim", "descending"), [(18, -1, False), (23, 1, True)])
def test_equal_values_are_sorted_by_their_places(opset, dim, descending):
    x = torch.randint(3, (2, 9, 5))
    model, *found = run(lambda x: tuple(torch.sort(x, dim=dim, descending=descending, stable=True)), x, opset=opset)
    assert kinds(model)["TopK"] == 1
    assert all(map(torch.equal, found, torch.sort(x, dim=dim, descending=descending, stable=True)))


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("LayerNormalization", lambda x: functional.layer_norm(x, [8])),
        ("LayerNormalization", lambda x: functional.layer_norm(x, [8], x[0, 0], x[0, 1], 1e-3)),
        ("Gelu", functional.gelu),
        ("Gelu", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_torchs_own_translations_are_right(op, function):
    x = torch.randn(2, 5, 8)
    model, found = run(function, x)
    assert sum(node.op_type == op for node in model.graph.all_nodes()) == 1
    torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-5)


def kinds(model):
    return Counter(node.op_type for node in model.graph.all_nodes() if node.op_type != "Constant")


FUSED = {
    "layer": (lambda x, r, *w: tautomer.add_layer_norm.v1(x, r, [x.shape[-1]], *w, eps=1e-3), "SkipLayerNormalization", 2),
    "rms": (lambda x, r, *w: tautomer.add_rms_norm.v1(x, r, [x.shape[-1]], *w, eps=1e-3), "SkipSimplifiedLayerNormalization", 1),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("scaled", [True, False])
def test_sum_and_norm_are_one_node_with_both_results_where_the_provider_has_it(name, scaled):
    function, kind, count = FUSED[name]
    inputs = (*torch.randn(2, 2, 5, 8), *(torch.randn(count, 8) if scaled else ()))
    model, normed, total = run(function, *inputs, provider="cuda")
    assert kinds(model) == {kind: 1}
    for found, wanted in zip((normed, total), function(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_elsewhere_they_stay_apart(name):
    function, kind, _ = FUSED[name]
    inputs = torch.randn(2, 2, 5, 8)
    for provider, shaped in (("cpu", inputs), ("cuda", inputs[:, None, None]), ("cuda", inputs.double())):
        model, normed, total = run(function, *shaped, provider=provider)
        assert kind not in kinds(model) and kinds(model)["Add"] + kinds(model)["Sum"] == 1
        for found, wanted in zip((normed, total), function(*shaped), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_onnx_runtime_leaves_a_sum_and_its_layer_norm_apart(dtype, opset, tmp_path):
    """An Add it makes part of one SkipLayerNormalization, whose kernel on a CPU takes several times as long."""
    inputs = *torch.randn(2, 2, 5, 8, dtype=dtype), *torch.randn(2, 8, dtype=dtype)
    function = lambda x, r, *w: FUSED["layer"][0](x, r, *w)[0] * 3  # noqa: E731
    model, found = run(function, *inputs, opset=opset)
    tolerance = 5e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found, function(*inputs), rtol=tolerance, atol=tolerance)
    if dtype == torch.float16:  # its Sum has no 16 bits
        assert kinds(model)["Add"] == 1 and kinds(model)["Sum"] == 0
        return
    assert runtime_kinds(model, tmp_path) == {"Sum": 1, "LayerNormalization": 1, "Mul": 1}
    for node in model.graph.all_nodes():
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    assert ("SkipLayerNormalization" in runtime_kinds(model, tmp_path)) == (dtype == torch.float32)


def runtime_kinds(model, folder):
    """The operators that ONNX Runtime runs of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kinds(onnx_ir.load(folder / "optimized.onnx"))


def test_experts_are_one_product_each():
    importlib.import_module("transformers.integrations.moe")  # registers the operator
    grouped = torch.ops.transformers.grouped_mm_fallback
    x, weight, ends = torch.randn(7, 4), torch.randn(4, 4, 6), torch.tensor([3, 3, 6, 7], dtype=torch.int32)
    model, found = run(grouped, x, weight, ends)
    assert [node.op_type for node in model.graph].count("MatMul") == 4
    torch.testing.assert_close(found, grouped(x, weight, ends))
