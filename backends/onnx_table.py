"""How ops become ONNX, where torch's own translation will not do. Keyed by opset: a row exists only where its op exists.

    rms_norm(x, [d])      ->  RMSNormalization(x, ones[d])         since opset 23
    attention(q, k, v)    ->  Attention(q, k, v)                   since opset 23

torch writes a scale of the whole shape of x for the first, and refuses the second where one key head serves all query
heads by broadcasting. LayerNormalization (17) and Gelu (20) are torch's own and right. Below the opset of a row torch
decomposes the op.
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


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``aten.scaled_dot_product_attention`` of rank 4 as one Attention; a file computes no dropout."""
    heads = query.shape[1]
    if not enable_gqa and isinstance(heads, int):
        shared = opset23.Constant(value_ints=[1, heads, 1, 1])
        key, value = (x if x.shape[1] == heads else opset23.Expand(x, shared) for x in (key, value))
    return opset23.Attention(query, key, value, attn_mask=attn_mask, scale=scale, is_causal=int(is_causal))[0]


_ROWS: tuple[tuple[int, Callable[..., Any], Translation], ...] = (
    (23, torch.ops.aten.rms_norm.default, rms_norm),
    (23, torch.ops.aten.scaled_dot_product_attention.default, attention),
)


def table(opset: int) -> dict[Callable[..., Any], Translation]:
    """The translations to hand to ``torch.onnx.export(custom_translation_table=…)`` for an opset.

    Example:
        >>> len(table(18)), len(table(23))
        (0, 2)
    """
    return {op: translation for since, op, translation in _ROWS if opset >= since}
