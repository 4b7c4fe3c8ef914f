"""What raising finds, against what is there: counted while the model runs, by nothing that the matcher knows.

A norm is a call of ``layer_norm`` or ``rms_norm``, or of a module whose class is named after one and which calls neither.
An attention is a call of ``scaled_dot_product_attention``, or a softmax whose result, however viewed, cast or dropped out,
is a factor of a product of two tensors.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tautomer
from tautomer.passes.cleanup.drop_dead_code import DropDeadCode
from tautomer.passes.recipes import RAISE
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes

aten = torch.ops.aten

NORMS = re.compile(r"(?i)^(?!.*(batch|group|instance|weight)).*(norm|norm1d)$")
_NORM_CALLS = {torch.nn.functional.layer_norm, torch.nn.functional.rms_norm, torch.layer_norm, torch.rms_norm}
_ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm", "__matmul__", "mm"}
_CARRIES = {
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "view", "reshape", "contiguous", "flatten", "unflatten",
    "permute", "transpose", "squeeze", "unsqueeze", "expand", "clone", "__getitem__", "detach", "mul", "__mul__", "unbind",
}  # fmt: skip


class Present(TorchFunctionMode):
    """Counts the norms and attentions of a model while it runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = 0
        self.attentions = 0
        self._inside = 0
        self._weights: dict[int, tuple[Any, int]] = {}
        self._softmaxes: set[int] = set()
        self._hooks = []
        for module in model.modules():
            if NORMS.match(type(module).__name__) and not any(NORMS.match(type(m).__name__) for m in list(module.modules())[1:]):
                self._hooks += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.norms += self._inside == 0
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if function in _NORM_CALLS:
            self.norms += self._inside == 0
        elif name in _ATTENTIONS:
            self.attentions += 1
        elif name in ("softmax", "_softmax", "softmax_backward"):
            self._mark(result, len(self._softmaxes) + len(self._weights) + 1)
        elif name in _CARRIES and (number := self._number(args[0])) is not None:
            for part in result if isinstance(result, (tuple, list)) else (result,):
                self._mark(part, number)
        elif name in _PRODUCTS:
            for operand in _tensors(args):
                if (number := self._number(operand)) is not None and number not in self._softmaxes:
                    self._softmaxes.add(number)
                    self.attentions += 1
        return result

    def _mark(self, x: Any, number: int) -> None:
        if isinstance(x, Tensor):
            self._weights[id(x)] = (weakref.ref(x), number)

    def _number(self, x: Any) -> int | None:
        known = self._weights.get(id(x))
        return known[1] if known is not None and known[0]() is x else None


def _tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in args:
        found += _tensors(x) if isinstance(x, (tuple, list)) else [x] if isinstance(x, Tensor) else []
    return found


@dataclass(frozen=True)
class Recall:
    """Norms and attentions of one model: in its run, in its captured program after raising, and what became of the masks."""

    norms_present: int
    norms_found: int
    attentions_present: int
    attentions_found: int
    masks: dict[str, int]
    error: float | None
    reasons: tuple[str, ...]


def recall(build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Recall:
    """Count one model, its attention as it is written out (``eager``), and what raising finds of it."""
    model, inputs = build()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad(), Present(model) as present:
        model(**inputs)
    program, context = tautomer.capture(model, (), inputs), Context()
    outcome = run_passes([kind() for kind in (*RAISE, DropDeadCode)], program, context)
    assert not outcome.withdrawn, outcome.withdrawn
    attentions = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return Recall(
        present.norms,
        program.count(aten.layer_norm.default) + program.count(aten.rms_norm.default),
        present.attentions,
        len(attentions),
        dict(Counter(map(_form, attentions))),
        outcome.evidence.forward if outcome.evidence is not None else None,
        tuple(dict.fromkeys(f"{r.rewrite}: {r.reason.partition(chr(10))[0]}" for r in context.log.refusals)),
    )


def _form(node: torch.fx.Node) -> str:
    mask, _, causal = (*node.args[3:6], None, 0.0, False)[:3] if len(node.args) < 6 else node.args[3:6]
    return "causal" if causal else "none" if mask is None else "mask"
