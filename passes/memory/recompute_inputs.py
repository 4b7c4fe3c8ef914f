"""Let linear layers keep what their input is computed from, where that is kept anyway, instead of the input.

    h = gelu(u), linear(h, W, b) = h, linear_from(h, W, b, "gelu", u)

The gradient of W needs h. The activation before the layer keeps u, and gelu(u) is cheap: the backward computes it again. So do a
gated unit, which keeps gate and up, and a norm, which keeps its input. A dropout between the two that keeps its bits
(``pack-dropout-masks``) is made again from these. The forward does not change. Which storages go is asked of the whole program
(rewrite/saved.py): an input that something else keeps too stays, and is refused.

Liger-Kernel fuses SwiGLU and GEGLU with this saving (arXiv:2410.10989).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.diagonal import again
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import OPS, normal
from tautomer.rewrite.program import CHECKPOINT, place, target_name
from tautomer.rewrite.saved import SavedTensors
from tautomer.rewrite.weights import leaves

aten = torch.ops.aten
LINEAR = aten.linear.default


@dataclass(frozen=True)
class Source:
    """What a value is computed from, as ``linear_from`` reads it: by(a, p, q, k), and behind it a dropout.

    Attributes:
        before: the value that the dropout reads, if it is made again too.
    """

    by: str
    a: fx.Node
    p: fx.Node | None = None
    q: fx.Node | None = None
    k: float | None = None
    bits: fx.Node | None = None
    rate: float = 0.0
    before: fx.Node | None = None

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        return tuple(x for x in (self.a, self.p, self.q) if x is not None)


class RecomputeInputs(MemoryPass):
    """Inputs of linear layers are computed again in the backward; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = ALGEBRAIC("none in the forward; a weight's gradient may be summed in another order")
    paper: ClassVar[str] = "arXiv:2410.10989"

    def at(self, node: fx.Node) -> fx.Node | None:
        return node if any(reads(user, node) for user in node.users) and any(sources_of(node)) else None

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        layers = require_keepers(editor, [user for user in node.users if reads(user, node)])
        source = gaining(saved, editor, node, list(sources_of(node)), layers)
        old = [*([source.before] if source.before else []), node]
        return [*old, *layers], partial(emit, old=old, source=source, layers=layers)


def emit(op: GraphOps, old: Sequence[fx.Node], source: Source, layers: Sequence[fx.Node]) -> list[fx.Node]:
    """``old``, the last of which is what ``layers`` read, made once more, and every layer on it."""
    new: dict[fx.Node, fx.Node] = {}
    for value in old:
        new[value] = made_again(op, value, new)
    x = new[old[-1]]
    if source.rate:
        source = replace(source, bits=op.getitem(x.args[0], 1))
    return [*new.values(), *(layer_from(op, layer, x, source) for layer in layers)]


def layer_from(op: GraphOps, layer: fx.Node, x: fx.Node, source: Source) -> fx.Node:
    _, W, b = normal(layer)
    op.anchor = op.origin = layer
    dropout = (source.bits, source.rate) if source.rate else ()
    result: fx.Node = op.linear_from(x, W, b, source.by, source.a, source.p, source.q, source.k, *dropout)
    return result


