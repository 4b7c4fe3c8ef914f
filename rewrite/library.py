"""The semantic ops that ATen has no name for: a ``torch.library`` op each, whose body is its meaning.

    add_rms_norm(x, r, g)  =  rms_norm(x + r, g), x + r

A body is plain differentiable torch, so the op needs no fake, no formula for its gradient and no kernel: ``torch.export`` keeps
it as one node, Inductor fuses what it is made of, and ONNX gets its parts where a table has no row for it.

torch.compile's disk cache knows an op by its name alone. Whoever changes a body therefore changes the version in its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._torch import values_unasked
from .hybrid_attention import block_attention, hybrid_attention, hybrid_attention_state, hybrid_attention_step
from .kernel_attention import kernel_attention, kernel_attention_state, kernel_attention_step
from .landmark_attention import linformer_attention, nystrom_attention
from .nearest_keys import window_attention_state, window_attention_step
from .pooling import ponet_attention, poolformer_attention
from .subset_attention import hyper_attention, top_attention, window_attention


@dataclass(frozen=True)
class Semantic:
    """One op of the namespace ``tautomer``.

    Attributes:
        schema: name with its version, arguments, results.
        body: what it computes.
        fake: its result without the values, for a body that asks PyTorch about sizes; by default the body says.
    """

    schema: str
    body: Callable[..., Any]
    fake: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """The texts of the functions of tautomer that the body calls, and of the body itself."""
        found, stack = set[FunctionType](), [self.body]
        while stack:
            function = stack.pop()
            ours = isinstance(function, FunctionType) and function.__module__.startswith("tautomer.")
            if isinstance(function, FunctionType) and ours and function not in found:
                found.add(function)
                named = [function.__globals__.get(name) for name in _names(function.__code__)]
                stack += [other for other in named if isinstance(other, FunctionType)]
        ordered = sorted(found, key=lambda f: (f is self.body, f.__module__ == self.body.__module__, f.__code__.co_firstlineno))
        return tuple(map(inspect.getsource, ordered))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def crms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """RMSNorm of a zero-mean vector of which all but the last of d coordinates are given: the last is minus their sum.

    x / sqrt((sum(x²) + (sum x)²) / d + eps) · weight        d = len(x) + 1; arXiv:2305.14858
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    normed = (wide * torch.rsqrt(total / (x.shape[-1] + 1) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual), and the sum itself."""
    total = x + residual
    return F.layer_norm(total, list(normalized_shape), weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and the sum itself."""
    total = x + residual
    return F.rms_norm(total, list(normalized_shape), weight, eps), total


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), an approximation of GELU; arXiv:1606.08415."""
    return x * torch.sigmoid(1.702 * x)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up: a gated linear unit; arXiv:2002.05202.

    Args:
        activation: "sigmoid" (GLU), "relu" (ReGLU), "gelu" or "gelu_tanh" (GEGLU), "silu" (SwiGLU), "quick_gelu".
    """
    match activation:
        case "silu":
            return F.silu(gate) * up
        case "gelu":
            return F.gelu(gate) * up
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "quick_gelu":
            return gate * torch.sigmoid(1.702 * gate) * up
        case "sigmoid":
            return torch.sigmoid(gate) * up
        case "relu":
            return F.relu(gate) * up
    raise ValueError(f"glu knows no activation '{activation}'")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: the pairs (a, b) of channels of x → (a cos - b sin, b cos + a sin); arXiv:2104.09864.

    Args:
        x: ``[*, d]``; heads before or after positions, as ``cos`` and ``sin`` broadcast.
        cos: ``[*, r]``, r even and at most d: the first r channels of x turn, the others pass.
        sin: as ``cos``.
        interleaved: channel 2i pairs with 2i + 1, instead of i with i + r/2.
    """
    r = cos.shape[-1]
    whole = r == x.shape[-1]
    y = x if whole else x[..., :r]
    if interleaved:
        across = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        a, b = y.chunk(2, -1)
        across = torch.cat((-b, a), -1)
    turned = y * cos + across * sin
    return turned if whole else torch.cat((turned, x[..., r:]), -1)


def normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) over the last axis: queries and keys of QKNorm, arXiv:2010.04245."""
    length: Tensor = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
    return x / length.clamp_min(eps)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    key_heads: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v for heads that lie side by side in the last axis, as linear layers write and read them.

    Args:
        query: ``[batch, t, heads * d]``.
        key: ``[batch, s, key_heads * d]``; each head serves ``heads / key_heads`` heads of the queries.
        value: ``[batch, s, key_heads * e]``.
        mask: as of ``scaled_dot_product_attention``, broadcast to ``[batch, heads, t, s]``.
        causal: position i sees the positions j ≤ i.

    Returns:
        ``[batch, t, heads * e]``.
    """
    q, k, v = (_apart(x, n) for x, n in ((query, heads), (key, key_heads), (value, key_heads)))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=heads != key_heads)
    return y.transpose(1, 2).flatten(2)


def heads_last(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """[batch, heads, n, e], its heads side by side in memory, as attention returns it."""
    batch, heads, n, _ = query.shape
    return query.new_empty(batch, n, heads, value.shape[-1]).transpose(1, 2)


def value_heads_last(value: Tensor, *others: Any, **options: Any) -> Tensor:
    """``heads_last`` of what reads values alone."""
    return heads_last(value, value, value)


def _apart(x: Tensor, heads: int) -> Tensor:
    """[batch, t, heads * d] → [batch, heads, t, d]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    heads: int,
    key_heads: int,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``packed_attention`` over the keys and values of the past and of now: its result, and both caches for the next call.

    Args:
        past_key: ``[batch, key_heads, p, d]``.
        past_value: ``[batch, key_heads, p, e]``.
        mask: broadcast to ``[batch, heads, t, p + s]``.
        causal: position i of now, the p + i-th of all, sees the positions j ≤ p + i; without a mask then.

    Returns:
        ``[batch, t, heads * e]``, ``[batch, key_heads, p + s, d]``, ``[batch, key_heads, p + s, e]``.
    """
    q, k, v = (_apart(x, n) for x, n in ((query, heads), (key, key_heads), (value, key_heads)))
    k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    if causal:
        if mask is not None:
            raise ValueError("cached_attention is causal or takes a mask, not both")
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past_key.shape[2])
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != key_heads)
    return y.transpose(1, 2).flatten(2), k, v


def block_linear(x: Tensor, blocks: Tensor) -> Tensor:
    """The product with a block diagonal matrix, block by block: block i of ``x`` times the transposed block i.

    Args:
        x: ``[..., k, q]``, in any layout.
        blocks: ``[k, p, q]``.

    Returns:
        ``[..., k, p]``.
    """
    # One product per block: a batched one would copy x, or the blocks for every token. Where symbolic sizes were merged, strides
    # are minima, of which a product cannot tell what it asks; those of a copy are none.
    if not all(isinstance(stride, int) for stride in x.stride()):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.stack([F.linear(x.select(-2, i), blocks[i]) for i in range(blocks.shape[0])], -2)


SEMANTIC = (
    Semantic("crms_norm.v1(Tensor x, Tensor? weight=None, float eps=1e-05) -> Tensor", crms_norm),
    Semantic(
        "add_layer_norm.v1(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
        "float eps=1e-05) -> (Tensor, Tensor)",
        add_layer_norm,
    ),
    Semantic(
        "add_rms_norm.v1(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) "
        "-> (Tensor, Tensor)",
        add_rms_norm,
    ),
    Semantic("quick_gelu.v1(Tensor x) -> Tensor", quick_gelu),
    Semantic("glu.v1(Tensor gate, Tensor up, str activation) -> Tensor", glu),
    Semantic("rotary.v1(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", rotary),
    Semantic("normalize.v1(Tensor x, float eps=1e-12) -> Tensor", normalize),
    Semantic(
        "packed_attention.v1(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, int key_heads, bool causal=False, "
        "float? scale=None) -> Tensor",
        packed_attention,
    ),
    Semantic(
        "cached_attention.v1(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, Tensor? mask, "
        "int heads, int key_heads, bool causal=False, float? scale=None) -> (Tensor, Tensor, Tensor)",
        cached_attention,
    ),
    Semantic("block_linear.v1(Tensor x, Tensor blocks) -> Tensor", block_linear),
    Semantic(
        "kernel_attention.v1(Tensor query, Tensor key, Tensor value, Tensor? log_decay=None, Tensor? keep=None, "
        "bool causal=False, bool normalized=True, int chunk=64) -> Tensor",
        kernel_attention,
        heads_last,
    ),
    Semantic(
        "kernel_attention_step.v1(Tensor query, Tensor key, Tensor value, Tensor state, Tensor? log_decay=None, "
        "bool normalized=True) -> (Tensor, Tensor)",
        kernel_attention_step,
    ),
    Semantic(
        "hybrid_attention.v1(Tensor query, Tensor key, Tensor value, Tensor query_features, Tensor key_features, Tensor gate, "
        "int window, bool terraced=False, Tensor? keep=None, float? scale=None) -> Tensor",
        hybrid_attention,
        heads_last,
    ),
    Semantic(
        "hybrid_attention_step.v1(Tensor query, Tensor key, Tensor value, Tensor query_features, Tensor key_features, "
        "Tensor gate, Tensor state, Tensor keys, Tensor values, Tensor features, Tensor position, float? scale=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        hybrid_attention_step,
    ),
    Semantic(
        "kernel_attention_state.v1(Tensor query, Tensor key, Tensor value, Tensor? log_decay=None, bool normalized=True) "
        "-> Tensor",
        kernel_attention_state,
    ),
    Semantic(
        "hybrid_attention_state.v1(Tensor query, Tensor key, Tensor value, Tensor key_features, int window) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        hybrid_attention_state,
    ),
    Semantic(
        "window_attention_state.v1(Tensor key, Tensor value, int window, int sinks=0) -> (Tensor, Tensor)",
        window_attention_state,
    ),
    Semantic(
        "window_attention_step.v1(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor position, "
        "float? scale, int sinks=0, bool aligned=False) -> (Tensor, Tensor, Tensor)",
        window_attention_step,
    ),
    Semantic(
        "block_attention.v1(Tensor query, Tensor key, Tensor value, int block, bool causal=False, Tensor? keep=None, "
        "float? scale=None) -> Tensor",
        block_attention,
        heads_last,
    ),
    Semantic(
        "window_attention.v1(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, int window, int sinks=0, "
        "bool causal=False, bool blocks=True) -> Tensor",
        window_attention,
        heads_last,
    ),
    Semantic(
        "top_attention.v1(Tensor query, Tensor key, Tensor value, Tensor rotation, Tensor? mask, float scale, int "
        "count, int of=0, bool causal=False, bool gather=True) -> Tensor",
        top_attention,
        heads_last,
    ),
    Semantic(
        "hyper_attention.v3(Tensor query, Tensor key, Tensor value, Tensor planes, Tensor draws, Tensor? mask, float scale, "
        "int block, int leaf, int longest, bool causal=False) -> Tensor",
        hyper_attention,
        heads_last,
    ),
    Semantic(
        "nystrom_attention.v1(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, int landmarks, int "
        "iterations=6) -> Tensor",
        nystrom_attention,
        heads_last,
    ),
    Semantic(
        "linformer_attention.v1(Tensor query, Tensor key, Tensor value, Tensor E, Tensor F_, Tensor? mask, float scale) "
        "-> Tensor",
        linformer_attention,
        heads_last,
    ),
    Semantic(
        "ponet_attention.v1(Tensor query, Tensor key, Tensor gate, Tensor segment, Tensor local, Tensor? keep, int segments, "
        "int window=3) -> Tensor",
        ponet_attention,
        heads_last,
    ),
    Semantic(
        "poolformer_attention.v1(Tensor value, Tensor? keep, int size=3, int[] grid=[], int prefix=0, "
        "bool causal=False) -> Tensor",
        poolformer_attention,
        value_heads_last,
    ),
)
"""Every op of the namespace ``tautomer``."""

FAKES = {f"tautomer.{op.name}": op.fake for op in SEMANTIC if op.fake is not None}
"""What stands for a body where only shapes are asked for."""

_LIBRARY: Any = torch.library.Library("tautomer", "FRAGMENT")  # type: ignore[no-untyped-call]  # ops live as long as this


def _kernel(op: Semantic) -> Callable[..., Any]:
    """What PyTorch calls: the body, or in its place ``fake`` where an export asks for a shape alone."""
    fake, body = op.fake, op.body
    if fake is None:
        return body

    def kernel(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not values_unasked(first):
            return body(first, *args, **kwargs)
        with torch.no_grad():
            shape = fake(first, *args, **kwargs)
        trains = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (first, *args))
        return shape.requires_grad_(trains)

    return kernel


for _op in SEMANTIC:
    _LIBRARY.define(_op.schema)
    _LIBRARY.impl(_op.name, _kernel(_op), "CompositeImplicitAutograd")

tautomer: Any = torch.ops.tautomer
