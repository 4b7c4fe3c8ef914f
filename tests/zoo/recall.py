"""What raising finds, against what is there: counted while the model runs, by nothing that the matcher knows.

A norm is a call of ``layer_norm`` or ``rms_norm``, or of a module that is named after a norm, calls neither, and returns
the same for an input that is a thousand times larger. An attention is a call of ``scaled_dot_product_attention`` or of
``MultiheadAttention``, or a softmax of what comes from a product of two tensors and is, however viewed, cast or dropped
out, a factor of another.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import tautomer
from tautomer.passes.cleanup.drop_dead_code import DropDeadCode
from tautomer.passes.recipes import RAISE
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.masks import Masks
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import Program

aten = torch.ops.aten
Build = Callable[[], tuple[nn.Module, dict[str, Any]]]

NORMS = re.compile(r"(?i)^(?!.*(batch|group|instance|weight)).*norm(1d)?$")
_NORMS = {"layer_norm", "rms_norm"}
_ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}
_ANSWERABLE = {"raise-attention", "gather-biases", "add-mask-of-sizes"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm", "rmatmul"}
_VIEWS = {
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "view", "reshape", "contiguous", "flatten", "unflatten",
    "permute", "transpose", "squeeze", "unsqueeze", "expand", "clone", "getitem", "detach", "mul", "unbind",
}  # fmt: skip
_ELEMENTWISE = _VIEWS | {
    "add", "iadd", "radd", "sub", "isub", "rsub", "imul", "rmul", "div", "idiv", "truediv", "itruediv", "where", "masked_fill",
    "max", "maximum", "clamp", "tanh", "cat", "gather",
}  # fmt: skip


class Marks:
    """A number on a tensor object, for as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}

    def put(self, x: Any, number: int) -> None:
        for part in _tensors(x):
            self._known[id(part)] = (weakref.ref(part), number)

    def of(self, args: Any) -> list[int]:
        known = [(x, self._known.get(id(x))) for x in _tensors(args)]
        return [mark[1] for x, mark in known if mark is not None and mark[0]() is x]


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _tensors(y)


class Present(TorchFunctionMode):
    """Counts the norms and attentions of a model while it runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = self.attentions = 0
        self._inside = self._softmaxes = 0
        self._scores, self._weights, self._counted = Marks(), Marks(), set[int]()
        named = [m for m in model.modules() if [type(n) for n in m.modules() if NORMS.match(type(n).__name__)] == [type(m)]]
        self._hooks = [m.register_forward_pre_hook(self._enter) for m in named]
        self._hooks += [m.register_forward_hook(self._leave) for m in named]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        x, *others = args
        near, far = (next(_tensors(module.forward(factor * x, *others))) for factor in (1e3, 1e6))
        self.norms += torch.allclose(near, far, rtol=1e-2, atol=1e-3)
        self._inside -= 1

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if self._inside:
            return result
        self.norms += name in _NORMS
        self.attentions += name in _ATTENTIONS
        name = name.strip("_")
        if name == "softmax" and self._scores.of(args):
            self._softmaxes += 1
            self._weights.put(result, self._softmaxes)
        elif name in _PRODUCTS:
            factors = set(self._weights.of(args)) - self._counted
            self._counted |= factors
            self.attentions += len(factors)
            self._scores.put(result, 0)
        else:
            if name in _ELEMENTWISE and self._scores.of(args):
                self._scores.put(result, 0)
            if name in _VIEWS and (marks := self._weights.of(args)):
                self._weights.put(result, marks[0])
        return result


@dataclass(frozen=True)
class Recall:
    """Norms and attentions of one model: in its run, and in its program after raising.

    Attributes:
        masks: how many attentions have a mask of each kind.
        reasons: what the report says of attentions, found or not.
        forward, gradient: the errors that verification measured, in float64.
    """

    kind: str
    norms_present: int
    norms_found: int
    attentions_present: int
    attentions_found: int
    masks: dict[str, int]
    reasons: tuple[str, ...]
    forward: float
    gradient: float

    @property
    def complete(self) -> bool:
        return (self.norms_found, self.attentions_found) == (self.norms_present, self.attentions_present)

    def row(self, name: str) -> str:
        """A line of the table."""
        masks = ", ".join(f"{count} {kind}" for kind, count in sorted(self.masks.items())) or "–"
        norms, attentions = f"{self.norms_found} / {self.norms_present}", f"{self.attentions_found} / {self.attentions_present}"
        reason = "" if self.complete else "; ".join(self.reasons)
        return f"| {name} | `{self.kind}` | {norms} | {attentions} | {masks} | {reason} |"


def recall(build: Build, *, check: bool = True) -> Recall:
    """Count one model, its attention as it is written out (``eager``), and what raising finds of it."""
    model, inputs = build()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad(), Present(model) as present:
        model(**inputs)
    program, context = tautomer.capture(model, (), inputs), Context()
    outcome = run_passes([kind() for kind in (*RAISE, DropDeadCode)], program, context, check=check)
    attentions = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return Recall(
        type(model).__name__,
        present.norms,
        program.count(aten.layer_norm.default) + program.count(aten.rms_norm.default),
        present.attentions,
        len(attentions),
        dict(Counter(_mask(node, program) for node in attentions)),
        tuple(dict.fromkeys(r.reason.partition("\n")[0] for r in context.log.refusals if r.rewrite in _ANSWERABLE)),
        0.0 if outcome.evidence is None else outcome.evidence.forward,
        0.0 if outcome.evidence is None else outcome.evidence.gradient or 0.0,
    )


def _mask(node: fx.Node, program: Program) -> str:
    mask, _, causal = (*node.args[3:6], None, 0.0, False)[:3] if len(node.args) < 6 else node.args[3:6]
    if mask is None:
        return "causal" if causal else "without"
    try:
        return str(Masks(program).band(mask))  # type: ignore[arg-type]
    except Refused:
        return "with a bias or data"
