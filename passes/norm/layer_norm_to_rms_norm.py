"""Turn every LayerNorm that reads a centred residual stream into an RMSNorm, and centre the stream where it is written.

    LayerNorm(x; g, b, eps) = g (Px)/sqrt(|Px|^2/d + eps) + b = RMSNorm(Px; g, eps) + b,     P = I - 11^T/d

P x is had for nothing: P commutes with the residual adds, so it moves to the weights that write the stream,

    P (W h + c) = (P W) h + P c

exactly when all readers of the stream are blind to its mean. Which streams, which writers and why not is proved in
rewrite/streams.py. Where no weight can be edited (a table tied to the head, the output of a nonlinearity), one x - mean(x)
at run time stands in, as it does after residual dropout when asked to (``dropout="centre"``). eps is copied: both norms put
it on the mean square over the same d. The shift b stays as an add; fold_norm_shift moves it into the readers.

arXiv:2305.14858 (Pre-LN and Pre-RMSNorm are equivalent).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.axes import Value
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.relations import Centred, relate
from tautomer.rewrite.shapes import show
from tautomer.rewrite.streams import AfterDropout, Plan, Streams, candidates
from tautomer.rewrite.weights import Apply

aten = torch.ops.aten


class LayerNormToRmsNorm(Pass):
    """Pre-LN → Pre-RMSNorm; see the module."""

    claim = ALGEBRAIC("the mean is removed from the weights in float64 and rounded once, not from the activations")
    paper = "arXiv:2305.14858"
    purpose: ClassVar[Purpose] = "speed"

    def __init__(self, dropout: AfterDropout = "refuse") -> None:
        self.dropout = dropout

    def run(self, program: Program, context: Context) -> None:
        norms = candidates(program, self, context.admits)
        if context.fuel is not None:
            norms = norms[: context.fuel]
        if not norms:
            return
        streams = Streams(program, norms, self.dropout)
        plan = streams.plan()
        for norm in norms:
            if norm not in plan.norms:
                context.refused(self, norm, streams.reason(norm))
        reasons = {value: streams.why_at_run_time(value) for value in plan.runtime}
        centre_writers(program, plan)
        editor = Editor(program)
        for value, node in centre_at_run_time(editor, plan).items():
            context.noted(self, node, f"centred at run time: {reasons[value]}; {_cost(node)}")
        for norm in plan.norms:
            context.applied(self, norm)
            convert(editor, norm)


def centre_writers(program: Program, plan: Plan) -> None:
    """W <- W - mean(W) along the axis each weight contributes to the stream."""
    for node, axis in plan.weights:
        expression = program.expression(node)
        assert expression is not None
        mean = Apply(aten.mean.dim, (expression, (axis,), True))
        name = program.weights.stage(Apply(aten.sub.Tensor, (expression, mean)), node.meta["val"], str(node.target))
        storage = program.weights.storage(str(node.target))
        for reader in program.graph.find_nodes(op="get_attr"):
            if reader.target in program.weights and program.weights.storage(str(reader.target)) == storage:
                reader.target = name
    for value in plan.values:
        relate(value.node, Centred(value.axis))


def centre_at_run_time(editor: Editor, plan: Plan) -> dict[Value, fx.Node]:
    """x - mean(x) once after each value that no weight edit can centre, for the readers that were promised a centred one."""
    centred: dict[Value, fx.Node] = {}
    for value, readers in plan.runtime.items():
        op = editor.after(value.node)
        difference = op.node(op.sub(value.node, op.mean(value.node, [value.axis], True)))
        difference.meta["origin"] = value.node.meta.get("origin", value.node.name)
        relate(difference, Centred(value.axis))
        for reader in readers:
            reader.replace_input_with(value.node, difference)
        centred[value] = difference
    return centred


def _cost(node: fx.Node) -> str:
    return f"at every call a mean and a difference over {show(node.meta['val'].shape)}"


def convert(editor: Editor, norm: fx.Node) -> None:
    """layer_norm(x, g, b) -> rms_norm(x, g) + b."""
    bound = arguments(norm)
    op = editor.before(norm)
    result = op.rms_norm(bound["input"], bound["normalized_shape"], bound["weight"], bound["eps"])
    if bound["bias"] is not None:
        result = op.add(result, bound["bias"])
    editor.program.replace(norm, op.node(result))
