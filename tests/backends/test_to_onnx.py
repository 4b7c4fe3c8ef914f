"""A written file agrees with PyTorch; a file that does not is not written."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnxruntime
import onnxscript.optimizer
import pytest
import torch
from torch import nn
from torch.onnx import ONNXProgram
from transformers import RwkvConfig, RwkvModel
from zoo.models import ZOO

import tautomer
from tautomer.backends import to_onnx as module
from tautomer.backends.targets import resolve
from tautomer.backends.to_onnx import OnnxReport, refuse_unrolled, to_onnx
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ExportError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None, flag=True):
        x = self.drop(self.linear(self.norm(x)))
        return {"logits": nn.functional.rms_norm(x, (8,), eps=1e-6), "kept": x if mask is None else x * mask, "none": None}


X = torch.randn(2, 5, 8)


def program(mode: str = "eval"):
    return capture(Net(), (X,), {"mask": torch.ones(2, 5, 1)}, mode=mode)


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_it_is_written_run_and_reported(tmp_path):
    path = tmp_path / "net.onnx"
    report = to_onnx(program(), path, rewrites=("first", "second"))
    assert isinstance(report, OnnxReport) and report.path == path and leftovers(tmp_path) == ["net.onnx"]
    assert report.error is not None and report.error <= 1e-5
    assert report.nodes["LayerNormalization"] == 1 and report.nodes["RMSNormalization"] == 1 and "Dropout" not in report.nodes
    assert report.bytes == path.stat().st_size and report.opset == 23
    assert report.sizes[0] == "x[2, 5, 8], mask[2, 5, 1]" and report.sizes[1].startswith("x[1, ")
    assert "ONNX Runtime (cpu) against PyTorch" in str(report) and r"\[" in report.__rich__()
    model = onnx.load(path)
    assert [x.name for x in model.graph.input] == ["x", "mask"] and [x.name for x in model.graph.output] == ["logits", "kept"]
    assert {p.key: p.value for p in model.metadata_props}["tautomer.rewrites"] == "first, second"
    assert model.opset_import[0].version == 23
    onnx.checker.check_model(path)


def test_static_sizes_are_the_examples(tmp_path):
    report = to_onnx(program(), tmp_path / "net.onnx", dynamic=False)
    assert report.sizes == ("x[2, 5, 8], mask[2, 5, 1]",)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 5, 8]


def test_a_program_of_both_modes_is_written_in_eval_mode(tmp_path):
    captured = program("both")
    captured.training = dict.fromkeys(captured.training, False)
    report = to_onnx(captured, tmp_path / "net.onnx")
    assert "Dropout" not in report.nodes and report.error is not None and report.error <= 1e-5


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_opsets(opset, tmp_path):
    report = to_onnx(program(), tmp_path / "net.onnx", opset=opset)
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset
    assert report.nodes.get("RMSNormalization", 0) == (1 if opset >= 23 else 0)


def test_it_is_compared_with_the_reference(tmp_path):
    model = Net().eval()
    captured = capture(model, (X,))
    assert to_onnx(captured, tmp_path / "net.onnx", reference=model).error is not None
    with torch.no_grad():
        model.linear.bias[3] += 1e-2
    wrong = Net().eval()
    with pytest.raises(ExportError, match=r"disagree on '(logits|kept)': relative error \d"):
        to_onnx(captured, tmp_path / "other.onnx", reference=wrong)
    assert leftovers(tmp_path) == ["net.onnx"]


def test_a_mismatch_names_the_worst_output_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")

    def reference(x, mask=None):
        out = captured_model(x, mask)
        return {**out, "kept": out["kept"] * 1.01}

    captured_model = Net().eval()
    captured = capture(captured_model, (X,), {"mask": torch.ones(2, 5, 1)})
    with pytest.raises(ExportError, match=r"disagree on 'kept': relative error 1\.0e-02|9\.9e-03"):
        to_onnx(captured, path, reference=reference)
    assert path.read_bytes() == b"what was there" and leftovers(tmp_path) == ["net.onnx"]


class Branch(nn.Module):
    def forward(self, x, mask):
        return x * 2 * mask if x.shape[1] > 10 else x


FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


def shapes(values) -> list[list[int | str]]:
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]


def test_a_branch_on_sizes_is_said_and_checked_where_it_was_captured(tmp_path):
    model = Branch().eval()
    captured = capture(model, (torch.randn(2, 12, 4), torch.randn(2, 12, 1)), dynamic_shapes=(FREE, FREE))
    report = to_onnx(captured, tmp_path / "net.onnx", reference=model)
    assert report.sizes == tuple(f"x[{b}, {n}, 4], mask[{b}, {n}, 1]" for b, n in ((2, 12), (1, 13)))
    assert report.conditions == ("x.shape[1] > 10",) and "only for sizes with x.shape[1] > 10" in str(report)
    written = onnx.load(tmp_path / "net.onnx")
    assert {p.key: p.value for p in written.metadata_props}["tautomer.conditions"] == "x.shape[1] > 10"
    names = ["x_dim0", "x_dim1"]
    assert shapes(written.graph.input) == [[*names, 4], [*names, 1]] and shapes(written.graph.output) == [[*names, 4]]
    assert to_onnx(captured, tmp_path / "fixed.onnx", dynamic=False).conditions == ()


def test_a_size_that_the_capture_fixed_is_fixed_in_the_file(tmp_path):
    # The loop of an RWKV: the graph itself would run at any length, and be wrong there.
    model, inputs = rwkv()
    captured = capture(model, inputs)
    assert "leaves[0].size()[1] == 3" in captured.signature.conditions
    report = to_onnx(captured, tmp_path / "net.onnx", reference=model)
    assert report.conditions == () and report.sizes == ("input_ids[2, 3]", "input_ids[1, 3]")
    assert shapes(onnx.load(tmp_path / "net.onnx").graph.input) == [["input_ids_dim0", 3]]


def rwkv() -> tuple[nn.Module, tuple[torch.Tensor]]:
    options = {"hidden_size": 8, "num_hidden_layers": 2, "attention_hidden_size": 8, "intermediate_size": 8}
    config = RwkvConfig(vocab_size=20, context_length=16, use_cache=False, **options)
    return RwkvModel(config).eval(), (torch.randint(1, 20, (2, 3)),)


def test_unchecked_is_said(tmp_path):
    report = to_onnx(program(), tmp_path / "net.onnx", check=False)
    assert report.error is None and report.sizes == () and "not run on ONNX Runtime" in str(report)


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    report = to_onnx(program(), tmp_path / "net.onnx")
    assert leftovers(tmp_path) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("net.onnx", "net.onnx.data"):
        os.rename(tmp_path / name, moved / name)
    onnxruntime.InferenceSession(moved / "net.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"provider": "gpu"}, "no provider 'gpu'"),
        ({"opset": 9}, "opset 9 cannot be written; 18 to 24 can"),
        ({"opset": 99}, "opset 99 cannot be written"),
    ],
)
def test_wrong_arguments_are_said_before_any_work(options, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_translate", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=sentence):
        to_onnx(program(), tmp_path / "net.onnx", **options)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this machine has CUDA")
def test_a_provider_that_is_not_installed_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"(?s)has no CUDAExecutionProvider.*check=False"):
        to_onnx(program(), tmp_path / "net.onnx", provider="cuda")
    with pytest.raises(UsageError, match="has no CUDAExecutionProvider"):
        resolve("onnxruntime-cuda").compile(program())
    report = to_onnx(program(), tmp_path / "net.onnx", provider="cuda", check=False)
    assert report.error is None and "not run on ONNX Runtime" in str(report) and report.path.exists()


def test_a_path_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_translate", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="does not exist"):
        to_onnx(program(), tmp_path / "no" / "net.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        to_onnx(program(), tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written"):
        to_onnx(program(), tmp_path / "net.onnx")


def test_a_program_in_train_mode_is_refused(tmp_path):
    with pytest.raises(UsageError, match="captured in train mode"):
        to_onnx(program("train"), tmp_path / "net.onnx")


def test_an_op_without_a_translation_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"Odd cannot be written as ONNX opset 23: no translation of prims\.bessel_j0"):
        to_onnx(capture(Odd().eval(), (X,)), tmp_path / "net.onnx")
    assert leftovers(tmp_path) == []


def test_nothing_is_printed(tmp_path, capfd):
    to_onnx(program(), tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


class Turned(nn.Module):
    """Rotary embedding by complex numbers; what else they are is known to the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(2, 16, 4), torch.rand(2, 16, 4)))

    def forward(self, x):
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * self.turns[1, : x.shape[1]].unsqueeze(-3)).flatten(-2) + x.unsqueeze(0)[0]


