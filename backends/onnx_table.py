"""How ops become ONNX, where torch's own translation will not do. Keyed by opset: a row exists only where its op exists.

    rms_norm(x, [d])  ->  RMSNormalization(x, ones[d])        since opset 23

torch writes a scale of the shape of x there, which ties the file to one size and costs a multiplication per element of
a tensor that is all ones. LayerNormalization (17), Gelu (20) and Attention (23) are torch's own and right. Below the
opset of a row torch decomposes the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from onnxscript import onnx_opset

opset23: Any = onnx_opset.opset23
Translation = Callable[..., Any]


def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """``aten.rms_norm`` as one RMSNormalization; the statistics are float32 at least, as in PyTorch."""
    if weight is None:
        size = int(torch.Size(normalized_shape).numel())
        ones = onnx_ir.tensor([1.0] * size, dtype=input.dtype)
        weight = opset23.Constant(value=ones)
        if len(normalized_shape) > 1:
            weight = opset23.Reshape(weight, opset23.Constant(value_ints=list(normalized_shape)))
    wide = input.dtype == onnx_ir.DataType.DOUBLE
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps if eps is None else eps
    kind = onnx_ir.DataType.DOUBLE if wide else onnx_ir.DataType.FLOAT
    return opset23.RMSNormalization(input, weight, axis=-len(normalized_shape), epsilon=eps, stash_type=kind.value)


_ROWS: tuple[tuple[int, Callable[..., Any], Translation], ...] = ((23, torch.ops.aten.rms_norm.default, rms_norm),)


def table(opset: int) -> dict[Callable[..., Any], Translation]:
    """The translations to hand to ``torch.onnx.export(custom_translation_table=…)`` for an opset.

    Example:
        >>> len(table(18)), len(table(23))
        (0, 1)
    """
    return {op: translation for since, op, translation in _ROWS if opset >= since}
