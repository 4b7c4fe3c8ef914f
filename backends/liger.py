"""A residual sum and the RMSNorm that reads it as one kernel of Liger-Kernel: eager PyTorch on CUDA, where it is installed.

    y, s = rms_norm(s, g), x + r    with ρ = (mean s² + eps)^(-1/2)
    dx = dr = ds + ρ (dy g - s ρ² mean(dy g s)),    dg = Σ dy s ρ

``add_rms_norm`` is a composition everywhere else, and Inductor fuses that itself. Here each node that the kernel represents
becomes one op when its program is emitted; torch sees forward and backward as two opaque ops, so that neither a compiler nor a
fake tensor looks inside. Moved to a device or a dtype the kernel does not take, and under autocast, the op is the composition.
arXiv:2410.10989.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite.lean import inverse_rms, norm_gradients
from tautomer.rewrite.library import add_rms_norm
from tautomer.rewrite.ops import OPS, normal
from tautomer.rewrite.own_gradient import OwnGradient, define

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 65536
"""The kernel holds a row in one block of Triton."""
_IN_FLOAT32 = "gemma"
"""Liger's name for a norm that is computed in float32 with its gain, and rounded once: what ``torch.rms_norm`` does on CUDA."""
_COMPOSITION = OPS["add_rms_norm"].target


@cache
def kernels() -> Any | None:
    """Liger's module, or None where it or Triton is not installed."""
    found = find_spec("liger_kernel") is not None and find_spec("triton") is not None
    return importlib.import_module("liger_kernel.ops.fused_add_rms_norm") if found else None


def represents(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel computes what ``add_rms_norm`` does of such operands."""
    fits = weight is not None and weight.dtype == x.dtype and weight.ndim == 1 and weight.shape[0] <= WIDEST
    return fits and x.dtype in DTYPES and x.device.type in DEVICES and kernels() is not None


def lower_sums(graph: fx.Graph) -> None:
    """Call the kernel wherever ``graph`` holds an ``add_rms_norm`` that it represents."""
    for node in graph.find_nodes(op="call_function", target=_COMPOSITION):
        x, residual, _, weight, eps = normal(node)
        g = weight.meta.get("val") if isinstance(weight, fx.Node) else None
        if eps is not None and isinstance(g, Tensor) and represents(x.meta["val"], g):
            node.target, node.args, node.kwargs = FORWARD.overload, (x, residual, weight, eps), {}


# -- the two ops ----------------------------------------------------------------------------------------------


_settings: dict[int, tuple[int, ...]] = {}
"""By width, how the kernel was launched forward: its backward is launched likewise."""


_BOTH = SimpleNamespace(needs_input_grad=(True, True))


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum, and ρ."""
    if not represents(x, weight):
        y, s, r = composition(x, residual, weight, eps)
        return y.contiguous(), s.contiguous(), r.contiguous()
    found: Any = kernels()
    y, s, r, *settings, _ = found.fused_add_rms_norm_forward(x.contiguous(), residual.contiguous(), weight, eps, 0.0, _IN_FLOAT32)
    _settings[x.shape[-1]] = tuple(settings)
    return y, s, r.view(*x.shape[:-1], 1)


def composition(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, s = add_rms_norm(x, residual, weight.shape, weight, eps)
    return y, s, inverse_rms(s, eps)


def keep_liger_add_rms_norm(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    (_, _, weight, _), (_, s, r) = inputs, output
    ctx.mark_non_differentiable(r)
    ctx.save_for_backward(s, weight, r)


def liger_add_rms_norm_backward(ctx: Any, dy: Tensor, ds: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dx, dg = torch.ops.tautomer.liger_add_rms_norm_gradients.v1(dy, ds, *ctx.saved_tensors)
    return dx, dx, dg, None


@torch.library.custom_op("tautomer::liger_add_rms_norm_gradients.v1", mutates_args=())
def liger_add_rms_norm_gradients(dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x (that of the residual is equal) and of the gain."""
    if not represents(s, weight):
        dx, dg = norm_gradients(_BOTH, dy, s * r, r, weight, centred=False)
        return (ds + dx).to(s.dtype).contiguous(), dg.to(weight.dtype)  # type: ignore[operator,union-attr]
    found: Any = kernels()
    given = (dy.contiguous(), ds.contiguous(), s, weight, r.view(-1), 0.0, found._str_to_casting_mode[_IN_FLOAT32])
    dx, _, dg = found.fused_add_rms_norm_backward(*given, *_settings[s.shape[-1]], in_place=False)
    return dx, dg


@liger_add_rms_norm_gradients.register_fake
def _(dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), torch.empty_like(weight)


def like(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), r


FORWARD = OwnGradient(
    "liger_add_rms_norm.v1", liger_add_rms_norm, keep_liger_add_rms_norm, liger_add_rms_norm_backward, composition, fake=like
)
define((FORWARD,))
_AUTOCAST: Any = torch.library.Library("tautomer", "FRAGMENT")  # type: ignore[no-untyped-call]  # lives as long as the op
for _device in ("CPU", "CUDA"):
    _AUTOCAST.impl("liger_add_rms_norm.v1", composition, f"Autocast{_device}")
