"""Replace LayerNorms by Unified Normalization in its inference form, with statistics measured on data.

    LayerNorm(x; gamma, beta) -> gamma / sqrt(psi^2 + eps) * x + beta          psi^2 = mean x^2, per channel, over tokens

Another function: no mean is taken from a token and no token is measured, so the model must be trained (the map as it
stands here, or the module of ``tautomer.nn.replace_layer_norms``). What is left is one product and one sum with
weights, which folds into the linear layers that read it. gamma and beta are kept, and x is not centred: UN has no mean.

psi^2 of all norms is measured in one pass over ``data``, on the model as it is. Measuring layer by layer on what is
already rewritten, or fitting gamma and beta to the LayerNorm's outputs, starts nearer to the model and ends nowhere
better after a short training (benchmarks/unified_norm.py), so neither is done.

arXiv:2208.01313 (Unified Normalization for Accelerating and Stabilizing Transformers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, arguments, path_of
from tautomer.rewrite.streams import candidates

_NO_DATA = "UN needs the second moments of its inputs: pass data=[…] to optimize, an iterable of example calls"


class LayerNormToUnifiedNorm(Pass):
    """LayerNorm → a diagonal map with measured statistics; see the module.

    Args:
        tokens: the input that is not zero where a token counts, if the model has one: ``[...]`` as the norms' inputs without
            their last axis. A norm whose input has another shape (pooled tokens) counts all of its rows.
    """

    claim = ARCHITECTURE("a token is scaled by what its channels are on average, not by what it is itself")
    paper = "arXiv:2208.01313"

    def __init__(self, tokens: str = "attention_mask") -> None:
        self.tokens = tokens

    def run(self, program: Program, context: Context) -> None:
        norms = candidates(program, self, context.admits)
        for norm in program.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
            if norm not in norms and context.admits(self, norm):
                context.refused(self, norm, "it normalises several axes, and UN has one number per channel")
        norms = norms[: context.fuel]
        if context.data is None:
            for norm in norms:
                context.refused(self, norm, _NO_DATA)
        elif norms:
            editor = Editor(program)
            for norm, moment in second_moments(program, context.data, norms, self.tokens).items():
                try:
                    substitute(self, [norm], lambda op, n=norm, m=moment: [unified(op, n, m)], editor, context)  # type: ignore[misc]
                except Refused as refusal:
                    context.refused(self, norm, str(refusal))


def second_moments(program: Program, data: Data, norms: Sequence[fx.Node], tokens: str) -> dict[fx.Node, Tensor]:
    """The mean of x^2 per channel over the tokens of all calls, in float64, for the input x of each norm."""
    inputs = {norm: norm.all_input_nodes[0] for norm in norms}
    wanted = set(inputs.values())
    mask_input = next((node for node in program.placeholders if node.target == tokens), None)
    sums: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}
    mask: Tensor | None = None

    def see(node: fx.Node, value: Tensor) -> None:
        nonlocal mask
        if node is mask_input:
            mask = value != 0
        if node in wanted:
            rows = value.flatten(0, -2) if mask is None or mask.shape != value.shape[:-1] else value[mask]
            squares = rows.double().square().sum(0)
            sums[node] = sums[node] + squares if node in sums else squares
            counts[node] = counts.get(node, 0) + len(rows)

    data.watch(program, [node for node in (mask_input, *wanted) if node is not None], see)
    return {norm: sums[x] / max(1, counts[x]) for norm, x in inputs.items()}


def unified(op: GraphOps, norm: fx.Node, moment: Tensor) -> fx.Node:
    """gamma / sqrt(psi^2 + eps) * x + beta, the factor one weight."""
    bound = arguments(norm)
    x, gamma, beta = bound["input"], bound["weight"], bound["bias"]
    moment = moment.to(torch.promote_types(x.meta["val"].dtype, torch.float32))
    psi2 = op.measured(".".join(filter(None, (path_of(norm), "running_var"))), moment, x)
    scale = op.rsqrt(op.add(psi2, bound["eps"]))
    scaled = op.mul(x, op.node(scale if gamma is None else op.mul(gamma, scale)))
    return op.node(scaled if beta is None else op.add(scaled, beta))
