"""How ops become ONNX, where torch's own translation will not do. Keyed by opset: a row exists only where its op exists.

    rms_norm(x, [d])          ->  RMSNormalization(x, ones[d])                since opset 23
    attention(q, k, v)        ->  Attention(q, k, v)                          since opset 23
    sort(x, stable)           ->  TopK(x, all of them)                        of everything
    grouped_mm(x, W, ends)    ->  a MatMul for each expert                    of transformers' mixtures
    add_layer_norm(x, r)      ->  LayerNormalization(Sum(x, r))               CPU
    add_layer_norm(x, r)      ->  SkipLayerNormalization(x, r)                CUDA
    add_rms_norm(x, r)        ->  SkipSimplifiedLayerNormalization(x, r)      CUDA

The last two are of ONNX Runtime (com.microsoft), whose CPU kernels for them are slower than sum and norm apart. On a CPU it
makes the slow one itself of an Add and a LayerNormalization, but not of a Sum. torch writes a scale of the whole shape of x for
the first, and refuses the second where one key head serves all query heads by broadcasting. LayerNormalization (17) and Gelu
(20) are torch's own and right. Below the opset of a row torch decomposes the op, and an op of ours without a row is what it is
made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir
import onnxscript.values
import torch
from onnxscript import onnx_opset

from tautomer.rewrite.library import tautomer

opset18: Any = onnx_opset.opset18
opset23: Any = onnx_opset.opset23
Translation = Callable[..., Any]


def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """``aten.rms_norm`` as one RMSNormalization; the statistics are float32 at least, as in PyTorch."""
    if weight is None:
        weight = _ones(input, normalized_shape)
    wide = input.dtype == onnx_ir.DataType.DOUBLE
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps if eps is None else eps
    kind = onnx_ir.DataType.DOUBLE if wide else onnx_ir.DataType.FLOAT
    return opset23.RMSNormalization(input, weight, axis=-len(normalized_shape), epsilon=eps, stash_type=kind.value)


def _ones(x: Any, shape: Sequence[int]) -> Any:
    """A gain of ones, of the dtype of ``x``."""
    ones = opset23.Constant(value=onnx_ir.tensor([1.0] * int(torch.Size(shape).numel()), dtype=x.dtype))
    return ones if len(shape) == 1 else opset23.Reshape(ones, opset23.Constant(value_ints=list(shape)))


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
    """``aten.scaled_dot_product_attention`` as one Attention of rank 4; a file computes no dropout."""
    if len(query.shape) != 4:
        leading = opset23.Shape(query, end=-1)
        if attn_mask is not None:
            whole = opset23.Expand(attn_mask, opset23.Concat(leading, opset23.Shape(key, start=-2, end=-1), axis=0))
            whole.shape = onnx_ir.Shape([*query.shape[:-1], key.shape[-2]])
            attn_mask = _four_axes(whole)
        q, k, v = (_four_axes(x) for x in (query, key, value))
        found = attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return opset23.Reshape(found, opset23.Concat(leading, opset23.Shape(value, start=-1), axis=0))
    heads = query.shape[1]
    if not enable_gqa and isinstance(heads, int):
        shared = opset23.Constant(value_ints=[1, heads, 1, 1])
        key, value = (x if x.shape[1] == heads else opset23.Expand(x, shared) for x in (key, value))
    mask = _spread(attn_mask, _size(query, 2), _size(key, 2))
    options = {"scale": scale, "is_causal": int(is_causal), "softmax_precision": _softmax_precision(query)}
    return opset23.Attention(query, key, value, attn_mask=mask, **options)[0]


def _four_axes(x: Any) -> Any:
    """``x`` with all axes before its last three as one, which it gets if it has none."""
    rest = opset23.Shape(x, start=-3)
    found = opset23.Reshape(x, opset23.Concat(opset23.Constant(value_ints=[-1]), rest, axis=0))
    found.shape = onnx_ir.Shape([None, *x.shape[-3:]])
    return found


def packed_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    heads: int,
    key_heads: int,
    causal: bool = False,
    scale: float | None = None,
) -> Any:
    """``tautomer.packed_attention`` as one Attention of rank 3."""
    options = _packed(query, heads, key_heads, causal, scale)
    return opset23.Attention(query, key, value, attn_mask=_spread(mask, _size(query, 1), _size(key, 1)), **options)[0]


def cached_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    mask: Any,
    heads: int,
    key_heads: int,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Any, Any, Any]:
    """``tautomer.cached_attention`` as one Attention of rank 3, which counts causality from the end of the past."""
    if mask is not None:
        mask = _spread(mask, _size(query, 1), lambda: opset23.Add(_size(past_key, 2)(), _size(key, 1)()))
    options = _packed(query, heads, key_heads, causal, scale)
    found = opset23.Attention(query, key, value, mask, past_key, past_value, **options)
    return found[0], found[1], found[2]


def _packed(query: Any, heads: int, key_heads: int, causal: bool, scale: float | None) -> dict[str, Any]:
    """The attributes of an Attention of rank 3."""
    counts = {"q_num_heads": heads, "kv_num_heads": key_heads, "is_causal": int(causal), "scale": scale}
    return {**counts, "softmax_precision": _softmax_precision(query)}


def _softmax_precision(x: Any) -> int | None:
    """float32 for 16 bits, as in PyTorch; otherwise that of ``x``."""
    narrow = x.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    return onnx_ir.DataType.FLOAT.value if narrow else None


def _spread(mask: Any, rows: Callable[[], Any], columns: Callable[[], Any]) -> Any:
    """A mask with all its rows and columns: the kernels broadcast over batch and heads alone."""
    if mask is None or all(size != 1 for size in mask.shape[-2:]):
        return mask
    return opset23.Expand(mask, opset23.Concat(rows(), columns(), axis=0))


def _size(x: Any, axis: int) -> Callable[[], Any]:
    return lambda: opset23.Shape(x, start=axis, end=axis + 1)


def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """``aten.sort.stable`` as one TopK of everything, which puts what is equal in the order of its places."""
    axis = dim % len(x.shape)
    values, places = opset18.TopK(x, opset18.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)
    return values, places


def grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """``transformers.grouped_mm_fallback`` as one MatMul per expert: rows offs[e-1] to offs[e] of input times weight[e]."""
    experts = weight.shape[0]
    zero, one = opset18.Constant(value_ints=[0]), opset18.Constant(value_int=1)
    ends = opset18.Concat(zero, opset18.Cast(offs, to=onnx_ir.DataType.INT64.value), axis=0)
    parts = []
    for expert in range(experts):
        start, end = (opset18.Gather(ends, opset18.Constant(value_int=i)) for i in (expert, expert + 1))
        # Not a Slice: the optimizer compares every two of them.
        rows = opset18.Gather(input, opset18.Range(start, end, one), axis=0)
        parts.append(opset18.MatMul(rows, opset18.Gather(weight, opset18.Constant(value_int=expert), axis=0)))
    return opset18.Concat(*parts, axis=0)


def of_others() -> dict[Callable[..., Any], Translation]:
    """The translations of operators that other libraries have registered by now, and that torch knows nothing of."""
    ours = torch.ops.transformers
    return {ours.grouped_mm_fallback.default: grouped_mm} if hasattr(ours, "grouped_mm_fallback") else {}


def add_layer_norm(
    x: Any, residual: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, Any]:
    """``tautomer.add_layer_norm`` as one SkipLayerNormalization; over several axes, or of another rank, sum and norm apart."""
    if not _skips(x, normalized_shape):
        return sum_layer_norm(x, residual, normalized_shape, weight, bias, eps)
    scale = _ones(x, normalized_shape) if weight is None else weight
    found = _skip("SkipLayerNormalization", 5)(x, residual, scale, bias, None, epsilon=eps)
    return found[0], found[3]


def sum_layer_norm(
    x: Any, residual: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, Any]:
    """``tautomer.add_layer_norm`` as a Sum and a LayerNormalization, which ONNX Runtime leaves apart; its Sum has no 16 bits."""
    wide = x.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE)
    total = opset23.Sum(x, residual) if wide else opset23.Add(x, residual)
    scale = _ones(x, normalized_shape) if weight is None else weight
    return opset23.LayerNormalization(total, scale, bias, axis=-len(normalized_shape), epsilon=eps)[0], total


def add_rms_norm(
    x: Any, residual: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> tuple[Any, Any]:
    """``tautomer.add_rms_norm`` as one SkipSimplifiedLayerNormalization; of another rank, sum and norm apart."""
    if not _skips(x, normalized_shape):
        total = opset23.Add(x, residual)
        total.dtype = x.dtype
        return rms_norm(total, normalized_shape, weight, eps), total
    scale = _ones(x, normalized_shape) if weight is None else weight
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    found = _skip("SkipSimplifiedLayerNormalization", 4)(x, residual, scale, None, epsilon=eps)
    return found[0], found[3]


def _skips(x: Any, normalized_shape: Sequence[int]) -> bool:
    """Whether ONNX Runtime has a kernel: the last of two or three axes, not in double precision."""
    return len(normalized_shape) == 1 and len(x.shape) in (2, 3) and x.dtype != onnx_ir.DataType.DOUBLE


def _skip(name: str, inputs: int) -> Any:
    """An operator of ONNX Runtime, which onnxscript has no schema for: ``inputs`` tensors in, normed, mean, scale and sum out."""
    kind, schema = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    optional = kind.FormalParameterOption.Optional
    takes = [schema(f"x{i}", "T", param_option=kind.FormalParameterOption.Single if i < 3 else optional) for i in range(inputs)]
    gives = [schema(f"y{i}", "T", param_option=optional) for i in range(4)]
    types = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")]
    epsilon = [kind.Attribute("epsilon", kind.AttrType.FLOAT, "")]
    made = kind(name, _MICROSOFT, 1, inputs=takes, outputs=gives, type_constraints=types, attributes=epsilon)
    return onnxscript.values.Op(onnxscript.values.Opset(_MICROSOFT, 1), name, made)


_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Row:
    """How one op becomes ONNX, and what is known of the kernel.

    Attributes:
        since: the first opset that has the operator.
        provider: for which provider alone, "" for any.
        op: the op of torch.
        translate: writes it.
        dtypes: the dtypes in which the kernels of ONNX Runtime 1.31 run it; tested for "cpu", documented for "cuda".
        measured: µs against what it replaces at [1, 128, 768] on one CPU thread, or that it was not run here.
    """

    since: int
    provider: str
    op: Callable[..., Any]
    translate: Translation
    dtypes: tuple[torch.dtype, ...]
    measured: str

    @property
    def facts(self) -> dict[str, str]:
        """The row in words: what a table of it shows."""
        form = (inspect.getdoc(self.translate) or "").partition("\n")[0].partition(" as ")[2].rstrip(".")
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        place = {"op": str(self.op), "provider": self.provider or "any", "opset": f"≥ {self.since}"}
        return {**place, "form": form, "runs in": dtypes, "measured": self.measured}


_WIDE = (torch.float32, torch.float64, torch.float16)
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NEVER = "not run here"
_ONLY = "torch writes none"
ROWS: tuple[Row, ...] = (
    Row(23, "", torch.ops.aten.rms_norm.default, rms_norm, _WIDE, "with an Add 52 µs, decomposed 98 µs"),
    Row(
        23, "", torch.ops.aten.scaled_dot_product_attention.default, attention, _WIDE, "with transposes 531 µs, decomposed 540 µs"
    ),
    Row(23, "", tautomer.packed_attention.v1, packed_attention, _WIDE, "992 µs with transposes, 863 µs"),
    Row(23, "", tautomer.cached_attention.v1, cached_attention, _WIDE, "75 µs"),
    Row(18, "cpu", tautomer.add_layer_norm.v1, sum_layer_norm, _WIDE, "73 µs, which ONNX Runtime makes 495 µs of an Add"),
    Row(18, "", torch.ops.aten.sort.stable, stable_sort, (torch.float32, torch.int64), _ONLY),
    Row(23, "cuda", tautomer.add_layer_norm.v1, add_layer_norm, _NARROW, _NEVER),
    Row(23, "cuda", tautomer.add_rms_norm.v1, add_rms_norm, _NARROW, _NEVER),
)


def table(opset: int, provider: str = "cpu") -> dict[Callable[..., Any], Translation]:
    """The translations to hand to ``torch.onnx.export(custom_translation_table=…)`` for an opset and a provider.

    Example:
        >>> len(table(18)), len(table(23)), len(table(23, "cuda"))
        (2, 6, 7)
    """
    return {row.op: row.translate for row in ROWS if opset >= row.since and row.provider in ("", provider)}