def test_complex_numbers_inside_are_pairs_of_real_ones(tmp_path):
    report = to_onnx(capture(Turned().eval(), (X,)), tmp_path / "turned.onnx")
    assert report.error is not None and report.error <= 1e-5 and report.sizes[1].startswith("x[1, ")


@pytest.mark.parametrize(("function", "x"), [(torch.fft.fft, X), (torch.real, X.to(torch.complex64))])
def test_complex_numbers_at_the_border_are_said_before_any_work(function, x, tmp_path, monkeypatch):
    class Spectral(nn.Module):
        def forward(self, x):
            return function(x)

    captured = capture(Spectral().eval(), (x,))
    monkeypatch.setattr(module, "_translate", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ExportError, match="complex numbers are not supported by ONNX"):
        to_onnx(captured, tmp_path / "net.onnx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_without_a_kernel_is_said(dtype, tmp_path):
    captured = capture(nn.Conv1d(3, 3, 1).eval().to(dtype), (torch.randn(2, 3, 4, dtype=dtype),))
    with pytest.raises(ExportError, match=r"(?s)cannot load the file.*try: model\.float\(\)"):
        to_onnx(captured, tmp_path / "net.onnx")


def test_a_dtype_that_numpy_lacks_is_said(tmp_path):
    with pytest.raises(ExportError, match=r"(?s)cannot run Flatten.*try: model\.float\(\).*bfloat16"):
        to_onnx(capture(nn.Flatten().eval(), (X.bfloat16(),)), tmp_path / "net.onnx")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    report = to_onnx(capture(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval().to(dtype), (X.to(dtype),)), tmp_path / "net.onnx")
    assert report.error is not None


def test_an_output_that_is_returned_twice_or_is_an_input(tmp_path):
    class Same(nn.Module):
        def forward(self, x):
            y = x + 1
            return y, y, x

    assert to_onnx(capture(Same().eval(), (X,)), tmp_path / "net.onnx").error == 0.0


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.zoo) for name in ("llama", "swin", "whisper"))]
)
def test_hugging_face(family, dynamic, tmp_path):
    model, inputs = ZOO[family]()
    report = to_onnx(capture(model, (), inputs), tmp_path / "m.onnx", dynamic=dynamic, reference=model)
    assert report.error is not None and report.error <= 1e-4
    assert len(report.sizes) == (2 if dynamic else 1)


