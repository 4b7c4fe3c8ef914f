"""Ops that compute what stock ops do and keep less of it for the backward. Each has its own gradient, exact unless it says else.

    linear_from(x, W, b, by, a, p, q, k)    linear(x, W, b), where x = by(a, p, q, k): keeps a, p and q, and computes x again;
                                            bits and rate: of a dropout behind it
    lean_activation(u, by)                  an activation of several kernels: keeps u alone
    lean_glu(u, v, by)                      by(u) · v: keeps u and v, not by(u)
    lean_rms_norm(x, g, eps)                keeps x and one number per row
    ms_layer_norm(x, g, b, eps)             also returns y = (x - mean) r, and keeps that, and r, instead of x
    ms_rms_norm(x, g, eps)                  the same of y = x r
    lean_dropout(x, p, train)               draws what dropout draws, and keeps one bit per entry
    regelu2(u, approximate), resilu2(u)     two bits per entry of u: the gradient is approximate
    eight_bits(x)                           x in eight bits per entry, for ``linear_from``: the gradient of W is approximate

MS norms and two bits are arXiv:2406.16282, eight bits by group arXiv:2111.11124. Every backward returns its gradients
in the dtypes of the operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .own_gradient import OwnGradient, define

aten = torch.ops.aten


# -- what can be computed again -------------------------------------------------------------------------------


def activated(u: Tensor, by: str) -> Tensor:
    """An activation by name: those of ``glu``, and "mish", "hardswish", "square"."""
    match by:
        case "gelu":
            return F.gelu(u)
        case "gelu_tanh":
            return F.gelu(u, approximate="tanh")
        case "silu":
            return F.silu(u)
        case "quick_gelu":
            return u * torch.sigmoid(1.702 * u)
        case "sigmoid":
            return torch.sigmoid(u)
        case "relu":
            return F.relu(u)
        case "mish":
            return F.mish(u)
        case "hardswish":
            return F.hardswish(u)
        case "square":
            return u.square()
    raise ValueError(f"no activation '{by}'")


def slope(dy: Tensor, u: Tensor, by: str) -> Tensor:
    """dy · by'(u), for the activations of ``glu``."""
    match by:
        case "gelu":
            return aten.gelu_backward(dy, u)  # type: ignore[no-any-return]
        case "gelu_tanh":
            return aten.gelu_backward(dy, u, approximate="tanh")  # type: ignore[no-any-return]
        case "silu":
            return aten.silu_backward(dy, u)  # type: ignore[no-any-return]
        case "quick_gelu":
            s = torch.sigmoid(1.702 * u)
            return dy * s * (1 + 1.702 * u * (1 - s))
        case "sigmoid":
            s = torch.sigmoid(u)
            return dy * s * (1 - s)
        case "relu":
            return torch.where(u > 0, dy, 0)
    raise ValueError(f"no activation '{by}'")


def computed(by: str, a: Tensor, p: Tensor | None, q: Tensor | None, k: float | None) -> Tensor:
    """by(a, p, q, k): a norm of a with gain p, shift q and eps k; "affine" a · p + q; "eight_bits" a in the ranges p;
    or an activation of a, gated by p."""
    match by:
        case "layer_norm":
            return F.layer_norm(a, a.shape[-1:], p, q, k or 0.0)
        case "rms_norm":
            return F.rms_norm(a, a.shape[-1:], p, k)
        case "affine":
            scaled = a if p is None else a * p
            return scaled if q is None else scaled + q
        case "eight_bits" if p is not None:
            return from_eight_bits(a, p)
    y = activated(a, by)
    return y if p is None else y * p


# -- linear_from ----------------------------------------------------------------------------------------------


