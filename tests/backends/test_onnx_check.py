"""An ONNX file is held to PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tautomer.backends import onnx_table
from tautomer.backends.onnx_check import compare, open_session, tensor_outputs, tolerance
from tautomer.backends.to_onnx import to_onnx
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ExportError

X = torch.randn(2, 5, 8)


def program(model: nn.Module, dtype: torch.dtype = torch.float32):
    return capture(model.eval().to(dtype), (X.to(dtype),))


def test_the_tolerance_is_of_the_coarsest_dtype():
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    found = [tolerance(program(nn.Linear(8, 8), dtype)) for dtype in dtypes]
    assert found == [1e-7, 1e-4, 2e-2, 5e-2]


def test_integer_outputs_must_be_equal(tmp_path):
    class Count(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return (x > 0).sum(-1) + self.by

    to_onnx(program(Count(0)), tmp_path / "m.onnx")
    assert compare(program(Count(0)), tmp_path / "m.onnx", "cpu", True, None, ["n"])[0] == 0.0
    with pytest.raises(ExportError, match="disagree on 'n': relative error inf"):
        compare(program(Count(1)), tmp_path / "m.onnx", "cpu", True, None, ["n"])


def test_a_file_of_fixed_size_fails_at_another(tmp_path):
    free = program(nn.Linear(8, 8))
    to_onnx(free, tmp_path / "m.onnx", dynamic=False)
    assert compare(free, tmp_path / "m.onnx", "cpu", False, None, ["y"])[1] == ("input[2, 5, 8]",)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run Linear at input\[1, "):
        compare(free, tmp_path / "m.onnx", "cpu", True, None, ["y"])


def test_a_file_that_does_not_load_is_said(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot load the file"):
        open_session(tmp_path / "m.onnx", "cpu")


def test_outputs_that_are_no_tensors_are_left_out():
    class Mixed(nn.Module):
        def forward(self, x):
            return x + 1, None, 3, x * 2

    assert tensor_outputs(program(Mixed())) == [0, 3]


class Net(nn.Module):
    def forward(self, x):
        return torch.nn.functional.rms_norm(x.sin(), (8,)).cos() * 2


def test_the_first_op_that_disagrees_is_named(tmp_path, monkeypatch):
    def half(input, normalized_shape, weight=None, eps=None):
        return onnx_table.opset23.Mul(rms_norm(input, normalized_shape, weight, eps), onnx_table.opset23.CastLike(0.5, input))

    rms_norm = onnx_table.rms_norm
    row, *others = onnx_table.ROWS
    monkeypatch.setattr(onnx_table, "ROWS", (replace(row, translate=half), *others))
    with pytest.raises(
        ExportError, match=r"on 'output'.*first op that disagrees is aten\.rms_norm \('rms_norm', Mul in the file\)"
    ):
        to_onnx(program(Net()), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_the_graph_is_told_from_a_wrong_file(tmp_path):
    with pytest.raises(ExportError, match="every op of the file agrees with the captured graph"):
        to_onnx(program(Net()), tmp_path / "m.onnx", reference=lambda x: Net()(x) * 1.1)
    assert not list(tmp_path.iterdir())