STEPS = {
    "emit": (module, "to_torch"),
    "export": (torch.export, "export"),
    "translate": (torch.onnx, "export"),
    "optimise": (onnxscript.optimizer, "optimize"),
    "name": (module, "rename"),
    "save": (ONNXProgram, "save"),
    "load": (onnxruntime, "InferenceSession"),
    "check": (module, "compare"),
    "move": (os, "replace"),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_what_was_there(step, there, tmp_path, failing):
    if there:
        (tmp_path / "net.onnx").write_bytes(b"what was there")
    captured = program()
    failing(*STEPS[step])
    with pytest.raises((OSError, UsageError, ExportError), match="no space left on device"):
        to_onnx(captured, tmp_path / "net.onnx")
    assert leftovers(tmp_path) == (["net.onnx"] if there else [])
    assert not there or (tmp_path / "net.onnx").read_bytes() == b"what was there"


class Block(nn.Module):
    """What a decoder is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (8,)))))


@pytest.mark.parametrize("opset", [18, 23, 24])
def test_a_block_in_float16(opset, tmp_path):
    torch.manual_seed(0)
    report = to_onnx(capture(Block().eval().half(), (X.half(),)), tmp_path / "m.onnx", opset=opset)
    assert report.error is not None and report.error <= 5e-3 and report.nodes.get("Attention", 0) == (opset >= 23)


def test_a_block_in_bfloat16_names_the_op_without_a_kernel(tmp_path):
    captured = capture(Block().eval().bfloat16(), (X.bfloat16(),))
    with pytest.raises(
        ExportError, match=r"(?s)no cpu kernel for \w+ of these dtypes.*try: model\.float\(\).*kernel for bfloat16"
    ):
        to_onnx(captured, tmp_path / "m.onnx")
    assert leftovers(tmp_path) == []


class Causal(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def test_hyper_attentions_that_would_be_unrolled_for_minutes_are_refused(tmp_path):
    x = (torch.randn(2, 9, 8),)
    recipe = tautomer.LongContext("hyper", block=2, samples=2, leaf=4, longest=2**35)
    fast = tautomer.optimize(Causal().eval(), x, recipe=recipe, check=False)
    with pytest.raises(ExportError, match=r"have 33 levels in all.*more than 32 are refused"):
        tautomer.export_onnx(fast, tmp_path / "model.onnx")
    refuse_unrolled(tautomer.optimize(Causal().eval(), x, recipe=recipe, check=False, dynamic_shapes="static").program)