def linear_from(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by: str,
    a: Tensor,
    p: Tensor | None = None,
    q: Tensor | None = None,
    k: float | None = None,
    bits: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def keep_linear_from(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, bias, by, a, p, q, k, bits, rate = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    sources = (a, p, q, bits) if needs_weight else (None,) * 4
    ctx.save_for_backward(weight if needs_x else None, *sources)
    ctx.by, ctx.k, ctx.rate = by, k, rate
    ctx.dtype, ctx.dtypes = x.dtype, (weight.dtype, bias.dtype if bias is not None else None)


def linear_from_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, a, p, q, bits = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = dy @ weight.to(ctx.dtype)
    rows = dy.reshape(-1, dy.shape[-1])
    if ctx.needs_input_grad[1]:
        x = computed(ctx.by, a, p, q, ctx.k)
        x = (x if bits is None else scaled_by_bits(x, bits, ctx.rate)).to(ctx.dtype)
        dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
    if ctx.needs_input_grad[2]:
        db = rows.sum(0).to(ctx.dtypes[1])
    return dx, dw, db, *(None,) * 7


def linear_from_again(x: Tensor, weight: Tensor, bias: Any, by: str, a: Any, p: Any = None, q: Any = None, *rest: Any) -> int:
    """One per entry of x and step: the activation, the gate; the norm; the product, the sum; the dropout."""
    bits = rest[1] if len(rest) > 1 else None
    steps = 1 if by in ("layer_norm", "rms_norm", "eight_bits") else (p is not None) + (q is not None) + (by != "affine")
    return x.numel() * (steps + (bits is not None)) if weight.requires_grad else 0


# -- activations and gates ------------------------------------------------------------------------------------


def lean_activation(u: Tensor, by: str) -> Tensor:
    return activated(u, by)


def keep_lean_activation(ctx: Any, inputs: Any, output: Tensor) -> None:
    u, ctx.by = inputs
    ctx.save_for_backward(u)


def lean_activation_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (u,) = ctx.saved_tensors
    return slope(dy, u, ctx.by), None


def entries(x: Tensor, *rest: Any) -> int:
    """One per entry of the first operand."""
    return x.numel()


def lean_glu(gate: Tensor, up: Tensor, by: str) -> Tensor:
    return activated(gate, by) * up


def keep_lean_glu(ctx: Any, inputs: Any, output: Tensor) -> None:
    gate, up, ctx.by = inputs
    ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)


def lean_glu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    gate, up = ctx.saved_tensors
    dgate = slope(dy * up, gate, ctx.by) if ctx.needs_input_grad[0] else None
    dup = dy * activated(gate, ctx.by) if ctx.needs_input_grad[1] else None
    return dgate, dup, None


# -- norms over the last axis ---------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_gradients(
    ctx: Any, dz: Tensor, y: Tensor, r: Tensor, weight: Tensor | None, centred: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx = r (dy - [mean dy] - y mean(dy y)) with dy = dz g, and dg = Σ dz y; in float32 at least."""
    dz, y = _wide(dz), _wide(y)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dy = dz if weight is None else dz * weight
        dx = dy - y * (dy * y).mean(-1, keepdim=True)
        dx = r * (dx - dy.mean(-1, keepdim=True) if centred else dx)
    if ctx.needs_input_grad[1]:
        dw = (dz * y).reshape(-1, y.shape[-1]).sum(0)
    return dx, dw


def inverse_rms(x: Tensor, eps: float | None) -> Tensor:
    wide = _wide(x)
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + (torch.finfo(wide.dtype).eps if eps is None else eps))


def lean_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    r = inverse_rms(x, eps)
    y = _wide(x) * r
    return (y if weight is None else y * weight).to(x.dtype), r


def lean_rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    return F.rms_norm(x, x.shape[-1:], weight, eps), inverse_rms(x, eps)


def keep_lean_rms_norm(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    (x, weight, _), (_, r) = inputs, output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, r, weight)


def lean_rms_norm_backward(ctx: Any, dz: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dz is None:
        return None, None, None
    x, r, weight = ctx.saved_tensors
    dx, dw = norm_gradients(ctx, dz, _wide(x) * r, r, weight, centred=False)
    return None if dx is None else dx.to(x.dtype), None if dw is None else dw.to(weight.dtype), None


def ms_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    r = inverse_rms(x, eps)
    y = _wide(x) * r
    z = y.clone() if weight is None else y * weight
    return z.to(x.dtype), y.to(shared_dtype(x)), r


def ms_rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    z, r = lean_rms_norm_reference(x, weight, eps)
    return z, F.rms_norm(x, x.shape[-1:], None, eps), r


def keep_ms_rms_norm(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    _keep_shared(ctx, x, weight, None, output)


def ms_rms_norm_backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (*_from_shared(ctx, dz, centred=False)[:2], None)


def ms_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, r = torch.native_layer_norm(_wide(x), x.shape[-1:], None, None, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps), y.to(shared_dtype(x)), r


def keep_ms_layer_norm(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    _keep_shared(ctx, x, weight, bias, output)


def ms_layer_norm_backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (*_from_shared(ctx, dz, centred=True), None)


def shared_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer reads what has the dtype of x: under autocast, the 16 bits of it."""
    narrowed = x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if narrowed else x.dtype


def _keep_shared(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, y, r = output
    ctx.mark_non_differentiable(y, r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, r, weight if ctx.needs_input_grad[0] else None)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]


def _from_shared(ctx: Any, dz: Tensor | None, centred: bool) -> tuple[Tensor | None, ...]:
    if dz is None:
        return None, None, None
    y, r, weight = ctx.saved_tensors
    db = _wide(dz).reshape(-1, y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    found = norm_gradients(ctx, dz, y, r, weight, centred)
    return tuple(None if d is None else d.to(dtype) for d, dtype in zip((*found, db), ctx.dtypes, strict=True))


# -- some bits per entry --------------------------------------------------------------------------------------


def pack(flags: Tensor, bits: int) -> Tensor:
    """Numbers of 1 or 2 bits, as many in a byte as fit, along the last axis, the first in the lowest bits; the tail of a row is
    filled with 0.

    The numbers of one byte are the bytes of one word, and one product brings them together in its highest byte.
    """
    share, width = 8 // bits, flags.shape[-1]
    tail = -width % share
    if isinstance(width, int) and width == 0:
        return flags.clone()
    if not isinstance(width, int) or tail:  # a symbolic size is no condition
        flags = torch.cat([flags, flags.new_zeros((*flags.shape[:-1], tail))], -1)
    words = flags.contiguous().view(_WORDS[bits])
    gather = sum(1 << 8 * (share - 1) - (8 - bits) * k for k in range(share))
    return (words * gather >> 8 * (share - 1)).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The first ``width`` numbers of every row of ``pack``."""
    byte, share = torch.arange(256, device=packed.device), 8 // bits
    words = sum((byte >> bits * k & (1 << bits) - 1) << 8 * k for k in range(share))
    assert isinstance(words, Tensor)
    return words.to(_WORDS[bits])[packed.to(torch.int32)].view(torch.uint8)[..., :width]


_WORDS = {1: torch.int64, 2: torch.int32}


# -- dropout --------------------------------------------------------------------------------------------------


def lean_dropout(x: Tensor, p: float, train: bool) -> tuple[Tensor, Tensor]:
    if not train or p == 0:
        return x.clone(), x.new_empty(0, dtype=torch.uint8)
    if p == 1:
        noise, y = torch.zeros_like(x), x * 0
    elif x.is_cuda:
        y, noise = torch.native_dropout(x, p, True)
    else:
        noise = torch.empty_like(x).bernoulli_(1 - p)  # in the memory order of x: the numbers that dropout draws
        y = x * noise.div(1 - p)
    flags = noise.to(torch.uint8)
    return y, pack(flags.reshape(1) if x.ndim == 0 else flags, 1)


def lean_dropout_reference(x: Tensor, p: float, train: bool) -> tuple[Tensor, Tensor]:
    return F.dropout(x, p, train), x.new_empty(0, dtype=torch.uint8)


def scaled_by_bits(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """x where its bit is set, divided by the share 1 - p of these as dropout does, and 0 elsewhere; x if there are no bits."""
    if bits.shape[-1] == 0 and x.numel() > 0:
        return x
    noise = unpack(bits, 1, x.shape[-1] if x.ndim else 1).reshape(x.shape)
    if x.is_cuda:
        return aten.native_dropout_backward(x, noise.bool(), 1 / (1 - p) if p < 1 else 0.0)  # type: ignore[no-any-return]
    return x * (noise.to(x.dtype).div(1 - p) if p < 1 else noise.to(x.dtype))


def keep_lean_dropout(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    _, ctx.p, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def lean_dropout_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    (bits,) = ctx.saved_tensors
    return None if dy is None else scaled_by_bits(dy, bits, ctx.p), None, None


# -- two bits per entry ---------------------------------------------------------------------------------------


REGELU2 = (
    (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
    (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
)
RESILU2 = (
    (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
    (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
)
"""a and c of h(u) ≈ Σ a_i max(u - c_i, 0), the best of its form in L2 with Σ a_i = 1 and Σ a_i c_i = 0."""


def segments(u: Tensor, c: tuple[float, ...]) -> Tensor:
    """[u > c_1] + [u > c_2] + [u > c_3], packed; 0 for NaN."""
    u = u.reshape(1) if u.ndim == 0 else u
    low, middle, high = ((u > x).to(torch.uint8) for x in c)
    return pack(low + middle + high, 2)


def step_slope(ctx: Any, dy: Tensor | None, a: tuple[float, ...]) -> Tensor | None:
    """dy times 0, a_1, a_1 + a_2 or 1, by segment; in float32 at least."""
    if dy is None:
        return None
    (packed,) = ctx.saved_tensors
    wide = _wide(dy)
    steps = torch.tensor((0.0, a[0], a[0] + a[1], 1.0), dtype=wide.dtype, device=dy.device)
    flags = unpack(packed, 2, dy.shape[-1] if dy.ndim else 1).to(torch.int32)
    return (wide * steps[flags].reshape(dy.shape)).to(dy.dtype)


def regelu2(u: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    return F.gelu(u, approximate=approximate), segments(u, REGELU2[1])


def resilu2(u: Tensor) -> tuple[Tensor, Tensor]:
    return F.silu(u), segments(u, RESILU2[1])


def keep_segments(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def regelu2_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    return step_slope(ctx, dy, REGELU2[0]), None


def resilu2_backward(ctx: Any, dy: Tensor | None, _: None) -> Tensor | None:
    return step_slope(ctx, dy, RESILU2[0])


# -- eight bits per entry -------------------------------------------------------------------------------------


GROUP = 64
"""Entries along the last axis that share a range."""


def grouped(x: Tensor) -> Tensor:
    """The last axis in groups; the last group is filled with the last entry, which leaves its range as it is."""
    tail = -x.shape[-1] % GROUP
    if not isinstance(tail, int) or tail:  # a symbolic size is no condition
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], tail)], -1)
    return x.unflatten(-1, (-1, GROUP))  # type: ignore[no-any-return,no-untyped-call]


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if isinstance(width, int) and width == 0:
        return x.to(torch.uint8), x.new_empty((*x.shape[:-1], 0, 2), dtype=torch.float32)
    groups = grouped(_wide(x))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 255
    q = ((groups - low) / torch.where(step > 0, step, 1)).round().to(torch.uint8).flatten(-2)
    return q[..., :width].clone(), torch.cat([low, step], -1)


def from_eight_bits(q: Tensor, ranges: Tensor) -> Tensor:
    """low + step q."""
    if ranges.shape[-2] == 0:
        return q.to(ranges.dtype)
    low, step = ranges[..., :1], ranges[..., 1:]
    return (low + step * grouped(q.to(ranges.dtype))).flatten(-2)[..., : q.shape[-1]]


def keep_eight_bits(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.set_materialize_grads(False)


def eight_bits_backward(ctx: Any, *_: None) -> None:
    return None


LEAN = (
    OwnGradient(
        "linear_from.v3", linear_from, keep_linear_from, linear_from_backward,
        uses=(computed, activated, scaled_by_bits, unpack, from_eight_bits, grouped), autocast=True,
        again=linear_from_again,
    ),
    OwnGradient(
        "lean_activation.v1", lean_activation, keep_lean_activation, lean_activation_backward, uses=(activated, slope),
        again=entries,
    ),
    OwnGradient("lean_glu.v1", lean_glu, keep_lean_glu, lean_glu_backward, uses=(activated, slope), again=entries),
    OwnGradient(
        "lean_rms_norm.v1", lean_rms_norm, keep_lean_rms_norm, lean_rms_norm_backward, lean_rms_norm_reference,
        (inverse_rms, norm_gradients), again=entries,
    ),
    OwnGradient(
        "ms_layer_norm.v1", ms_layer_norm, keep_ms_layer_norm, ms_layer_norm_backward,
        uses=(norm_gradients, shared_dtype, _keep_shared, _from_shared),
    ),
    OwnGradient(
        "ms_rms_norm.v1", ms_rms_norm, keep_ms_rms_norm, ms_rms_norm_backward, ms_rms_norm_reference,
        (inverse_rms, norm_gradients, shared_dtype, _keep_shared, _from_shared),
    ),
    OwnGradient(
        "lean_dropout.v1", lean_dropout, keep_lean_dropout, lean_dropout_backward, lean_dropout_reference,
        (scaled_by_bits, pack, unpack), random=True,
    ),
    OwnGradient("regelu2.v2", regelu2, keep_segments, regelu2_backward, uses=(segments, pack, unpack, step_slope)),
    OwnGradient("resilu2.v2", resilu2, keep_segments, resilu2_backward, uses=(segments, pack, unpack, step_slope)),
    OwnGradient("eight_bits.v1", eight_bits, keep_eight_bits, eight_bits_backward, uses=(grouped,)),
)  # fmt: skip
"""Every op with its own gradient."""

define(LEAN)