def made_again(op: GraphOps, value: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A call equal to ``value``, so that the check knows what the input of the layers is made of."""
    op.anchor = value
    if value.target is not operator.getitem:
        return again(op, value, new)
    call, index = value.args
    result: fx.Node = op.getitem(again(op, call, new), index)  # type: ignore[arg-type]
    return result


# -- what a value is made of ----------------------------------------------------------------------------------


_ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.square.default: "square",
    OPS["quick_gelu"].target: "quick_gelu",
}


def sources_of(value: fx.Node) -> Iterator[Source]:
    """The ways in which a value can be computed again, the one that reads from furthest away first."""
    dropped = _dropped(value)
    if dropped is None:
        source = source_of(value)
        yield from [] if source is None else [source]
        return
    x, rate, _ = normal(dropped)
    source = source_of(x)
    if source is not None:
        yield replace(source, rate=rate, before=x)
    yield Source("affine", x, rate=rate)


def _dropped(value: fx.Node) -> fx.Node | None:
    """The dropout that ``value`` is the result of, if it keeps bits."""
    call = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else None
    return call if isinstance(call, fx.Node) and call.target is OPS["lean_dropout"].target else None


def source_of(value: fx.Node) -> Source | None:
    """How a value can be computed again at the price of a pass over it; None if it cannot."""
    if value.op != "call_function":
        return None
    if value.target in _ACTIVATIONS:
        return Source(_ACTIVATIONS[value.target], value.args[0])  # type: ignore[arg-type,index]
    if value.target is operator.getitem:
        call, index = value.args
        if not isinstance(call, fx.Node) or call.target is not OPS["lean_rms_norm"].target or index != 0:
            return None
        x, g, eps = normal(call)
        return Source("rms_norm", x, g, k=eps)
    operands: Any = normal(value)
    match value.target:
        case aten.gelu.default:
            u, approximate = operands
            return Source("gelu_tanh" if approximate == "tanh" else "gelu", u)
        case aten.pow.Tensor_Scalar:
            return Source("square", operands[0]) if operands[1] == 2 else None
        case aten.layer_norm.default:
            x, shape, g, b, eps, _ = operands
            return Source("layer_norm", x, g, b, eps) if len(shape) == 1 else None
        case aten.rms_norm.default:
            x, shape, g, eps = operands
            return Source("rms_norm", x, g, k=eps) if len(shape) == 1 else None
    if value.target in (OPS["glu"].target, OPS["lean_glu"].target):
        gate, up, by = operands
        return Source(by, gate, up)
    return Source(operands[1], operands[0]) if value.target is OPS["lean_activation"].target else None


# -- what goes and what comes ---------------------------------------------------------------------------------


def require_keepers(editor: Editor, layers: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of ``layers`` that keep their input for the gradient of their weight.

    Raises:
        Refused: none does.
    """
    kept = [layer for layer in layers if trains(editor, layer.args[1])]
    frozen = f"the weight of {', '.join(map(place, layers))} does not train, so its input is not kept"
    require(kept, frozen)
    return kept


def reads(layer: fx.Node, value: fx.Node) -> bool:
    """Whether ``layer`` is a linear layer on ``value`` that keeps it by itself."""
    return layer.target is LINEAR and layer.args[0] is value and CHECKPOINT not in layer.meta


def trains(editor: Editor, weight: Any) -> bool:
    """Whether ``weight`` gets a gradient, as far as is known: what is computed at run time may."""
    expression = editor.expression(weight)
    return expression is None or any(editor.program.weights.leaves[leaf].requires_grad for leaf in leaves(expression))


def gaining(saved: SavedTensors, editor: Editor, value: fx.Node, sources: Sequence[Source], layers: Sequence[fx.Node]) -> Source:
    """The first of ``sources`` from which computing ``value`` again frees something.

    Raises:
        Refused: none does; the reason of the last.
    """
    *others, last = sources
    for source in others:
        with contextlib.suppress(Refused):
            require_gain(saved, editor, value, source, layers)
            return source
    require_gain(saved, editor, value, last, layers)
    return last


def require_gain(saved: SavedTensors, editor: Editor, value: fx.Node, source: Source, layers: Sequence[fx.Node]) -> None:
    """Refuse where ``value`` stays, or what it is computed from would come in its place."""
    names = {layer.name for layer in layers}
    goes, comes = saved.freed(names), 0
    require(goes, f"{stays(saved, value, names)}: computing it again would free nothing")
    for x in source.tensors:
        comes += sum(t.bytes for t in saved.values.get(x.name, ()) if names.issuperset(t.needed_by))
        in_place = f"{target_name(x)} '{x.name}', which it is computed from, is not kept: it would be, in its place"
        require(goes > comes, in_place)


def stays(saved: SavedTensors, value: fx.Node, names: Collection[str]) -> str:
    """Who keeps ``value`` besides the nodes of these names, as a clause."""
    kept = saved.at.get(value.name)
    others = [] if kept is None else [name for name in kept.needed_by if name not in names]
    return f"what {target_name(value)} returns is kept by {', '.join(others)} too" if others else "nothing of it is kept"
