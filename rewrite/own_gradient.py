"""An op with its own gradient: what it computes, what its backward keeps, and what it makes of that.

    y = body(x, …)        keep(x, …, y) → memory        backward(memory, dy) → dx, …

``torch.library.triton_op`` with a body of plain torch: ``torch.export`` keeps the op as one node together with its backward,
Inductor fuses both, and nothing of Triton is needed. A second derivative raises: the backward is not differentiable, and a
gradient penalty would silently get nothing. Under autocast an op that says so reads its first operand in the autocast dtype,
and gives its weights that dtype itself, in forward and backward, so that it need not keep the copies.

torch.compile's disk cache knows an op by its name alone: a changed body, keep or backward needs the next version in the name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._torch import below_autocast, draws_numbers, quiet_triton

_NAMESPACE = "tautomer"
_LIBRARY: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]  # lives as long as the ops


@dataclass(frozen=True)
class OwnGradient:
    """One op of the namespace ``tautomer`` that says itself what its backward keeps.

    Attributes:
        name: with its version, "linear_from.v2".
        body: what it computes, in plain torch; its annotations are the schema. No result may be an operand.
        keep: ``keep(ctx, inputs, output)`` puts on ``ctx`` what the backward needs.
        backward: ``backward(ctx, *gradients)`` gives one gradient or None per operand.
        reference: the same results in differentiable torch: what ONNX gets; by default the body.
        uses: functions that the three call, which their version speaks for too.
        autocast: whether it computes in the autocast dtype, as a linear layer does.
        random: whether it draws random numbers.
        again: the FLOPs of what the backward computes again, of the operands.
    """

    name: str
    body: Callable[..., Any]
    keep: Callable[..., None]
    backward: Callable[..., Any]
    reference: Callable[..., Any] | None = None
    uses: tuple[Callable[..., Any], ...] = ()
    autocast: bool = False
    random: bool = False
    again: Callable[..., int] = lambda *operands: 0

    @property
    def overload(self) -> Any:
        """The op in a graph."""
        packet, _, version = self.name.partition(".")
        return getattr(getattr(torch.ops.tautomer, packet), version)


def define(ops: Sequence[OwnGradient]) -> None:
    """Enter ``ops`` in torch's dispatcher, once."""
    with quiet_triton():
        for op in ops:
            made: Any = torch.library.triton_op(f"{_NAMESPACE}::{op.name}", op.body, mutates_args=())
            made.register_autograd(_once(op), setup_context=op.keep)
            if op.random:
                draws_numbers(op.overload)
            if op.autocast:
                for device in ("CPU", "CUDA"):
                    _LIBRARY.impl(op.name, _in_autocast_dtype(op, device.lower()), f"Autocast{device}")


def _once(op: OwnGradient) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{_NAMESPACE}.{op.name} cannot be differentiated twice: its gradient is its own (create_graph=True)"
            )
        return op.backward(ctx, *gradients)

    return backward


def _in_autocast_dtype(op: OwnGradient, device: str) -> Callable[..., Any]:
    def call(x: Tensor, *operands: Any, **options: Any) -> Any:
        with below_autocast(device):
            wide = x.dtype is torch.float64 or not x.is_floating_point()  # autocast leaves these alone
            return op.overload(x if wide else x.to(torch.get_autocast_dtype(device)), *operands, **options)

    return call
